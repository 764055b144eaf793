"""Everything worth looking at in a run, as one HTML page: training, rewards, the labeler, the worst pairs token by token, the results.

    python eval/report.py --run outputs/demo --output report.html

The page is one file without scripts that opens offline and prints. It is made of stored files, without a model or a GPU. --run is a
folder of train/iterate.py; of a run that was made by hand, name the folders:

    python eval/muffin_inference_logp.py --model_name_or_path runs/lora/merged --data_path scored --output_dir rescored --lora_enable True
    python eval/report.py --scored scored --rescored rescored --policy runs/lora --judged judged --output report.html

A panel whose files are not there, or cannot be used, is left out and says in its place what would make it. What needs the truth is shown
for the tiny image world alone.

Output: the page. eval/inspect_rewards.ipynb has the same panels in cells.
"""

import base64
import html
import io
import json
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure
from PIL import Image
from transformers import HfArgumentParser

from muffin import figures, inspection
from muffin.pairs import PreferenceDataset, PreferencePair, load_prompts, parse_column_map
from muffin.policies import PolicyAdapter
from muffin.provenance import write_atomically

DPI = 144  # of pictures: sharp on screens of two pixels per CSS pixel, and on paper
WORD_LETTERS = 24  # that the tokens of a word may have together, to stand on one line
THUMBNAIL = 360  # pixels of the longer side of a pair's image
KEPT_MARKS = "\n\u200c\u200d"  # joiners are part of emoji and of Persian words
SCORING = "eval/muffin_inference_logp.py"
LEVELS = (0.1, 1 / 3, 2 / 3)  # parts of the largest token reward at which a sign is written once, twice, three times


@dataclass
class ReportOptions:
    output: str = field(default="report.html", metadata={"help": "HTML file to write."})
    run: str | None = field(default=None, metadata={"help": "Folder of train/iterate.py; its last round is shown."})
    scored: str | None = field(default=None, metadata={"help": "Pairs with the log-probs of the policy before training."})
    rescored: str | None = field(default=None, metadata={"help": "The same pairs, scored by the trained policy with the same flags."})
    heldout_scored: str | None = field(default=None, metadata={"help": "Pairs that were not trained on, scored before training."})
    heldout_rescored: str | None = field(default=None, metadata={"help": "Those pairs, scored by the trained policy."})
    policy: str | None = field(default=None, metadata={"help": "The --output_dir of train/dpo.py: training curves, tokenizer, beta."})
    judged: str | None = field(default=None, metadata={"help": "Judged answers of data/score_claims.py."})
    pairs: str | None = field(default=None, metadata={"help": "Pairs of data/build_pairs.py; needed only where --scored is not there."})
    best_of_n: str | None = field(default=None, metadata={"help": "best_of_n.json of eval/best_of_n.py."})
    max_pairs: int = field(default=6, metadata={"help": "Pairs with the lowest margins that are shown in full, usually 4 to 20."})
    beta: float | None = field(default=None, metadata={"help": "Scale of the rewards; default: the --dpo_beta of --policy."})
    column_map: str = field(default="", metadata={"help": "Own column names of the scored pairs: question=prompt,chosen=good."})
    image_root: str | None = field(default=None, metadata={"help": "Folder that image paths in the data start from; default: the data's."})

    def __post_init__(self) -> None:
        folders = ("run", "scored", "rescored", "heldout_scored", "heldout_rescored", "policy", "judged", "pairs", "best_of_n")
        given = {name: getattr(self, name) for name in folders if getattr(self, name) is not None}
        if not given:
            raise ValueError("nothing to report: give --run, or --policy, --scored, --rescored, --judged, --pairs, --best_of_n")
        if missing := [f"--{name} {path}" for name, path in given.items() if not Path(path).exists()]:
            raise ValueError(f"{missing[0]} does not exist")
        if self.max_pairs < 1:
            raise ValueError(f"--max_pairs {self.max_pairs} must be at least 1")


