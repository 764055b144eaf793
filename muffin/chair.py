"""CHAIR on COCO pictures (Rohrbach et al. 2018, arXiv:1809.02156), and Object HalBench's rule path: objects named against objects there.

    caption --lemmatizer--> words --Vocabulary.mentions--> [(seat, chair), (pup, dog)]  against the picture's {chair, person}

Scores depend on the lemmatizer, so every result names it:

    simple     plurals of known words by rules; needs nothing (muffin's own)
    chair      pattern.en.singularize, the original CHAIR
    rlaifv     WordNet lemmas as nouns, RLAIF-V's Object HalBench
    nltk-pos   WordNet lemmas by part of speech, in many later copies of CHAIR; makes a chair of "seated"
"""

import json
import re
from collections.abc import Callable, Collection, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from muffin.answers import Row, first_of
from muffin.hallucination import chair_ratios, divide
from muffin.image_counts import ImageCounts
from muffin.lemmas import Lemmatizer, pattern_singulars, simple_lemmas, wordnet_noun_lemmas, wordnet_pos_lemmas

COUNTS = ("captions", "with hallucination", "with objects", "hallucinated", "mentions", "covered", "present", "words")

# Words before an animal or a vehicle that would otherwise count as a person, and pairs that are no COCO object.
_ANIMALS = ("bird", "cat", "dog", "horse", "sheep", "cow", "elephant", "bear", "zebra", "giraffe", "animal", "cub")
_PAIRS = {
    **{f"{age} {animal}": animal for age in ("baby", "adult") for animal in _ANIMALS},
    "passenger jet": "jet",
    "passenger train": "train",
    "home plate": "home plate",
    "train track": "train track",
    "bow tie": "tie",
    "toilet seat": "toilet",
    "wine glas": "wine glass",  # what pattern makes of "wine glass"
}


@dataclass(frozen=True)
class Vocabulary:
    """Words that name objects. nodes: word -> object; pairs: two words in a row -> the word they count as."""

    nodes: Mapping[str, str]
    pairs: Mapping[str, str]

    @property
    def known(self) -> set[str]:
        """Every single word that takes part in naming an object."""
        return {part for words in (self.nodes, self.pairs) for word in words for part in word.split()}

    def merge(self, words: Sequence[str]) -> list[str]:
        """Words with pairs made one, from the left; a "seat" next to a "toilet" somewhere in the caption is dropped."""
        merged, position = [], 0
        while position < len(words):
            pair = " ".join(words[position : position + 2])
            merged.append(self.pairs.get(pair, words[position]))
            position += 2 if pair in self.pairs else 1
        return [word for word in merged if word != "seat"] if "toilet" in merged else merged

    def mentions(self, words: Sequence[str]) -> list[tuple[str, str]]:
        """(word, object) of every mention, in order, repetitions included."""
        return [(word, self.nodes[word]) for word in self.merge(words) if word in self.nodes]

    def objects(self, words: Sequence[str]) -> list[str]:
        """The objects that a caption's words name, in order and with repetitions."""
        return [node for _, node in self.mentions(words)]


def read_vocabulary(path: str | Path) -> Vocabulary:
    """Read CHAIR's synonyms file: a line per object, its name first, synonyms behind it, separated by commas.

    Two-word synonyms count as pairs. Raises ValueError when the file holds no line of this form.
    """
    nodes: dict[str, str] = {}
    for line in Path(path).read_text(encoding="utf-8").splitlines():
        words = [word.strip() for word in line.split(",") if word.strip()]
        if words:
            nodes |= dict.fromkeys(words, words[0])
    if not nodes:
        raise ValueError(f"--synonyms {path} is empty; want CHAIR's synonyms file, a line per object: person, girl, boy, man")
    return Vocabulary(nodes, {word: word for word in nodes if len(word.split()) == 2} | _PAIRS)


LEMMATIZERS: dict[str, Callable[[Vocabulary], Lemmatizer]] = {
    "simple": lambda vocabulary: simple_lemmas(vocabulary.known),
    "chair": lambda vocabulary: pattern_singulars(),
    "rlaifv": lambda vocabulary: wordnet_noun_lemmas(),
    "nltk-pos": lambda vocabulary: wordnet_pos_lemmas(),
}


def read_coco_truth(folder: str | Path, image_ids: Collection[int], vocabulary: Vocabulary, lemmas: Lemmatizer) -> dict[int, set[str]]:
    """Objects of COCO pictures: those segmented, and those that the captions of people name.

    folder: with instances_*.json and captions_*.json. Pictures that no file knows are left out.
    Raises ValueError when a kind of file is missing, or a category is in no line of the vocabulary.
    """
    truth: dict[int, set[str]] = {}
    wanted = set(image_ids)
    for annotations, categories in _coco_files(folder, "instances"):
        unknown = sorted(set(categories.values()).difference(vocabulary.nodes))
        if unknown:
            raise ValueError(f"--coco_annotations {folder}: the category {unknown[0]!r} is in no line of --synonyms")
        for annotation in annotations:
            if annotation["image_id"] in wanted:
                truth.setdefault(annotation["image_id"], set()).add(vocabulary.nodes[categories[annotation["category_id"]]])
    for annotations, _ in _coco_files(folder, "captions"):
        for annotation in annotations:
            if annotation["image_id"] in wanted:
                truth.setdefault(annotation["image_id"], set()).update(vocabulary.objects(lemmas(annotation["caption"])))
    return truth


