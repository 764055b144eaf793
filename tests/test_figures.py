"""Figures say what the tables say: lines, bars and words are read back from the Figure."""

import ast
import io
import math

import numpy as np
import pandas as pd
import pytest
from matplotlib import colors
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import PathPatch, Rectangle
from PIL import Image

from muffin import figures
from muffin.inspection import JudgedClaim
from tests.conftest import ROOT

PICTURE = Image.new("RGB", (40, 30), "red")


def check_drawing(figure: Figure) -> None:
    """The figure can be drawn, and something is on it."""
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=40)
    assert np.asarray(Image.open(picture).convert("L")).std() > 5


def words(figure: Figure) -> str:
    texts = [text.get_text() for text in figure.findobj(lambda each: hasattr(each, "get_text"))]
    return "\n".join([*texts, *(text for axes in figure.axes for text in written(axes))])


def written(axes: Axes) -> dict[str, tuple[float, float, float, tuple]]:
    """Text that is drawn as an outline -> its left and right end, its middle and its colour; of equal texts the last."""
    found = {}
    for patch in axes.patches:
        if isinstance(patch, PathPatch) and patch.get_gid():
            box = patch.get_path().get_extents()
            found[patch.get_gid()] = (box.x0, box.x1, (box.y0 + box.y1) / 2, patch.get_facecolor())
    return found


def rewards(margins: list[float], tokens: int = 4) -> pd.DataFrame:
    """Rewards of +-margin / 2, every chosen answer one token longer than the last."""
    rows = []
    for position, margin in enumerate(margins):
        for side, sign in (("chosen", 0.5), ("rejected", -0.5)):
            row = {"position": position, "idx": position, "side": side, "tokens": tokens + position, "reward_sum": sign * margin}
            rows.append(row | {"reward_mean": sign * margin / (tokens + position), "margin": margin})
    return pd.DataFrame(rows)


def test_figures_are_made_without_global_state():
    tree = ast.parse((ROOT / "muffin" / "figures.py").read_text())
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    imported |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert "matplotlib.figure" in imported and not any("pyplot" in name for name in imported)


def test_training_curves_start_at_ln_2_and_show_the_start_of_the_log_probs():
    curves = pd.DataFrame(
        {
            "loss": [0.69, 0.5],
            "rewards/chosen": [0.0, -0.2],
            "rewards/rejected": [0.0, -0.6],
            "rewards/margins": [0.0, 0.4],
            "rewards/accuracies": [0.0, 0.75],
            "logps/chosen": [-10.0, -14.0],
            "logps/rejected": [-11.0, -15.0],
        },
        index=[1, 2],
    )
    held_out = pd.DataFrame({"loss": [0.6], "rewards/accuracies": [0.5]}, index=[2])
    figure = figures.training_curves(curves, held_out, beta=0.1, title="a run")
    loss, accuracy, _, reward, logps, weight = figure.axes
    assert [line.get_ydata()[0] for line in loss.lines] == pytest.approx([0.69, 0.6, math.log(2)])
    assert list(accuracy.lines[0].get_ydata()) == [0.0, 75.0]
    lines = {line.get_label(): line for line in logps.lines}
    assert list(lines["chosen"].get_ydata()) == [-10.0, -14.0]
    assert list(lines["chosen, at the start"].get_ydata()) == pytest.approx([-10.0, -12.0])  # -14 - -0.2 / 0.1: what fell, fell by 2
    assert list(lines["rejected, at the start"].get_ydata()) == pytest.approx([-11.0, -9.0])
    chosen, rejected = reward.lines[:2]
    assert chosen.get_marker() != rejected.get_marker() and chosen.get_linestyle() != rejected.get_linestyle()
    assert not weight.axison and "a run" in words(figure)  # what was not logged leaves no empty panel
    assert len(figures.training_curves(curves, beta=0.1, start_loss=None).axes[0].lines) == 1


def test_margins_say_the_share_below_zero():
    figure = figures.margin_histogram(rewards([-1.0, 0.5, 2.0, 3.0]), rewards([-1.0, -2.0]))
    assert "train: 4 pairs, 25.0 % below 0, median +1.25" in words(figure)
    assert "held out: 2 pairs, 100.0 % below 0" in words(figure)
    bars = figure.axes[0].patches
    train = [bar for bar in bars if bar.__class__.__name__ == "Rectangle"]
    assert sum(bar.get_height() for bar in train) == pytest.approx(100)
    assert sum(bar.get_height() for bar in train if bar.get_x() + bar.get_width() / 2 < 0) == pytest.approx(25)
    assert "held out" not in words(figures.margin_histogram(rewards([0.0])))