OPTIONS = (ReportOptions,)


def main(argv: list[str] | None = None) -> list[str]:
    """Write the page; returns the titles of the panels that were left out."""
    (options,) = HfArgumentParser(OPTIONS).parse_args_into_dataclasses(args=argv, look_for_args_file=False)
    sources = find_sources(options)
    material = Material(sources, options)
    title = f"Run {Path(options.run).resolve().name}" if options.run else "Rewards"
    sections, left_out = [], {}
    for panel in PANELS:
        try:
            body = panel.make(material)
        except (ValueError, OSError) as error:  # what is missing or unusable; the other panels stand
            left_out[panel.title] = str(error)
            body = f'<p class="left-out">Left out: {text(error)}</p>'
        sections.append(section(panel.title, panel.explanation, body))
    output = Path(options.output)
    output.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(output, page(title, overview(material), sections).encode())
    print(f"{output}: {len(PANELS) - len(left_out)} of {len(PANELS)} panels, {output.stat().st_size / 1e6:.1f} MB")
    for name, reason in left_out.items():
        print(f"  left out: {name}: {reason}")
    return list(left_out)


# --- what the page is made of


@dataclass(frozen=True)
class Sources:
    """Files and folders by what they hold; None for what there is not.

    policies: name -> folder, in order of training. evaluations: judged answers about the held-out images, in order of rounds.
    """

    policies: dict[str, Path]
    scored: Path | None
    rescored: Path | None
    heldout_scored: Path | None
    heldout_rescored: Path | None
    judged: Path | None
    pairs: Path | None
    best_of_n: Path | None
    results: Path | None
    gallery: Path | None
    evaluations: tuple[Path, ...]


def find_sources(options: ReportOptions) -> Sources:
    """What was named, else what --run has."""
    run = Path(options.run) if options.run else None
    last = inspection.last_round(run) if run else None

    def find(named: str | None, folder: Path | None, name: str) -> Path | None:
        if named:
            return Path(named)
        return folder / name if folder and (folder / name).exists() else None

    policies = {}
    if options.policy:
        policies = {Path(options.policy).name: Path(options.policy)}
    elif run and last:
        rounds = [run / f"round-{number}" for number in range(1, int(last.name.removeprefix("round-")) + 1)]
        policies = {folder.name: folder / "policy" for folder in rounds if (folder / "policy").exists()}
    return Sources(
        policies=policies,
        scored=find(options.scored, last, "scored"),
        rescored=find(options.rescored, last, "rescored"),
        heldout_scored=find(options.heldout_scored, None, ""),
        heldout_rescored=find(options.heldout_rescored, None, ""),
        judged=find(options.judged, last, "judged"),
        pairs=find(options.pairs, last, "pairs"),
        best_of_n=find(options.best_of_n, run, "best_of_n/best_of_n.json"),
        results=find(None, run, "results.json"),
        gallery=find(None, run, "before-after.png"),
        evaluations=tuple(inspection.judged_evaluations(run)) if run else (),
    )


def need(path: Path | None, what: str, remedy: str) -> Path:
    if path is None:
        raise ValueError(f"no {what}; {remedy}")
    return path


