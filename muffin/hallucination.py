"""How much a policy hallucinates: CHAIR from mentioned and true objects, wrong claims, length, and bootstrap intervals over images.

CHAIR (Rohrbach et al. 2018, arXiv:1809.02156) counts mentions: an object named twice counts twice. Every metric here is a `Ratio` of
two per-image counts, so that an interval can resample images. What an object is (a COCO category, a coloured shape) is the caller's
business: anything hashable.
"""

from collections.abc import Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

RESAMPLES = 2000
_RESAMPLES_AT_ONCE = 256


@dataclass(frozen=True)
class Estimate:
    """A number and its 95 % interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Ratio:
    """scale * sum(numerators) / sum(denominators), both (N,), one entry per answer; scale 100 makes percent.

    A ratio whose denominators sum to zero is 0: a policy that names nothing hallucinates nothing.
    """

    numerators: np.ndarray
    denominators: np.ndarray
    scale: float = 100.0

    @property
    def value(self) -> float:
        """scale * (sum of numerators) / (sum of denominators); 0 where the latter is 0."""
        return self.scale * float(divide(self.numerators.sum(), self.denominators.sum()))

    def per_image(self, images: Sequence[Hashable]) -> "Ratio":
        """Add up the answers of each image; `images` (N,) names the image of every answer.

        Answers to one image are not independent: intervals resample images, so several answers per image must be added up first.
        """
        return Ratio(*sum_per_image(np.stack([self.numerators, self.denominators], axis=1), images).T, scale=self.scale)

    def interval(self, n_resamples: int = RESAMPLES, seed: int = 0, level: float = 0.95) -> tuple[float, float]:
        """Bootstrap interval of `value`, see `bootstrap_interval`."""
        low, high = bootstrap_interval(self.numerators, self.denominators, n_resamples=n_resamples, seed=seed, level=level)
        return self.scale * low, self.scale * high


def sum_per_image(counts: np.ndarray, images: Sequence[Hashable]) -> np.ndarray:
    """Counts (N, M) of N answers -> (images, M): the sums of each image's answers, images in order of first appearance."""
    if len(images) != len(counts):
        raise ValueError(f"{len(images)} image names for {len(counts)} answers; give one name per answer")
    order = {image: number for number, image in enumerate(dict.fromkeys(images))}
    sums = np.zeros((len(order), counts.shape[1]))
    np.add.at(sums, [order[image] for image in images], counts)
    return sums


def resample_sums(counts: np.ndarray, n_resamples: int = RESAMPLES, seed: int = 0) -> np.ndarray:
    """Sums over images of counts (N, M), for resamples of whole images with replacement: (n_resamples, M).

    A number that is a function of sums of counts has as bootstrap distribution that function of the rows.
    """
    rng = np.random.default_rng(seed)
    images = len(counts)
    sums = []
    for start in range(0, n_resamples, _RESAMPLES_AT_ONCE):
        drawn = rng.multinomial(images, np.full(images, 1 / images), size=min(_RESAMPLES_AT_ONCE, n_resamples - start))
        sums.append(drawn @ np.asarray(counts, float))
    return np.concatenate(sums)


def percentile_interval(values: np.ndarray, level: float = 0.95) -> tuple[float, float]:
    """The central `level` of bootstrap values (n_resamples,)."""
    low, high = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def bootstrap_interval(
    numerators: np.ndarray, denominators: np.ndarray, *, n_resamples: int = RESAMPLES, seed: int = 0, level: float = 0.95
) -> tuple[float, float]:
    """Percentile bootstrap interval of sum(numerators) / sum(denominators).

    Whole images are resampled with replacement: numerators and denominators are (N,), entry i of both belongs to image i (ones as
    denominators make it the mean of per-image values). Raises ValueError for no images or for arrays of different length.
    """
    if len(numerators) != len(denominators) or len(numerators) == 0:
        raise ValueError(
            f"{len(numerators)} numerators and {len(denominators)} denominators; need one of each per image, of 1 image or more"
        )
    sums = resample_sums(np.stack([numerators, denominators], axis=1), n_resamples, seed)
    return percentile_interval(divide(sums[:, 0], sums[:, 1]), level)


