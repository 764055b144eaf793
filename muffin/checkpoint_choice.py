"""Which checkpoint of a round the next one starts from: the one that hallucinates least among those that still say enough.

The least hallucination alone would choose the policy that says least. So a checkpoint counts only if it keeps a share of what the round's
start can do; see `choose`.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

LABELER = "labeler"


@dataclass(frozen=True)
class Measure:
    """Two numbers of one result: hallucination (less is better) and capability (more is better), by their names in the result."""

    hallucination: str
    capability: str


# What may choose: the labeler's verdicts (eval/rejected_claims.py), or a part of eval/run_benchmarks.py.
MEASURES = {
    LABELER: Measure("rejected_share", "accepted_claims"),
    "chair": Measure("chair_s", "recall"),
    "objhal": Measure("chair_s_refined", "recall"),
    "amber": Measure("CHAIR", "Cover"),
    "mmhal": Measure("hallucination_rate", "informativeness"),
    "shapeworld_chair": Measure("chair_s", "recall"),
}


@dataclass(frozen=True)
class Measured:
    """A policy by its name, with its two numbers in the units of the measure."""

    name: str
    hallucination: float
    capability: float


def read_measured(name: str, file: Path, measure: str) -> Measured:
    """A policy's numbers out of a result file of eval/rejected_claims.py, or of benchmarks.json.

    Raises ValueError when the file does not hold the measure's numbers.
    """
    result: Mapping[str, Any] = json.loads(file.read_text())
    if measure != LABELER:
        result = result["results"].get(measure, {})
    wanted = MEASURES[measure]
    if missing := [number for number in (wanted.hallucination, wanted.capability) if result.get(number) is None]:
        raise ValueError(f"{file} holds no {missing[0]} of {measure}; choose the checkpoint by another measure, or run that benchmark")
    return Measured(name, float(result[wanted.hallucination]), float(result[wanted.capability]))


def choose(start: Measured, candidates: Sequence[Measured], min_capability: float) -> Measured:
    """The candidate (in the order of training) to go on with.

    Of those with capability >= min_capability * the start's: the one with the least hallucination, the more capable of equals, then the
    earlier. If none is that capable: the most capable one, the earlier of equals.

        start (50, 4.0), min 0.9; candidates a (40, 3.9), b (20, 3.6), c (5, 1.0)   ->   b
    """
    kept = [each for each in candidates if each.capability >= min_capability * start.capability]
    if kept:
        return min(kept, key=lambda each: (each.hallucination, -each.capability))  # the first of equals
    return max(candidates, key=lambda each: each.capability)


def doubt(start: Measured, chosen: Measured, min_capability: float) -> str | None:
    """What is wrong with going on from `chosen`, for a warning; None where it is better than the round's start."""
    if (chosen.hallucination, chosen.capability) == (start.hallucination, start.capability):
        return "measures exactly as the round's start: nothing visible was learnt; take more images, more steps or a higher learning rate"
    if chosen.capability < min_capability * start.capability:
        return f"is the most capable checkpoint and keeps less than {min_capability:g} of the start's capability: lower the learning rate"
    if chosen.hallucination >= start.hallucination:
        return f"hallucinates no less than the round's start ({chosen.hallucination:.2f}, start {start.hallucination:.2f})"
    return None