def test_reward_by_length_has_a_point_per_answer():
    figure = figures.reward_by_length(rewards([1.0, 2.0, 3.0]))
    summed, mean = figure.axes
    chosen, rejected = summed.collections
    assert np.asarray(chosen.get_offsets()).tolist() == [[4, 0.5], [5, 1.0], [6, 1.5]]
    assert np.asarray(rejected.get_offsets())[:, 1].tolist() == [-0.5, -1.0, -1.5]
    assert np.asarray(mean.collections[0].get_offsets())[:, 1].tolist() == pytest.approx([0.125, 0.2, 0.25])
    assert "chosen, r = +1.00" in words(figure) and "rejected, r = -1.00" in words(figure)
    assert "r = –" in words(figures.reward_by_length(rewards([1.0])))  # one point has no correlation
    assert chosen.get_paths()[0].vertices.shape != rejected.get_paths()[0].vertices.shape  # circles and crosses


def test_token_bars_point_where_the_reward_goes():
    rows = [
        {"side": "chosen", "token": 0, "text": "The", "shared": True, "reward": 5.0},
        {"side": "chosen", "token": 1, "text": " cat", "shared": False, "reward": 0.5},
        {"side": "rejected", "token": 0, "text": "The", "shared": True, "reward": 5.0},
        {"side": "rejected", "token": 1, "text": " dog\n$x", "shared": False, "reward": -1.0},
    ]
    figure = figures.token_rewards(PICTURE, pd.DataFrame(rows), "idx 3")
    page = figure.axes[1]
    up, down, rest = (patch for patch in page.patches if isinstance(patch, Rectangle))  # none for what is shared
    assert rest.get_height() == down.get_height()  # the part of a token after its line break
    assert page.yaxis_inverted()  # inches from the top
    assert up.get_height() == pytest.approx(-0.0425) and down.get_height() == pytest.approx(0.085)  # half and full, up and down
    assert up.get_facecolor() == colors.to_rgba("#0072b2") and down.get_facecolor() == colors.to_rgba("#d55e00")
    found = written(page)
    assert up.get_y() + up.get_height() < up.get_y() < found[" cat"][2]  # the bar stands above its token
    assert down.get_y() > found[" dog"][2]
    left, right, _, _ = found[" cat"]  # after "The", below its bar: letters of width 1 from the fifth on
    assert (left, right) == pytest.approx((4, 7), abs=0.2)
    assert (up.get_x() + up.get_width() / 2) == pytest.approx((left + right) / 2, abs=0.2)
    assert found["The"][3] == colors.to_rgba(figures.LIGHT) and found[" cat"][3] == colors.to_rgba("black")
    assert "chosen: reward +5.500" in words(figure) and "a full bar is 1.000" in words(figure) and "$x" in words(figure)
    check_drawing(figure)


def test_long_and_strange_texts_are_wrapped():
    rows = [
        {"side": side, "token": t, "text": f" w{t}" * 3, "shared": False, "reward": 0.0}
        for side in ("chosen", "rejected")
        for t in range(60)
    ]
    rows.append({"side": "rejected", "token": 60, "text": "x" * 200 + "\u202e\x00", "shared": False, "reward": 0.0})
    figure = figures.token_rewards(PICTURE, pd.DataFrame(rows), "long " * 60)
    for text, (_, right, _, _) in written(figure.axes[1]).items():
        assert right <= figures.COLUMNS and text.isprintable()
    assert "x" * figures.COLUMNS in words(figure) and "w59" in words(figure)
    check_drawing(figure)


def test_rejected_claims_are_struck_through():
    claims = [JudgedClaim("A cat.", 0.9), JudgedClaim("Two dogs.", 0.125), JudgedClaim("Odd", None)]
    figure = figures.judged_pair(PICTURE, {"chosen": claims, "rejected": "As it stands."}, "What is this?")
    page = figure.axes[1]
    struck = {line.get_ydata()[0] for line in page.lines}
    assert len(page.lines) == 3 and len(struck) == 1  # Two, dogs., Odd
    assert [line.get_xdata()[0] for line in page.lines] == [14, 18, 31]  # "A cat. [0.90] " has 14 characters
    assert "[0.12]" in words(figure) and "[not asked]" in words(figure) and "stands." in words(figure)
    check_drawing(figure)


CLAIMS = pd.DataFrame(
    {
        "p_yes": [0.9, 0.8, 0.3, 0.1],
        "accepted": [True, True, False, False],
        "truth": [True, False, True, False],
        "kind": ["object, true", "object, invented", "object, true", "count, wrong"],
    }
)


