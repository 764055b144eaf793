"""Figures of the tables of muffin/inspection.py. Each function gives a matplotlib Figure, made without pyplot, so nothing is global.

    training_curves(inspection.training_curves("runs/dpo"), beta=0.1).savefig("curves.png")

Nothing is told by colour alone: chosen is drawn with circles and full lines, rejected with crosses and dashed lines, and what is above or
below zero stands above or below a line. eval/report.py and eval/inspect_rewards.ipynb put them together.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.patches import PathPatch
from matplotlib.path import Path
from matplotlib.textpath import text_to_path
from matplotlib.transforms import Affine2D
from PIL import Image

from muffin.inspection import JudgedClaim, auroc, calibration_error, confusion, margins, reliability, share_below_zero

LN2 = math.log(2)
CHOSEN: dict[str, Any] = {"color": "#0072b2", "marker": "o", "linestyle": "-"}
REJECTED: dict[str, Any] = {"color": "#d55e00", "marker": "x", "linestyle": "--"}
STYLES = {"chosen": CHOSEN, "rejected": REJECTED}
GREY, LIGHT = "#6a6a6a", "#a8a8a8"

SELECTORS: dict[str, dict[str, Any]] = {
    "reward_mean": {"color": "tab:blue", "marker": "o"},
    "reward_sum": {"color": "tab:orange", "marker": "s"},
    "policy_mean_logp": {"color": "tab:green", "marker": "^"},
    "random": {"color": "grey", "marker": "x", "linestyle": "--"},
    "oracle": {"color": "black", "marker": "*", "linestyle": ":"},
}
METRICS = {
    "chair_s": "answers that invent an object, %",
    "chair_i": "invented among named objects, %",
    "recall": "objects covered, %",
    "claim_error": "wrong claims, %",
    "words": "words per answer",
    "rejected_share": "claims that the labeler rejects, %",
    "rejected_claims": "rejected claims per answer",
    "accepted_claims": "accepted claims per answer",
}
PLANES = (("recall", "chair_s"), ("accepted_claims", "rejected_share"))  # capability and hallucination, the first that results have


def _panels(count: int, columns: int, width: float, height: float, below: float = 0.0) -> tuple[Figure, list[Axes]]:
    """`count` panels of width x height inches in rows of `columns`, with `below` inches for a legend; one column is for narrow pages."""
    columns = min(columns, count)
    rows = -(-count // columns)
    figure = Figure(figsize=(width * columns, height * rows + below), layout="constrained")
    axes = list(np.atleast_1d(figure.subplots(rows, columns)).flatten())
    for empty in axes[count:]:
        empty.axis("off")
    return figure, axes[:count]


# --- training


def training_curves(
    curves: pd.DataFrame,
    evaluations: pd.DataFrame | None = None,
    *,
    beta: float,
    start_loss: float | None = LN2,
    title: str = "",
    columns: int = 3,
) -> Figure:
    """Loss, accuracy, margin, rewards of chosen and rejected, and their log-probs against the reference's on the same rows.

    curves, evaluations: of `inspection.training_curves` and `evaluation_curves`. start_loss: of a policy that is its reference, drawn as a
    line; None where it is not known. Curves that were not logged are left out.
    """
    figure, panels = _panels(6, columns, 4.0, 3.2)
    loss, accuracy, margin, rewards, logps, weight = panels
    steps = curves.index.to_numpy()

    def line(axes: Axes, name: str, label: str, scale: float = 1.0, **style: Any) -> None:
        if name in curves:
            axes.plot(steps, scale * curves[name], markersize=4, label=label, **style)
        if evaluations is not None and name in evaluations:
            held_out = {**style, "marker": "s", "markerfacecolor": "white", "linestyle": ":"}
            axes.plot(evaluations.index, scale * evaluations[name], markersize=6, label=f"{label}, held out", **held_out)

    line(loss, "loss", "loss", **CHOSEN)
    if start_loss is not None:
        loss.axhline(start_loss, color=GREY, linestyle=":", label="start" if start_loss != LN2 else "ln 2: policy = reference")
    loss.set_title("loss")
    line(accuracy, "rewards/accuracies", "pairs", 100.0, **CHOSEN)
    accuracy.axhline(50, color=GREY, linestyle=":", label="chance")
    accuracy.set(title="pairs with chosen rewarded more, %", ylim=(-3, 103))
    line(margin, "rewards/margins", "chosen - rejected", **CHOSEN)
    margin.set_title("reward margin, beta x nats")
    line(rewards, "rewards/chosen", "chosen", **CHOSEN)
    line(rewards, "rewards/rejected", "rejected", **REJECTED)
    rewards.set_title("rewards, beta x nats")
    for axes in (margin, rewards):
        axes.axhline(0, color=GREY, linestyle=":")
    for side, style in STYLES.items():
        line(logps, f"logps/{side}", side, **style)
        if {f"logps/{side}", f"rewards/{side}"} <= set(curves):
            start = curves[f"logps/{side}"] - curves[f"rewards/{side}"] / beta
            logps.plot(steps, start, color=style["color"], linestyle=":", linewidth=1, label=f"{side}, at the start")
    logps.set_title("log-probs, nats (dotted: at the start)")
    line(weight, "rewards/gradient_weight", "mean over pairs", **CHOSEN)
    weight.set_title("gradient weight of a pair")
    for axes in (loss, accuracy, margin, rewards, logps, weight):
        if not axes.lines or (axes is weight and "rewards/gradient_weight" not in curves):
            axes.axis("off")
            axes.set_title("")
            continue
        axes.set_xlabel("step")
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=8)
    figure.suptitle(title)
    return figure


# --- rewards


def margin_histogram(train: pd.DataFrame, heldout: pd.DataFrame | None = None) -> Figure:
    """Margins of `inspection.pair_rewards`, the share below 0 in words; held-out pairs as an outline, both as shares of their pairs."""
    figure, (axes,) = _panels(1, 1, 5.6, 3.8)
    tables = {"train": train} | ({} if heldout is None else {"held out": heldout})
    values = {name: margins(table) for name, table in tables.items()}
    together = np.concatenate(list(values.values()))
    edges = np.histogram_bin_edges(np.append(together, 0.0), bins=min(40, max(10, len(together) // 8)))
    for name, each in values.items():
        label = f"{name}: {len(each)} pairs, {share_below_zero(tables[name]):.1f} % below 0, median {each.median():+.2f}"
        weights = np.full(len(each), 100 / len(each))
        if name == "train":
            axes.hist(each, edges, weights=weights, color="#9ecae1", edgecolor="#4a4a4a", linewidth=0.5, label=label)
        else:
            axes.hist(each, edges, weights=weights, histtype="step", color="black", linewidth=1.8, linestyle="--", label=label)
    axes.axvline(0, color="black", linewidth=1.2)
    low, high = axes.get_ylim()
    axes.set_ylim(low, high * 1.06)
    left, right = axes.get_xlim()
    share = -left / (right - left)  # of the width, left of 0
    if share < 0.9:
        axes.text(0, high * 1.05, " order kept →", va="top", fontsize=8)
    if share > 0.35:  # else there is no room, and little to say
        axes.text(0, high * 1.05, "← order turned round ", va="top", ha="right", fontsize=8)
    axes.set(xlabel="margin: reward of chosen - reward of rejected, beta x nats", ylabel="% of pairs")
    figure.legend(loc="outside lower center", fontsize=8)
    return figure


def reward_by_length(rewards: pd.DataFrame, columns: int = 2) -> Figure:
    """Reward of every answer of `inspection.pair_rewards` against its tokens: summed, and per token, with the correlation."""
    figure, panels = _panels(2, columns, 4.6, 3.8)
    for axes, column, title in zip(panels, ("reward_sum", "reward_mean"), ("sum", "mean over tokens"), strict=True):
        for side, style in STYLES.items():
            answers = rewards[rewards.side == side]
            label = f"{side}, r = {_correlation(answers.tokens, answers[column])}"
            marker = {"marker": style["marker"]} | ({"facecolors": "none", "edgecolors": style["color"]} if side == "chosen" else {})
            axes.scatter(answers.tokens, answers[column], s=22, linewidths=0.9, alpha=0.75, label=label, color=style["color"], **marker)
        axes.axhline(0, color=GREY, linewidth=1)
        axes.set(xlabel="tokens of the answer", title=f"reward, {title}")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    return figure


def _correlation(first: pd.Series, second: pd.Series) -> str:
    """Pearson's r to two digits; a dash where one of them does not vary."""
    if len(first) < 2 or first.nunique() < 2 or second.nunique() < 2:
        return "–"
    return f"{np.corrcoef(first, second)[0, 1]:+.2f}"