class Material:
    """The tables of the page, each read once, when a panel asks for it. Raises ValueError with what would make a table."""

    def __init__(self, sources: Sources, options: ReportOptions) -> None:
        self.sources = sources
        self.options = options

    @cached_property
    def training_options(self) -> dict[str, Any]:
        """Of the last training run; empty where it left none."""
        return inspection.training_options(list(self.sources.policies.values())[-1]) if self.sources.policies else {}

    @property
    def beta(self) -> float:
        return self.options.beta if self.options.beta is not None else self.training_options.get("dpo_beta", 0.1)

    @cached_property
    def scorings(self) -> tuple[PreferenceDataset, PreferenceDataset]:
        scored = need(self.sources.scored, "scored pairs", f"made by {SCORING} with the policy before training (--scored)")
        remedy = f"made by {SCORING} with the trained policy and the flags that the pairs were scored with (--rescored)"
        rescored = need(self.sources.rescored, "pairs scored by the trained policy", remedy)
        return self._load(scored, rescored)

    def _load(self, scored: Path, rescored: Path) -> tuple[PreferenceDataset, PreferenceDataset]:
        names = parse_column_map(self.options.column_map)
        return inspection.load_scorings(scored, rescored, column_map=names, image_root=self.options.image_root)

    @cached_property
    def rewards(self) -> pd.DataFrame:
        return inspection.pair_rewards(*self.scorings, beta=self.beta)

    @cached_property
    def heldout_rewards(self) -> pd.DataFrame | None:
        scored, rescored = self.sources.heldout_scored, self.sources.heldout_rescored
        if scored is None or rescored is None:
            return None
        return inspection.pair_rewards(*self._load(scored, rescored), beta=self.beta)

    @cached_property
    def pair_rows(self) -> list[inspection.Row]:
        folder = need(self.sources.scored or self.sources.pairs, "pairs", "made by data/build_pairs.py (--pairs)")
        return inspection.read_rows(folder)

    @cached_property
    def claims(self) -> pd.DataFrame:
        folder = need(self.sources.judged, "judged answers", "made by data/score_claims.py (--judged)")
        return inspection.claim_table(inspection.read_rows(folder))

    @cached_property
    def moments(self) -> pd.DataFrame:
        return inspection.load_moments(need(self.sources.results, "results.json", "train/iterate.py writes it at its end (--run)"))

    @cached_property
    def adapter(self) -> PolicyAdapter:
        policy = need(next(reversed(self.sources.policies.values()), None), "tokenizer", "give the trained policy (--policy)")
        return inspection.load_scoring_adapter(need(self.sources.scored, "scored pairs", "--scored"), policy)


# --- panels


@dataclass(frozen=True)
class Panel:
    """make: the panel's HTML; raises ValueError or OSError when it cannot be made."""

    title: str
    explanation: str
    make: Callable[[Material], str]


def training(material: Material) -> str:
    if not material.sources.policies:
        raise ValueError("no training run; made by train/dpo.py (--policy)")
    made = []
    for name, folder in material.sources.policies.items():
        curves, evaluations = inspection.training_curves(folder), inspection.evaluation_curves(folder)
        drawn = {
            "evaluations": evaluations,
            "beta": material.beta,
            "start_loss": inspection.start_loss(inspection.training_options(folder)),
            "title": name,
        }
        alt = f"Training curves of {name}: loss from {curves.loss.iloc[0]:.3f} to {curves.loss.iloc[-1]:.3f}"
        made.append(picture(alt, figures.training_curves(curves, **drawn), figures.training_curves(curves, **drawn, columns=1)))
    return "".join(made)


def margin_histogram(material: Material) -> str:
    drawn = figures.margin_histogram(material.rewards, material.heldout_rewards)
    return picture(f"Histogram of margins, {inspection.share_below_zero(material.rewards):.1f} % below 0", drawn)


def reward_by_length(material: Material) -> str:
    rewards = material.rewards
    return picture("Rewards against tokens of the answer", figures.reward_by_length(rewards), figures.reward_by_length(rewards, columns=1))


def labeler(material: Material) -> str:
    found = inspection.confusion(material.claims)
    cells = [[row.Index, row.claims, row.accepted, row.rejected, f"{row.right:.1f}"] for row in found.itertuples()]
    pictures = [
        picture("P(yes) of claims against the share that is true", figures.labeler_reliability(material.claims)),
        picture("Accepted and rejected claims by kind", figures.labeler_confusion(material.claims)),
    ]
    return f'<div class="beside">{"".join(pictures)}</div>' + table(["claim", "claims", "accepted", "rejected", "right, %"], cells)