def _coco_files(folder: str | Path, kind: str) -> Iterable[tuple[list[dict[str, Any]], dict[int, str]]]:
    files = sorted(Path(folder).glob(f"{kind}_*.json"))
    if not files:
        raise ValueError(f"--coco_annotations {folder}: found no {kind}_*.json; want COCO's annotation files, instances and captions")
    for file in files:
        content = json.loads(file.read_text(encoding="utf-8"))
        yield content["annotations"], {category["id"]: category["name"] for category in content.get("categories", [])}


def coco_id(row: Row, number: int) -> int:
    """image_id, or the number that a COCO file name ends in: COCO_val2014_000000310196.jpg -> 310196."""
    name = first_of(row, ("image_id", "image", "image_path", "question_id"))
    digits = re.search(r"(\d+)(?:\.\w+)?$", str(name))
    if digits is None:
        raise ValueError(f"--answers, row {number}: the image is {name!r}; want a COCO id in image_id, or a COCO file name in image")
    return int(digits[1])


def true_objects(
    rows: Sequence[Row],
    image_ids: Sequence[int],
    vocabulary: Vocabulary,
    lemmas: Lemmatizer,
    *,
    coco_annotations: str | None = None,
    truth: str | None = None,
) -> list[set[str]]:
    """What is in the picture of each row: by COCO's annotations, by a JSON file {image_id: [objects]}, or as stored with the rows.

    Raises ValueError, naming the first, for pictures that nobody knows.
    """
    if coco_annotations is not None:
        known = read_coco_truth(coco_annotations, image_ids, vocabulary, lemmas)
    elif truth is not None:
        stored = json.loads(Path(truth).read_text(encoding="utf-8"))
        known = {int(image_id): set(objects) for image_id, objects in stored.items()}
    else:
        known = {each: set(row["mscoco_gt_words"]) for each, row in zip(image_ids, rows, strict=True) if "mscoco_gt_words" in row}
    missing = [image_id for image_id in image_ids if image_id not in known]
    if missing:
        raise ValueError(
            f"{len(missing)} pictures have no true objects, the first is image_id {missing[0]}; "
            "give --coco_annotations or --truth that has them"
        )
    return [known[image_id] for image_id in image_ids]


def caption_values(objects: Sequence[Hashable], truth: Collection[Hashable]) -> dict[str, float]:
    """CHAIR of one caption as CHAIR's script stores it: CHAIRs 0 or 1, CHAIRi and Recall as fractions, 0 where undefined."""
    ratios = chair_ratios([objects], [truth])
    return {
        "CHAIRs": int(ratios["chair_s"].numerators[0]),
        "CHAIRi": ratios["chair_i"].value / 100,
        "Recall": ratios["recall"].value / 100,
    }


def count_captions(
    objects: Sequence[Sequence[Hashable]], truth: Sequence[Collection[Hashable]], captions: Sequence[str], images: Sequence[str]
) -> ImageCounts:
    """COUNTS of N captions."""
    ratios = chair_ratios(objects, truth)
    wrong, mentions = ratios["chair_i"].numerators, ratios["chair_i"].denominators
    words = [len(caption.split()) for caption in captions]
    columns = [np.ones(len(captions)), wrong > 0, mentions > 0, wrong, mentions, ratios["recall"].numerators, ratios["recall"].denominators]
    return ImageCounts.of_answers(COUNTS, np.stack([*columns, words], axis=1).astype(float), images)


def chair_scores(sums: np.ndarray) -> dict[str, np.ndarray]:
    """CHAIR, in percent, of sums (..., 8) of COUNTS.

    chair_s, chair_i, recall: see `chair_ratios`. chair_s_refined: of the captions that name an object, those with a hallucinated one,
    RLAIF-V's response-level number. f1: 2 R C / (R + C) of recall R and C = 1 - chair_i, RLAIF-V's object F1. words: per caption.
    """
    captions, bad, naming, wrong, mentions, covered, present, words = np.moveaxis(np.asarray(sums), -1, 0)
    correct, recall = divide(mentions - wrong, mentions), divide(covered, present)
    return {
        "chair_s": 100 * divide(bad, captions),
        "chair_i": 100 * divide(wrong, mentions),
        "recall": 100 * recall,
        "chair_s_refined": 100 * divide(bad, naming),
        "f1": 100 * divide(2 * recall * correct, recall + correct),
        "words": divide(words, captions),
    }