# --- text in pictures


@dataclass(frozen=True)
class _Word:
    """Text to set at one place. bar: height and direction of a bar beside it, -1 to 1."""

    text: str
    color: str = "black"
    struck: bool = False
    bar: float = 0.0


COLUMNS = 84  # characters of a line
FONT_SIZE = 9.0
_ADVANCE = 0.602  # width of a letter of DejaVu Sans Mono by its size
_CHARACTER = _ADVANCE * FONT_SIZE / 72  # in inches
_IMAGE_WIDTH = 2.1


def token_rewards(image: Image.Image, tokens: pd.DataFrame, title: str = "") -> Figure:
    """The reward of every token of a pair (`inspection.pair_tokens`) beside its image: a bar upwards is a reward, downwards a penalty.

    The beginning that both answers share is grey and has no bars: its rewards cancel in the margin. Bars have one scale.
    """
    own = tokens[~tokens.shared].reward.abs()
    largest = float(own.max()) if len(own) and own.max() > 0 else 1.0
    blocks = []
    for side in STYLES:
        answer = tokens[tokens.side == side]
        words = [
            _Word(token.text, LIGHT if token.shared else "black", bar=0.0 if token.shared else token.reward / largest)
            for token in answer.itertuples()
        ]
        blocks.append((f"{side}: reward {answer.reward.sum():+.3f}", words))
    return _typeset(
        image,
        blocks,
        title,
        note=f"up: likelier than before training, down: less likely; a full bar is {largest:.3f}; grey: shared beginning",
        line_height=0.34,
    )