def test_labeler():
    figure = figures.labeler_reliability(CLAIMS)
    assert "AUROC 0.750" in words(figure)  # of (0.9, 0.3) against (0.8, 0.1): 3 of 4 in order
    assert [bar.get_height() for bar in figure.axes[1].patches] == [1, 1, 1, 1]
    check_drawing(figure)
    figure = figures.labeler_confusion(CLAIMS)
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["count, wrong", "object, invented", "object, true"]
    accepted, rejected = figure.axes[0].containers
    assert [bar.get_width() for bar in accepted] == [0, 1, 1] and [bar.get_width() for bar in rejected] == [1, 0, 1]
    assert rejected[0].get_hatch() and not accepted[0].get_hatch()
    assert " 50 % right" in words(figure)
    with pytest.raises(ValueError, match="no column `scene`"):
        figures.labeler_confusion(CLAIMS.drop(columns=["truth", "kind"]))


def test_pair_order():
    orders = pd.DataFrame({"order": ["right", "right", "tie", "right"]}).rename_axis("position")
    figure = figures.pair_order(orders, rewards([1.0, -1.0, 0.5, 2.0]))
    assert [bar.get_height() for bar in figure.axes[0].patches] == [75, 25, 0]
    medians = [line.get_ydata()[0] for line in figure.axes[1].lines if line.get_color() == "black" and len(line.get_ydata()) == 2]
    assert 1.0 in medians and 0.5 in medians  # medians of (1, -1, 2) and of (0.5)
    assert len(figures.pair_order(orders).axes) == 1


def test_checkpoints_of_rounds():
    names = {"hallucination_name": "rejected_share", "capability_name": "accepted_claims"}
    points = [("round-1", "start", 50.0, 4.0), ("round-1", "checkpoint-5", 20.0, 3.8), ("round-1", "checkpoint-10", 5.0, 1.0)]
    points += [("round-2", "start", 20.0, 3.8), ("round-2", "checkpoint-5", 10.0, 3.9)]
    choices = pd.DataFrame(
        [
            {"round": number, "name": name, "hallucination": y, "capability": x, "chosen": name == "checkpoint-5"} | names
            for number, name, y, x in points
        ]
    )
    figure = figures.checkpoint_choice(choices)
    candidates, start, chosen = figure.axes[0].lines
    assert list(candidates.get_xdata()) == [3.8, 1.0] and list(candidates.get_ydata()) == [20.0, 5.0]
    assert list(start.get_ydata()) == [50.0] and list(chosen.get_ydata()) == [20.0]
    assert len({candidates.get_marker(), start.get_marker()}) == 2 and chosen.get_fillstyle() == "none"
    assert all(label in words(figure) for label in ("start", "5", "10"))
    same = figures.checkpoint_choice(choices.assign(capability=1.0, hallucination=2.0))
    assert "start, 5, 10" in words(same)  # points at one place share their label
    check_drawing(figure)


def test_hallucination_by_the_labeler_where_there_is_no_truth():
    row = {name: 2.0 for metric in ("accepted_claims", "rejected_share") for name in (metric, f"{metric}_low", f"{metric}_high")}
    figure = figures.hallucination_capability(pd.DataFrame([{"moment": "before", "decoding": "greedy"} | row]))
    assert figure.axes[0].get_xlabel() == "accepted claims per answer"


def test_hallucination_against_recall():
    moments = pd.DataFrame(
        [
            {"moment": moment, "decoding": decoding, "chair_s": x, "chair_s_low": x - 1, "chair_s_high": x + 2}
            | {"recall": 80.0, "recall_low": 79.0, "recall_high": 82.0}
            for moment, x in (("before", 40.0), ("after", 10.0))
            for decoding in ("greedy", "t1")
        ]
    )
    figure = figures.hallucination_capability(moments)
    greedy, sampled = (container.lines[0] for container in figure.axes[0].containers)
    assert list(greedy.get_ydata()) == [40.0, 10.0] and list(greedy.get_xdata()) == [80.0, 80.0]
    assert greedy.get_marker() != sampled.get_marker()
    assert "0 before" in words(figure) and "1 after" in words(figure)
    check_drawing(figure)


def test_best_of_n_draws_every_selector_apart():
    names = ["reward_mean", "reward_sum", "policy_mean_logp", "random", "oracle"]
    table = pd.DataFrame(
        [
            {"selector": name, "metric": metric, "n": n, "value": n + k, "low": 0.0, "high": 9.0}
            for k, name in enumerate(names)
            for metric in ("words", "quality")
            for n in (1, 2, 4)
        ]
    )
    figure = figures.best_of_n(table, "three prompts")
    lines = figure.axes[0].lines
    assert [list(line.get_ydata()) for line in lines] == [[1 + k, 2 + k, 4 + k] for k in range(5)]
    assert len({line.get_marker() for line in lines}) == 5
    assert [axes.get_title() for axes in figure.axes] == ["words per answer", "quality"]
    check_drawing(figure)