def pair_order(material: Material) -> str:
    orders = inspection.pair_orders(material.pair_rows)
    try:
        rewards = material.rewards
    except ValueError:
        rewards = None  # the panel of margins says why
    drawn = figures.pair_order(orders, rewards), figures.pair_order(orders, rewards, columns=1)
    counts = ", ".join(f"{name} {count}" for name, count in orders.order.value_counts().items())
    return picture(f"Order of {len(orders)} pairs against the truth: {counts}", *drawn)


def worst_pairs(material: Material) -> str:
    before, after = material.scorings
    worst = inspection.worst_pairs(material.rewards, material.options.max_pairs)
    shown = before.select(worst.index.tolist())
    tokens = inspection.token_rewards(shown, after, beta=material.beta)
    rewards = material.rewards.set_index(["position", "side"])
    try:
        adapter, missing = material.adapter, ""
    except (ValueError, OSError) as error:
        adapter, missing = None, f'<p class="left-out">Left out: rewards of tokens: {text(error)}</p>'
    cards = []
    for number, (position, margin) in enumerate(worst.items()):
        pair, row = shown[number], material.pair_rows[position]
        of_pair = None if adapter is None else inspection.pair_tokens(adapter, pair, tokens[tokens.position == number])
        sides = [side_html(side, pair, row, rewards.loc[position, side], of_pair) for side in inspection.SIDES]
        cards.append(
            f'<article><h3>margin {signed(margin)}, idx {text(pair.idx)}</h3><div class="pair">{thumbnail(pair.image)}<div>'
            f'<p class="question">{text(pair.question)}</p>{"".join(sides)}</div></div></article>'
        )
    return missing + "".join(cards)


def side_html(side: str, pair: PreferencePair, row: inspection.Row, reward: pd.Series, tokens: pd.DataFrame | None) -> str:
    """One answer of a pair: its claims with the labeler's verdicts, or its text, then its tokens."""
    heading = f"<h4>{side}: reward {signed(reward.reward_sum)}, {signed(reward.reward_mean, 4)} per token, {reward.tokens:.0f} tokens</h4>"
    claims = [claim_html(claim) for claim in inspection.claims_of(row, side)]
    answer = " ".join(claims) or text(pair.chosen if side == "chosen" else pair.rejected)
    return f'{heading}<p class="answer">{answer}</p>' + ("" if tokens is None else token_html(tokens, side))


def claim_html(claim: inspection.JudgedClaim) -> str:
    name = "span" if claim.accepted else "del"
    return f'<{name}>{text(claim.text)}</{name}> <span class="verdict">[{text(claim.verdict)}]</span>'


def token_html(tokens: pd.DataFrame, side: str) -> str:
    """Tokens as text, each over its reward's sign: one to three plus or minus signs by size, as deep a shade, the value in its title."""
    largest = tokens[~tokens.shared].reward.abs().max()
    spans, letters = ["<span>"], 0  # a line breaks between words; a word that has no end, as in Chinese, after some letters
    for token in tokens[tokens.side == side].itertuples():
        letters += len(token.text)
        if token.text[:1].isspace() or letters > WORD_LETTERS:
            spans.append("</span><span>")
            letters = len(token.text)
        level = 0 if token.shared or not largest > 0 else sum(abs(token.reward) >= part * largest for part in LEVELS)
        sign = ("+" if token.reward > 0 else "−") * level
        kind = "shared" if token.shared else f"{'up' if token.reward > 0 else 'down'}{level}" if level else "none"
        written = text(token.text.replace("\n", "↵")) or "·"
        spans.append(f'<span class="token {kind}" title="{signed(token.reward, 4)}">{written}<i>{sign or "&nbsp;"}</i></span>')
        if "\n" in token.text:
            spans.append("</span><br><span>")
            letters = 0
    return f'<p class="tokens">{"".join(spans)}</span></p>'


