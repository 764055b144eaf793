"""What a benchmark counted, image by image. Scores, their intervals and the differences between two policies all come from it.

    counts of N answers (N, M) --per image--> (I, M) --sums--> (M,) --formula--> {"accuracy": 0.87, ...}

A score is a function of sums of counts, its `Formula`; a bootstrap over images is that function of resampled sums. Results on disk carry
their counts, so two of them can be compared without the answers they were made from.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from muffin.hallucination import Estimate, percentile_interval, resample_sums, sum_per_image
from muffin.provenance import write_atomically

Formula = Callable[[np.ndarray], dict[str, np.ndarray]]  # sums (..., M) -> name: (...)


@dataclass(frozen=True)
class ImageCounts:
    """columns: M names of what was counted; images: I names; counts: (I, M)."""

    columns: tuple[str, ...]
    images: tuple[str, ...]
    counts: np.ndarray

    @classmethod
    def of_answers(cls, columns: Sequence[str], counts: np.ndarray, images: Sequence[str]) -> "ImageCounts":
        """Add up the counts (N, M) of the answers about each image; images: (N,) which one each answer is about."""
        return cls(tuple(columns), tuple(dict.fromkeys(images)), sum_per_image(counts, images))

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> "ImageCounts":
        """What `to_json` wrote."""
        return cls(tuple(content["columns"]), tuple(content["images"]), np.array(content["counts"], dtype=float))

    def to_json(self) -> dict[str, Any]:
        """JSON values: columns, images, and counts as one list per image."""
        return {"columns": list(self.columns), "images": list(self.images), "counts": self.counts.tolist()}

    @property
    def sums(self) -> np.ndarray:
        """(C,) counts over all images."""
        return self.counts.sum(axis=0)

    def only(self, images: Sequence[str]) -> "ImageCounts":
        """The counts of some of the images, in the order given."""
        place = {image: number for number, image in enumerate(self.images)}
        return ImageCounts(self.columns, tuple(images), self.counts[[place[image] for image in images]])


def estimate_counts(counts: ImageCounts, formula: Formula) -> dict[str, Estimate]:
    """Every number of the formula with its 95 % interval over images."""
    resampled = formula(resample_sums(counts.counts))
    return {name: Estimate(float(value), *percentile_interval(resampled[name])) for name, value in formula(counts.sums).items()}


def result_of(estimates: Mapping[str, Estimate], counts: ImageCounts) -> dict[str, Any]:
    """What every benchmark's JSON holds: the values by name, their intervals, and the counts behind them."""
    return {name: each.value for name, each in estimates.items()} | {
        "intervals": {name: [each.low, each.high] for name, each in estimates.items()},
        "intervals_over": f"{len(counts.images)} images",
        "per_image": counts.to_json(),
    }


def write_result(path: Path, result: Mapping[str, Any]) -> None:
    """JSON for people: one line per number, and per image."""
    text = json.dumps(result, indent=1, ensure_ascii=False)
    text = re.sub(r"\[\s+((?:[-\d.e]+,\s+)*[-\d.e]+)\s+\]", lambda match: "[" + re.sub(r"\s+", " ", match[1]) + "]", text)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, (text + "\n").encode())


@dataclass(frozen=True)
class Difference:
    """A number of two policies on the same images, and second - first with its 95 % interval over these images."""

    first: float
    second: float
    change: Estimate


def paired_differences(first: ImageCounts, second: ImageCounts, formula: Formula) -> dict[str, Difference]:
    """Differences of every number of the formula, on the images that both have; each resample draws the same images for both.

    Raises ValueError when the two were counted differently or have no image in common.
    """
    if first.columns != second.columns:
        raise ValueError(f"the results count different things: {', '.join(first.columns)} against {', '.join(second.columns)}")
    common = [image for image in first.images if image in set(second.images)]
    if not common:
        raise ValueError(
            f"the results have no image in common: the first is about {first.images[0]}, ..., the second about {second.images[0]}, ..."
        )
    first, second = first.only(common), second.only(common)
    columns = len(first.columns)
    resampled = resample_sums(np.concatenate([first.counts, second.counts], axis=1))
    changes = {name: values - formula(resampled[:, :columns])[name] for name, values in formula(resampled[:, columns:]).items()}
    before, after = formula(first.sums), formula(second.sums)
    return {
        name: Difference(
            float(before[name]),
            float(after[name]),
            Estimate(float(after[name] - before[name]), *percentile_interval(changes[name])),
        )
        for name in after
        if name in before
    }
