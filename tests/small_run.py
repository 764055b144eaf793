"""A run folder as train/iterate.py leaves it, made in a second: four pairs in the tiny world, log-probs of a random tiny policy."""

import json
import shutil
from pathlib import Path
from typing import Any

import datasets
from PIL import Image

from muffin.shapeworld.scenes import Scene, Thing, draw, encode_png
from tests.scored import scored_rows, write_rows
from tests.tiny import preference_rows

SCENE = Scene("standard", 0, (Thing("red", "circle", "at the top", "large"), Thing("blue", "cross", "on the left", "small")), seed=1)
TRUE, INVENTED = "At the top there is a red circle.", "On the right there is a green square."
COUNT, MISCOUNT = "The image shows two objects.", "The image shows three objects."
# Claims of chosen and of rejected. By the truth the order of the four is right, right, a tie, wrong.
ANSWERS = (((COUNT, TRUE), (COUNT, INVENTED)), ((TRUE,), (MISCOUNT,)), ((COUNT,), (TRUE,)), ((COUNT, INVENTED), (COUNT, TRUE)))
P_YES = {COUNT: 0.9, TRUE: 0.6, INVENTED: 0.25, MISCOUNT: 0.5}

BETA = 0.2
# What training adds to the log-prob of the first token of chosen and of rejected: margins 0.2 * (0.5 - -1.0) = 0.3, 0.1, 0, -0.4.
SHIFTS = ((0.5, -1.0), (0.5, 0.0), (0.0, 0.0), (-1.0, 1.0))


def write_run(folder: Path, model: Path, *, truth: bool = True, more: str = "") -> Path:
    """All that eval/report.py and the notebook read; returns `folder`.

    model: a tiny checkpoint, the policy before training. truth: rows carry their scene. more: text to add to the question, both answers
    and every claim.
    """
    last = folder / "round-1"
    scored, reference = scored_rows(model, _write_pairs(folder / "made" / "pairs.parquet", truth, more))
    write_rows(last / "scored", scored, reference)
    shifted = [_shifted(row, *shift) for row, shift in zip(scored, SHIFTS, strict=True)]
    write_rows(last / "rescored", shifted, reference | {"weights": "of the trained policy"})
    shutil.rmtree(folder / "made")

    last.joinpath("judged").mkdir()
    judged = [_judged(row, side) for row in scored for side in ("chosen", "rejected")]
    datasets.Dataset.from_list(judged).to_parquet(last / "judged" / "shard-00000-of-00001.parquet")

    shutil.copytree(model, last / "policy", ignore=shutil.ignore_patterns("*.safetensors"))
    steps = [{"step": step, "loss": 0.6931 - 0.1 * step, "rewards/margins": 0.3 * step} for step in range(3)]
    (last / "policy" / "trainer_state.json").write_text(json.dumps({"log_history": steps}))
    options = {"dpo_beta": BETA, "loss_type": "sigmoid", "sft_weight": 0.0}
    (last / "policy" / "options.json").write_text(json.dumps({"DPOArguments": options}))

    if truth:
        moments = {name: {"greedy": _measured(value)} for name, value in (("before", 40.0), ("after", 10.0))}
        measured = [{"name": name, "hallucination": 9.0 - n, "capability": 3.0} for n, name in enumerate(("start", "checkpoint-2"))]
        choice = {"chosen": "checkpoint-2", "hallucination": "rejected_share", "capability": "accepted_claims", "measured": measured}
        (folder / "results.json").write_text(json.dumps(moments | {"choice": {"round-1": choice}}))
        Image.new("RGB", (60, 40), "white").save(folder / "before-after.png")
    points = [{"value": value, "low": value - 1, "high": value + 1} for value in (5.0, 4.0)]
    (folder / "best_of_n").mkdir()
    curves = {name: {"words": points} for name in ("reward_mean", "random")}
    (folder / "best_of_n" / "best_of_n.json").write_text(json.dumps({"n": [1, 2], "curves": curves}))
    return folder


def _write_pairs(path: Path, truth: bool, more: str) -> Path:
    rows: list[dict[str, Any]] = []
    for row, sides in zip(preference_rows(len(ANSWERS)), ANSWERS, strict=True):
        row |= {"image": {"bytes": encode_png(draw(SCENE)), "path": None}, "question": f"Describe the image.{more}"}
        row |= {"scene": SCENE.to_json()} if truth else {}
        for side, claims in zip(("chosen", "rejected"), sides, strict=True):
            row[side] = " ".join(claims) + more
            row[f"{side}_claims"] = [claim + more for claim in claims]
            row[f"{side}_p_yes"] = [P_YES[claim] for claim in claims]
            row[f"{side}_p_no"] = [1 - P_YES[claim] for claim in claims]
        rows.append(row)
    path.parent.mkdir(parents=True)
    datasets.Dataset.from_list(rows).to_parquet(path)
    return path


def _shifted(row: dict[str, Any], chosen: float, rejected: float) -> dict[str, Any]:
    row = dict(row)
    for answer, shift in (("win", chosen), ("rej", rejected)):
        tokens = list(row[f"ref_{answer}_per_token_logp"])
        tokens[0] += shift
        values = {"logp": sum(tokens), "avg_logp": sum(tokens) / len(tokens), "per_token_logp": tokens}
        row |= {f"ref_{answer}_{name}": value for name, value in values.items()}
    return row


def _judged(row: dict[str, Any], side: str) -> dict[str, Any]:
    kept = {name: row[name] for name in ("image", "question", "idx", "scene") if name in row}
    return kept | {"answer": row[side]} | {name: row[f"{side}_{name}"] for name in ("claims", "p_yes", "p_no")}


def _measured(value: float) -> dict[str, Any]:
    names = ("chair_s", "chair_i", "recall", "claim_error", "words")
    return dict.fromkeys(names, value) | {f"{name}_interval": [value - 1, value + 1] for name in names}