def estimate(ratios: Mapping[str, Ratio], images: Sequence[Hashable]) -> dict[str, Estimate]:
    """Values of ratios over N answers, with intervals that resample the images (N names) the answers are about."""
    return {name: Estimate(ratio.value, *ratio.per_image(images).interval()) for name, ratio in ratios.items()}


def format_table(title: str, estimates: Mapping[str, Estimate], digits: int) -> str:
    """One line per number: name, value, 95 % interval."""
    width = max(map(len, estimates))
    lines = [f"{name:<{width}}  {e.value:9.{digits}f}   [{e.low:.{digits}f}, {e.high:.{digits}f}]" for name, e in estimates.items()]
    return "\n".join([title, *lines])


def chair_ratios(mentioned: Sequence[Sequence[Hashable]], true: Sequence[Collection[Hashable]]) -> dict[str, Ratio]:
    """CHAIR of N captions: the objects each mentions (with repetitions) against the objects truly in its image.

    chair_i: hallucinated mentions / mentions. chair_s: captions with a hallucinated mention / captions (empty captions count).
    recall: distinct true objects mentioned / distinct true objects.

        mentioned [[cat, dog, dog], []]   true [{cat}, {car, cat}]   ->   chair_i 2/3, chair_s 1/2, recall 1/3
    """
    mentions, hallucinated, covered, present = [], [], [], []
    for named, objects in zip(mentioned, true, strict=True):
        objects = set(objects)
        mentions.append(len(named))
        hallucinated.append(sum(name not in objects for name in named))
        covered.append(len(objects & set(named)))
        present.append(len(objects))
    wrong = np.array(hallucinated, dtype=float)
    return {
        "chair_s": Ratio((wrong > 0).astype(float), np.ones(len(wrong))),
        "chair_i": Ratio(wrong, np.array(mentions, dtype=float)),
        "recall": Ratio(np.array(covered, dtype=float), np.array(present, dtype=float)),
    }


def wrong_claims(truths: Sequence[Sequence[bool]]) -> Ratio:
    """Share of false claims; `truths` holds one list per answer with the truth of each of its claims."""
    return Ratio(
        np.array([sum(not truth for truth in claims) for claims in truths], float), np.array([len(claims) for claims in truths], float)
    )


def claim_ratios(accepted: Sequence[Sequence[bool]]) -> dict[str, Ratio]:
    """What a labeler thinks of N answers; `accepted` holds one list per answer with what became of each of its claims.

    rejected_claims, accepted_claims: a number per answer. rejected_share: percent of the claims; rejected_answers: percent of the answers.
    Answers without claims count in what is per answer.

        [[yes, no, no], [yes], []]   ->   rejected_claims 2/3, accepted_claims 2/3, rejected_share 2/4, rejected_answers 1/3
    """
    ones = np.ones(len(accepted))
    rejections = wrong_claims(accepted)
    return {
        "rejected_claims": Ratio(rejections.numerators, ones, scale=1.0),
        "accepted_claims": Ratio(rejections.denominators - rejections.numerators, ones, scale=1.0),
        "rejected_share": rejections,
        "rejected_answers": Ratio((rejections.numerators > 0).astype(float), ones),
    }


def mean_words(answers: Sequence[str]) -> Ratio:
    """Words per answer, split at white space."""
    return Ratio(np.array([len(answer.split()) for answer in answers], float), np.ones(len(answers)), scale=1.0)


def divide(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    """numerator / denominator, entry by entry, 0 where the denominator is 0."""
    return np.divide(numerator, denominator, out=np.zeros(np.shape(numerator)), where=np.asarray(denominator) != 0)
