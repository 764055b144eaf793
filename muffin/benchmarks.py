"""What the results of the benchmarks mean: which numbers say that a policy hallucinates, which that it still can do something.

A policy that says little hallucinates little. So no hallucination number is shown without a capability number of the same answers beside
it. Two results are compared on the images that both have, if they were made by the same rules.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from muffin.amber import amber_scores
from muffin.chair import chair_scores
from muffin.image_counts import Difference, Formula, ImageCounts, paired_differences
from muffin.mmhal import mmhal_scores
from muffin.pope import pope_scores
from muffin.refomb import refomb_scores

Result = Mapping[str, Any]


@dataclass(frozen=True)
class Benchmark:
    """formula: its numbers from counts; hallucination, capability: those that tables show, where a result has them; digits: decimals."""

    formula: Formula
    hallucination: tuple[str, ...]
    capability: tuple[str, ...]
    digits: int


BENCHMARKS = {
    "pope": Benchmark(pope_scores, ("false_yes", "f1"), ("accuracy", "recall", "yes_ratio", "words"), 3),
    "amber": Benchmark(amber_scores, ("CHAIR", "Hal", "Cog", "score"), ("Cover", "words", "all accuracy", "all F1"), 1),
    "chair": Benchmark(chair_scores, ("chair_s", "chair_s_refined", "chair_i"), ("recall", "f1", "words"), 1),
    "mmhal": Benchmark(mmhal_scores, ("hallucination_rate",), ("score", "informativeness", "words"), 2),
    "refomb": Benchmark(
        refomb_scores, ("hall_win_rate", "hall_win_rate_swapped"), ("win_rate", "win_rate_swapped", "win_rate_balanced", "words"), 1
    ),
}


def read_result(path: str | Path) -> dict[str, Any]:
    """A result file of one of the benchmark recipes. Raises ValueError for any other file."""
    try:
        result = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is no result of a benchmark: {error}") from error
    if not isinstance(result, dict) or result.get("benchmark") not in BENCHMARKS or "per_image" not in result:
        raise ValueError(f"{path} is no result of a benchmark: want JSON that names one of {', '.join(BENCHMARKS)} and holds per_image")
    return result


def parts_of(name: str, result: Result) -> Iterable[tuple[str, Result]]:
    """A result, and the results of the kinds of questions in it, with their names."""
    yield name, result
    for kind, part in result.get("kinds", {}).items():
        yield f"{name} {kind}", part


def format_results(results: Mapping[str, Result]) -> str:
    """A line for every part of every result: its hallucination numbers, then its capability numbers, each with its 95 % interval."""
    rows = []
    for name, result in results.items():
        for title, part in parts_of(name, result):
            shown = BENCHMARKS[part["benchmark"]]
            cells = [
                [_cell(part, number, shown.digits) for number in numbers if number in part]
                for numbers in (shown.hallucination, shown.capability)
            ]
            rows.append((title, *("; ".join(numbers) or "-" for numbers in cells)))
    return format_columns(("benchmark", "hallucination", "capability, length"), rows)


def _cell(result: Result, number: str, digits: int) -> str:
    digits = min(digits, 1) if number == "words" else digits
    low, high = result["intervals"][number]
    return f"{number} {result[number]:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def compare_results(first: Mapping[str, Result], second: Mapping[str, Result]) -> dict[str, dict[str, Difference]]:
    """Paired differences, second - first, of every part that both have: {part: {number: Difference}}.

    Raises ValueError when there is none, or when a benchmark was scored by different rules.
    """
    found: dict[str, dict[str, Difference]] = {}
    for name in [name for name in first if name in second]:
        others = dict(parts_of(name, second[name]))
        for title, part in parts_of(name, first[name]):
            if title in others:
                found[title] = compare_parts(title, part, others[title])
    if not found:
        raise ValueError(f"no benchmark in common: the first has {', '.join(first) or 'none'}, the second {', '.join(second) or 'none'}")
    return found


def compare_parts(name: str, first: Result, second: Result) -> dict[str, Difference]:
    """Of one part. Numbers that either lacks are left out."""
    for key in ("benchmark", "rules"):
        if first.get(key) != second.get(key):
            raise ValueError(
                f"{name}: the first was scored with {key} {first.get(key)}, the second with {second.get(key)}; "
                "score both sets of answers in the same way"
            )
    counts = [ImageCounts.from_json(result["per_image"]) for result in (first, second)]
    differences = paired_differences(*counts, BENCHMARKS[first["benchmark"]].formula)
    return {number: each for number, each in differences.items() if number in first and number in second}


def format_comparison(differences: Mapping[str, Mapping[str, Difference]], benchmark_of: Mapping[str, str]) -> str:
    """A line for every number that tables show; * where the interval of the difference leaves out zero."""
    rows = []
    for title, numbers in differences.items():
        shown = BENCHMARKS[benchmark_of[title]]
        for number in (*shown.hallucination, *shown.capability):
            if number in numbers:
                each, digits = numbers[number], min(shown.digits, 1) if number == "words" else shown.digits
                sure = " *" if each.change.low > 0 or each.change.high < 0 else ""
                change = f"{each.change.value:+.{digits}f} [{each.change.low:+.{digits}f}, {each.change.high:+.{digits}f}]{sure}"
                rows.append((title, number, f"{each.first:.{digits}f}", f"{each.second:.{digits}f}", change))
    return format_columns(("benchmark", "number", "first", "second", "second - first, 95 % interval, same images"), rows)


def format_columns(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table that also reads well in a terminal."""
    widths = [max(len(row[column]) for row in (titles, *rows)) for column in range(len(titles))]
    lines = [titles, ["-" * width for width in widths], *rows]
    return "\n".join("| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |" for line in lines)