def hallucination(material: Material) -> str:
    moments = material.moments
    names = [name for name in figures.METRICS if name in moments]
    cells = [
        [row["moment"], row["decoding"], *(f"{row[name]:.1f} [{row[f'{name}_low']:.1f}, {row[f'{name}_high']:.1f}]" for name in names)]
        for _, row in moments.iterrows()
    ]
    drawn = picture("Hallucination against capability at every moment", figures.hallucination_capability(moments))
    return drawn + table(["moment", "decoding", *(figures.METRICS[name] for name in names)], cells)


def checkpoints(material: Material) -> str:
    results = need(material.sources.results, "results.json", "train/iterate.py writes it at its end (--run)")
    choices = inspection.load_choices(results)
    return picture("Checkpoints of every round", figures.checkpoint_choice(choices), figures.checkpoint_choice(choices, columns=1))


def best_of_n(material: Material) -> str:
    file = need(material.sources.best_of_n, "best_of_n.json", "made by eval/best_of_n.py on answers of several per prompt (--best_of_n)")
    points = inspection.best_of_n_table(json.loads(file.read_text()))
    return picture("Best of N by selector", figures.best_of_n(points), figures.best_of_n(points, columns=1))


def gallery(material: Material) -> str:
    """The tiny world's picture, where the truth marks what is wrong; else the answers with the labeler's verdicts."""
    if (file := material.sources.gallery) is not None:
        with Image.open(file) as image:
            shown = inline(encode(image, "PNG"), "png", "Held-out images with the answers before and after", image.width)
        return f'<div class="scroll">{shown}</div>'  # its letters would be too small on a phone
    folders = material.sources.evaluations
    if len(folders) < 2:
        raise ValueError("no answers about held-out images; train/iterate.py makes them with --heldout_images above 0 (--run)")
    first, last = (inspection.read_rows(folder) for folder in (folders[0], folders[-1]))
    prompts = load_prompts(folders[0])
    cards = []
    for number, (before, after) in enumerate(zip(first, last, strict=True)):
        if number == material.options.max_pairs:
            break
        if before["failure"] or after["failure"]:
            continue
        answers = [
            f'<h4>{name}</h4><p class="answer">{" ".join(map(claim_html, inspection.claims_of(row)))}</p>'
            for name, row in (("before", before), ("after", after))
        ]
        prompt = prompts[number]
        cards.append(
            f'<article><div class="pair">{thumbnail(prompt.image)}<div><p class="question">{text(prompt.question)}</p>'
            f"{''.join(answers)}</div></div></article>"
        )
    return "".join(cards)


PANELS = (
    Panel(
        "Training",
        "The loss starts at the dotted line, where the policy is its reference. When the rewards of both answers fall, the policy moves "
        "away from both (likelihood displacement): watch the log-probs of chosen.",
        training,
    ),
    Panel(
        "Margins",
        "Reward of chosen minus reward of rejected, per pair. Left of 0 the trained policy prefers the rejected answer.",
        margin_histogram,
    ),
    Panel(
        "Reward and length",
        "The reward is a sum over tokens, so longer answers have more room in either direction; the mean shows what is left of it.",
        reward_by_length,
    ),
    Panel(
        "The labeler against the truth",
        "How often claims are true where the labeler says P(yes) / (P(yes) + P(no)), and what it accepted of each kind.",
        labeler,
    ),
    Panel(
        "The order of pairs against the truth",
        "Right: chosen truly has fewer false claims. Wrong pairs with large margins are mistakes of the labeler that were learnt.",
        pair_order,
    ),
    Panel(
        "Pairs with the lowest margins",
        "Claims with the labeler's P(yes), rejected ones struck through. Below, every token over its reward: + made likelier by training, "
        "− less likely; once, twice, three times from a tenth, a third, two thirds of the pair's largest. Grey: the beginning that both "
        "answers share, which cancels in the margin.",
        worst_pairs,
    ),
    Panel(
        "Hallucination and capability",
        "On held-out images with 95 % intervals over images; down and to the right is better. Saying less lowers both.",
        hallucination,
    ),
    Panel(
        "Checkpoints",
        "What each round's next start was chosen from (ringed), measured on the choice images; a checkpoint that says too little is out.",
        checkpoints,
    ),
    Panel("Best of N", "What is gained by drawing N answers and keeping the one that a selector prefers.", best_of_n),
    Panel(
        "Before and after",
        "Held-out images with both answers; struck through is what the truth, or on own images the labeler, rejects.",
        gallery,
    ),
)