def judged_pair(image: Image.Image, answers: dict[str, str | Sequence[JudgedClaim]], title: str = "") -> Figure:
    """Both answers of a pair beside the image: claims with the labeler's P(yes), rejected ones struck through; plain text as it is."""
    blocks = []
    for side, answer in answers.items():
        if isinstance(answer, str):
            blocks.append((side, [_Word(f"{word} ") for word in answer.split()]))
            continue
        words = []
        for claim in answer:
            words += [_Word(f"{word} ", "black" if claim.accepted else "#8c1d18", struck=not claim.accepted) for word in claim.text.split()]
            words.append(_Word(f"[{claim.verdict}] ", GREY))
        blocks.append((side, words))
    return _typeset(image, blocks, title, note="[P(yes)]; struck through: rejected by the labeler", line_height=0.19)


def _typeset(image: Image.Image, blocks: Sequence[tuple[str, Sequence[_Word]]], title: str, *, note: str, line_height: float) -> Figure:
    """Headed blocks of words, wrapped at COLUMNS characters, beside the image; all measures in inches."""
    title_lines = _wrapped(title, COLUMNS)
    height = max(_IMAGE_WIDTH + 0.2, 0.2 * (len(title_lines) + 1))
    placed: list[tuple[float, float, _Word]] = []  # column, inches from the top
    top = 0.2 * len(title_lines) + 0.2
    headings = []
    for heading, words in blocks:
        headings.append((top, heading))
        top += 0.24 + (line_height - 0.19) / 2
        column = 0
        for word, ends_line in _pieces(words):
            if column and column + len(word.text.rstrip()) > COLUMNS:
                column, top = 0, top + line_height
                word = replace(word, text=word.text.lstrip())
            placed.append((column, top, word))
            column += len(word.text)
            if ends_line:
                column, top = 0, top + line_height
        top += line_height + 0.1
    height = max(height, top + 0.2)
    width = _IMAGE_WIDTH + COLUMNS * _CHARACTER + 0.2
    figure = Figure(figsize=(width, height))
    shown = figure.add_axes((0.1 / width, 1 - (_IMAGE_WIDTH + 0.05) / height, (_IMAGE_WIDTH - 0.3) / width, (_IMAGE_WIDTH - 0.1) / height))
    shown.imshow(image)
    shown.axis("off")
    page = figure.add_axes((_IMAGE_WIDTH / width, 0, COLUMNS * _CHARACTER / width, 1))
    page.set(xlim=(0, COLUMNS), ylim=(height, 0))
    page.axis("off")
    for number, text in enumerate(title_lines):
        _write(page, 0, 0.12 + 0.2 * number, text)
    for y, heading in headings:
        _write(page, 0, y, heading, weight="bold")
    for x, y, word in placed:
        _write(page, x, y, word.text, color=word.color)
        indent, length = len(word.text) - len(word.text.lstrip()), len(word.text.strip())
        if word.struck:
            page.plot([x, x + length], [y, y], color=word.color, linewidth=1)
        if abs(word.bar) > 0.02:  # less would be a line no thicker than its edge
            offset = -0.075 if word.bar > 0 else 0.075
            colour = CHOSEN["color"] if word.bar > 0 else REJECTED["color"]
            page.bar(x + indent + length / 2, -0.085 * word.bar, width=max(length - 0.3, 0.5), bottom=y + offset, color=colour)
    _write(page, 0, height - 0.1, note, color=GREY, scale=0.85)
    page.set(xlim=(0, COLUMNS), ylim=(height, 0))
    return figure