def overview(material: Material) -> str:
    """The main numbers, as far as there are any."""
    facts: list[list[Any]] = []
    given = material.options.beta is not None or "dpo_beta" in material.training_options
    facts.append(["beta", f"{material.beta:g}{'' if given else ' (assumed; give --beta)'}"])
    for numbers in (reward_numbers, labeler_numbers, result_numbers):
        try:
            facts += numbers(material)
        except (ValueError, OSError):
            continue  # its panel says why
    return table(["", ""], facts)


def reward_numbers(material: Material) -> Iterator[list[Any]]:
    found = inspection.margins(material.rewards)
    yield ["pairs", len(found)]
    yield ["mean margin", signed(found.mean())]
    yield ["margins below 0", f"{inspection.share_below_zero(material.rewards):.1f} %"]


def labeler_numbers(material: Material) -> Iterator[list[Any]]:
    claims = material.claims
    yield ["claims judged", len(claims)]
    yield ["claims accepted", f"{100 * claims.accepted.mean():.1f} %"]
    if "truth" in claims:
        asked = claims.dropna(subset="p_yes")
        right = 100 * (claims.accepted == claims.truth).mean()
        yield ["labeler: right, AUROC", f"{right:.1f} %, {inspection.auroc(asked.p_yes, asked.truth):.3f}"]


def result_numbers(material: Material) -> Iterator[list[Any]]:
    for decoding, line in material.moments.groupby("decoding", sort=False):
        for name in (name for plane in figures.PLANES for name in reversed(plane) if name in line):
            yield [f"{figures.METRICS[name]} ({decoding})", f"{line[name].iloc[0]:.1f} → {line[name].iloc[-1]:.1f}"]


# --- HTML


def text(value: Any) -> str:
    """Text of the data, escaped; marks that steer the direction or the terminal are named, since they would act on the page."""
    steering = ("Cc", "Cf", "Co", "Cs", "Zl", "Zp")
    shown = [
        f"<U+{ord(character):04X}>" if unicodedata.category(character) in steering and character not in KEPT_MARKS else character
        for character in str(value).replace("\r\n", "\n").replace("\t", " ")
    ]
    return html.escape("".join(shown))


def signed(value: float, digits: int = 3) -> str:
    """+0.123, with a true minus sign; what rounds to zero has none."""
    written = f"{value:+.{digits}f}".replace("-", "−")
    return written[1:] if float(written[1:]) == 0 else written


def table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """In a box of its own, which scrolls where the page is narrower. The first column names the row."""
    names = "".join(f'<th scope="col">{text(name)}</th>' for name in head)
    body = "".join(f'<tr><th scope="row">{text(row[0])}</th>{"".join(f"<td>{text(value)}</td>" for value in row[1:])}</tr>' for row in rows)
    return f'<div class="scroll"><table>{f"<thead><tr>{names}</tr></thead>" if any(head) else ""}<tbody>{body}</tbody></table></div>'


def picture(alt: str, wide: Figure, narrow: Figure | None = None) -> str:
    """A figure, and in its place on narrow pages another, whose panels stand one below the other."""
    shown = inline(figure_png(wide), "png", alt, round(96 * wide.get_size_inches()[0]))
    if narrow is None:
        return f"<figure>{shown}</figure>"
    source = f'<source media="screen and (max-width: 700px)" srcset="{data_address(figure_png(narrow), "png")}">'
    return f"<figure><picture>{source}{shown}</picture></figure>"