def _write(page: Axes, x: float, y: float, text: str, *, color: str = "black", weight: str = "normal", scale: float = 1.0) -> None:
    """Set text with its middle at y, as an outline: drawn as text, its letters would be as wide as the resolution's pixels allow."""
    font = FontProperties(family="DejaVu Sans Mono", weight=weight, size=FONT_SIZE)
    vertices, codes = text_to_path.get_text_path(font, text, ismath=False)
    if not len(vertices):
        return
    size = scale / text_to_path.FONT_SCALE
    to_page = Affine2D().scale(size / _ADVANCE, -size * FONT_SIZE / 72).translate(x, y + 0.35 * scale * FONT_SIZE / 72)
    page.add_patch(PathPatch(to_page.transform_path(Path(vertices, codes)), facecolor=color, linewidth=0, gid=text))


def _pieces(words: Sequence[_Word]) -> Iterator[tuple[_Word, bool]]:
    """Words of printable text no longer than a line, each with whether a line ends after it."""
    for word in words:
        lines = word.text.split("\n")
        for number, line in enumerate(lines):
            text = "".join(character if character.isprintable() else "?" for character in line.replace("\t", " "))
            parts = [text[start : start + COLUMNS] for start in range(0, len(text), COLUMNS)] or [""]
            for part in parts:
                yield replace(word, text=part), number < len(lines) - 1 and part is parts[-1]


def _wrapped(text: str, columns: int) -> list[str]:
    lines = [""]
    for word in text.split():
        if lines[-1] and len(lines[-1]) + 1 + len(word) > columns:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()[:columns]
    return lines if text else []


# --- the labeler and the pairs


def labeler_reliability(claims: pd.DataFrame) -> Figure:
    """Share of true claims where the labeler says P(yes), with 95 % intervals, over the number of claims; `inspection.claim_table`."""
    bins = reliability(claims)
    asked = claims.dropna(subset="p_yes")
    figure = Figure(figsize=(5.4, 5.2), layout="constrained")
    axes, counts = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    axes.plot([0, 1], [0, 1], color=GREY, linestyle=":", label="as sure as it is right")
    spread = np.array([bins.true - bins.true_low, bins.true_high - bins.true]).clip(min=0)
    axes.errorbar(bins.predicted, bins.true, spread, capsize=3, label="claims in bins of P(yes)", **CHOSEN)
    axes.axvline(0.5, color=GREY, linewidth=1)
    axes.text(0.49, 0.02, "rejected", ha="right", fontsize=8, color=GREY)
    axes.text(0.51, 0.02, "accepted", fontsize=8, color=GREY)
    axes.set(ylabel="share that is true", xlim=(0, 1), ylim=(-0.03, 1.03))
    axes.set_title(f"AUROC {auroc(asked.p_yes, asked.truth):.3f}, calibration error {calibration_error(bins):.3f}", fontsize=11)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc="upper left")
    counts.bar((bins.low + bins.high) / 2, bins.claims, width=0.9 * (bins.high - bins.low), color="#9ecae1", edgecolor="#4a4a4a")
    counts.set(xlabel="P(yes) / (P(yes) + P(no))", ylabel="claims")
    return figure


def labeler_confusion(claims: pd.DataFrame) -> Figure:
    """Claims of each kind that the labeler accepted (plain) and rejected (hatched), with how often it was right."""
    table = confusion(claims)[::-1]
    figure, (axes,) = _panels(1, 1, 5.4, 0.45 * len(table) + 1.4)
    axes.barh(table.index, table.accepted, color="#9ecae1", edgecolor="#4a4a4a", label="accepted")
    axes.barh(table.index, table.rejected, left=table.accepted, color="#fdd0a2", edgecolor="#4a4a4a", hatch="///", label="rejected")
    for row, (count, right) in enumerate(zip(table.claims, table.right, strict=True)):
        axes.text(count, row, f" {right:.0f} % right", va="center", fontsize=9)
    axes.set_xlim(0, table.claims.max() * 1.22)
    axes.set_xlabel("claims")
    figure.legend(loc="outside lower center", ncols=2, fontsize=8)
    return figure


def pair_order(orders: pd.DataFrame, rewards: pd.DataFrame | None = None, columns: int = 2) -> Figure:
    """How the labeler's order of pairs agrees with the truth (`inspection.pair_orders`), and what margins training gave to each kind."""
    names = ["right", "tie", "wrong"]
    figure, panels = _panels(1 if rewards is None else 2, columns, 4.4, 3.4)
    counts = orders.order.value_counts().reindex(names, fill_value=0)
    bars = panels[0].bar(names, 100 * counts / len(orders), color=["#9ecae1", "white", "#fdd0a2"], edgecolor="#4a4a4a")
    for bar, hatch in zip(bars, ("", "", "///"), strict=True):
        bar.set_hatch(hatch)
    panels[0].bar_label(bars, [str(count) for count in counts], fontsize=9)
    panels[0].set(ylabel="% of pairs", title="chosen has truly fewer false claims")
    panels[0].margins(y=0.12)
    if rewards is not None:
        found = margins(rewards)
        by_order = [found[orders.order.reindex(found.index) == name].to_numpy() for name in names]
        panels[1].boxplot(by_order, tick_labels=names, medianprops={"color": "black"}, flierprops={"markersize": 3})
        panels[1].axhline(0, color=GREY, linestyle=":")
        panels[1].set_title("margin after training, beta x nats")
    return figure


# --- results


def _label(axes: Axes, x: Iterable[float], y: Iterable[float], labels: Iterable[str]) -> None:
    """A label beside every point; points at one place share theirs."""
    places: dict[tuple[float, float], list[str]] = {}
    for across, up, label in zip(x, y, labels, strict=True):
        places.setdefault((across, up), []).append(label)
    for place, found in places.items():
        axes.annotate(", ".join(found), place, xytext=(8, 6), textcoords="offset points", fontsize=8)
    axes.margins(0.15)