def figure_png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI)
    return buffer.getvalue()


def thumbnail(image: Image.Image) -> str:
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    return inline(encode(image, "JPEG"), "jpeg", "The image of the pair", None)


def encode(image: Image.Image, kind: str) -> bytes:
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, kind)
    return buffer.getvalue()


def inline(data: bytes, kind: str, alt: str, width: int | None) -> str:
    style = f' style="width:{width}px"' if width else ""
    return f'<img src="{data_address(data, kind)}" alt="{text(alt)}"{style}>'


def data_address(data: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def section(title: str, explanation: str, body: str) -> str:
    return f"<section><h2>{text(title)}</h2><p>{text(explanation)}</p>{body}</section>"


def page(title: str, summary: str, sections: Sequence[str]) -> str:
    # The policy lets nothing run and nothing load, whatever the data hold.
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><meta http-equiv="Content-Security-Policy" content="{policy}">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><title>{text(title)}</title><style>{CSS}</style></head>\n'
        f"<body><main><h1>{text(title)}</h1>{summary}\n" + "\n".join(sections) + "</main></body></html>\n"
    )


CSS = """
body { margin: 0; background: #fff; color: #1a1a1a; font: 16px/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
main { max-width: 72rem; margin: 0 auto; padding: 1rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.25rem; margin: 2.5rem 0 .3rem; border-top: 1px solid #ccc; padding-top: 1rem; }
h3 { font-size: 1rem; margin: 0 0 .5rem; } h4 { font-size: .9rem; margin: .9rem 0 .2rem; }
p { margin: .3rem 0 .8rem; max-width: 48rem; }
figure { margin: .5rem 0; } img { max-width: 100%; height: auto; }
.beside { display: flex; flex-wrap: wrap; gap: 1rem; align-items: flex-start; } .beside figure { max-width: 100%; }
.scroll { overflow-x: auto; max-width: 100%; } .scroll img { max-width: none; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .2rem .8rem .2rem 0; border-bottom: 1px solid #ddd; white-space: nowrap; font-weight: normal; }
th[scope=row] { white-space: normal; }
thead th { font-weight: bold; }
.left-out { color: #555; border-left: 4px solid #bbb; padding-left: .7rem; }
article { border: 1px solid #ccc; border-radius: 6px; padding: .8rem; margin: 1rem 0; }
.pair { display: flex; flex-wrap: wrap; gap: 1rem; } .pair > div { flex: 1 1 16rem; min-width: 0; }
.pair > img { width: 200px; align-self: flex-start; }
.question, .answer { unicode-bidi: isolate; white-space: pre-line; } .question { font-style: italic; }
del { color: #8c1d18; } .verdict { color: #555; font-size: .8rem; white-space: nowrap; }
.tokens { font: .85rem/1.2 ui-monospace, monospace; } .tokens > span { white-space: nowrap; }
.token { display: inline-block; max-width: 100%; white-space: pre-wrap; unicode-bidi: isolate; border-radius: 2px; vertical-align: top; }
.token i { display: block; font: bold .7rem/.8 ui-monospace, monospace; text-align: center; user-select: none; }
.shared { color: #767676; }
.up1 { background: #dcebf7; } .up2 { background: #b1d3ee; } .up3 { background: #7fb6e2; }
.down1 { background: #fde5d3; } .down2 { background: #fbc59d; } .down3 { background: #f59f63; }
@media print {
  main { max-width: none; padding: 0; } h2 { break-after: avoid; } figure, article, tr { break-inside: avoid; }
  .scroll { overflow: visible; } .scroll img { max-width: 100%; } th, td { white-space: normal; }
  * { -webkit-print-color-adjust: exact; print-color-adjust: exact; }
}
"""


if __name__ == "__main__":
    main()