def hallucination_capability(moments: pd.DataFrame) -> Figure:
    """Hallucination against capability at every moment (`inspection.load_moments`), with 95 % intervals; down and right is better.

    Object hallucination against recall where the truth is known, else the labeler's rejected against accepted claims. One line per
    decoding, numbered in order of time: 0 is before training.
    """
    capability, metric = next(plane for plane in PLANES if set(plane) <= set(moments.columns))
    figure, (axes,) = _panels(1, 1, 5.4, 4.4)
    styles = (
        CHOSEN,
        REJECTED,
        {"color": "#009e73", "marker": "^", "linestyle": "-."},
        {"color": "#6a3d9a", "marker": "s", "linestyle": ":"},
    )
    for (decoding, line), style in zip(moments.groupby("decoding", sort=False), styles, strict=False):
        spread = [[line[name] - line[f"{name}_low"], line[f"{name}_high"] - line[name]] for name in (capability, metric)]
        axes.errorbar(line[capability], line[metric], xerr=spread[0], yerr=spread[1], capsize=2, elinewidth=0.8, label=decoding, **style)
        _label(axes, line[capability], line[metric], [f"{number} {moment}" for number, moment in enumerate(line.moment)])
    axes.set(xlabel=METRICS[capability], ylabel=METRICS[metric], title="↘ better")
    axes.grid(alpha=0.3)
    axes.legend(title="decoding", fontsize=8)
    return figure


def checkpoint_choice(choices: pd.DataFrame, columns: int = 2) -> Figure:
    """A panel per round: its start (square), its checkpoints in order (circles, joined) and the chosen one (ringed), of
    `inspection.load_choices`; down and right is better."""
    rounds = list(choices.groupby("round", sort=False))
    figure, panels = _panels(len(rounds), columns, 4.6, 3.6)
    for axes, (name, found) in zip(panels, rounds, strict=True):
        start, candidates = found[found["name"] == "start"], found[found["name"] != "start"]
        axes.plot(candidates.capability, candidates.hallucination, **CHOSEN)
        axes.plot(start.capability, start.hallucination, color="black", marker="s", linestyle="none")
        chosen = found[found.chosen]
        axes.plot(chosen.capability, chosen.hallucination, marker="o", markersize=13, fillstyle="none", color="black", linestyle="none")
        _label(axes, found.capability, found.hallucination, found["name"].str.removeprefix("checkpoint-"))
        names = [found[f"{number}_name"].iloc[0] for number in ("capability", "hallucination")]
        axes.set(xlabel=METRICS.get(names[0], names[0]), ylabel=METRICS.get(names[1], names[1]), title=f"{name}   ↘ better")
        axes.grid(alpha=0.3)
    return figure


def best_of_n(table: pd.DataFrame, title: str = "", columns: int = 3) -> Figure:
    """A panel per metric, a line per selector with its 95 % interval (`inspection.best_of_n_table`); the baselines are not in colour."""
    metrics = list(table.metric.unique())
    figure, panels = _panels(len(metrics), columns, 4.0, 3.0, below=0.8)
    numbers = sorted(table.n.unique())
    for axes, metric in zip(panels, metrics, strict=True):
        for selector, line in table[table.metric == metric].groupby("selector", sort=False):
            style = SELECTORS.get(selector, {})
            (drawn,) = axes.plot(line.n, line.value, markersize=4, label=selector, **style)
            axes.fill_between(line.n, line.low, line.high, alpha=0.12, color=drawn.get_color(), linewidth=0)
        axes.set_xscale("log", base=2)
        axes.set_xticks(numbers, [str(n) for n in numbers])
        axes.set_xlabel("N")
        axes.set_title(METRICS.get(metric, metric))
        axes.grid(alpha=0.3)
    figure.suptitle(title)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=table.selector.nunique() if columns > 1 else 2)
    return figure
