"""CHAIR: objects that captions invent, objects that they cover, words; with 95 % intervals over images.

    python eval/chair.py --answers answers/ --synonyms synonyms.txt --coco_annotations annotations/ --output chair.json

Answers of a policy: data/generate_responses.py --num_answers 1 --temperature 0 on the pictures. Answers made elsewhere: JSON lines with
image_id (a COCO id, or a COCO file name in `image` or `image_path`) and caption, answer or text; CHAIR's own JSON files. A picture may have
several captions.

What is in a picture comes from --coco_annotations (instances_*.json and captions_*.json), from --truth (JSON: {image_id: [objects]}),
or stands with the answers, as in CHAIR's output (mscoco_gt_words). Rows of shapeworld (column `scene`) bring vocabulary and truth with
them and need neither file. `--lemmatizer stored` takes the words that stand with the answers (column `words`). Captions that CHAIR's own
script has scored bring its objects: the result then says how far every lemmatizer agrees with them. Objects listed by a judge:
eval/object_halbench.py.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from transformers import HfArgumentParser

from muffin.answers import Row, answer_text, read_rows
from muffin.chair import (
    LEMMATIZERS,
    Vocabulary,
    caption_values,
    chair_scores,
    coco_id,
    count_captions,
    read_vocabulary,
    true_objects,
)
from muffin.hallucination import format_table
from muffin.image_counts import estimate_counts, result_of, write_result
from muffin.lemmas import MissingResource
from muffin.shapeworld.claims import mentioned_objects
from muffin.shapeworld.scenes import Scene


@dataclass
class ChairOptions:
    answers: str = field(metadata={"help": "Captions: folder of data/generate_responses.py, or a JSON-lines, JSON or Parquet file."})
    output: str = field(metadata={"help": "JSON file for the result."})
    synonyms: str | None = field(default=None, metadata={"help": "CHAIR's synonyms file; not needed for shapeworld."})
    coco_annotations: str | None = field(default=None, metadata={"help": "Folder of COCO's instances_*.json and captions_*.json."})
    truth: str | None = field(default=None, metadata={"help": "JSON file {image_id: [objects]}, in place of --coco_annotations."})
    lemmatizer: Literal["simple", "chair", "rlaifv", "nltk-pos", "stored"] = field(
        default="simple",
        metadata={"help": "How words are reduced: muffin's rules, the original CHAIR, RLAIF-V, by part of speech, or the stored words."},
    )

    def __post_init__(self) -> None:
        if self.coco_annotations is not None and self.truth is not None:
            raise ValueError(f"--coco_annotations {self.coco_annotations} and --truth {self.truth} both say what is there; give one")


OPTIONS = (ChairOptions,)


@dataclass(frozen=True)
class Captions:
    """N captions. images: their names; objects: what each mentions, in order; truth: what is in each picture; words: rule, in words."""

    images: Sequence[str]
    objects: Sequence[Sequence[Any]]
    truth: Sequence[set[Any]]
    lemmatizer: str


def main(argv: list[str] | None = None) -> dict[str, Any]:
    (options,) = HfArgumentParser(OPTIONS).parse_args_into_dataclasses(args=argv, look_for_args_file=False)
    rows = read_rows(options.answers, "--answers")
    texts = [answer_text(row, f"--answers, row {number}") for number, row in enumerate(rows)]
    captions = shapeworld_captions(rows, texts) if "scene" in rows[0] else coco_captions(rows, texts, options)

    counts = count_captions(captions.objects, captions.truth, texts, captions.images)
    estimates = estimate_counts(counts, chair_scores)
    result = {"benchmark": "chair", "captions": len(texts), "rules": {"lemmatizer": captions.lemmatizer}} | result_of(estimates, counts)
    print(format_table(f"CHAIR: {len(texts)} captions, lemmatizer {captions.lemmatizer}", estimates, 2))
    if all("mscoco_generated_words" in row for row in rows):
        result["agreement"] = agreement(rows, texts, read_vocabulary(options.synonyms))
    result["per_caption"] = [
        {"image": image, "objects": objects, "truth": sorted(truth), **caption_values(objects, truth)}
        for image, objects, truth in zip(captions.images, captions.objects, captions.truth, strict=True)
    ]
    write_result(Path(options.output), result)
    return result


def agreement(rows: list[Row], texts: list[str], vocabulary: Vocabulary) -> dict[str, Any]:
    """How far each lemmatizer gives the objects that CHAIR's own script stored with the captions; why not, where it cannot run here."""
    found: dict[str, Any] = {}
    stored = [caption_values(row["mscoco_generated_words"], row["mscoco_gt_words"]) for row in rows]
    for name in (*LEMMATIZERS, *(["stored"] if all(isinstance(row.get("words"), list) for row in rows) else [])):
        try:
            words = caption_words(rows, texts, vocabulary, name)
        except MissingResource as error:
            found[name] = f"not run: {error}"
            continue
        objects = [vocabulary.objects(each) for each in words]
        values = [caption_values(own, row["mscoco_gt_words"]) for own, row in zip(objects, rows, strict=True)]
        found[name] = {
            "same objects": sum(own == list(row["mscoco_generated_words"]) for own, row in zip(objects, rows, strict=True)),
            "same CHAIRs": sum(own["CHAIRs"] == other["CHAIRs"] for own, other in zip(values, stored, strict=True)),
            "same CHAIRi": sum(own["CHAIRi"] == other["CHAIRi"] for own, other in zip(values, stored, strict=True)),
            "of captions": len(rows),
        }
    print(f"agreement with the objects that are stored with the {len(rows)} captions, by lemmatizer:")
    for name, counts in found.items():
        print(f"  {name:<10}" + (counts if isinstance(counts, str) else ", ".join(f"{title} {count}" for title, count in counts.items())))
    return found


def shapeworld_captions(rows: list[Row], texts: list[str]) -> Captions:
    images = [str(row["image_path"]) for row in rows]
    truth = [set(Scene.from_json(row["scene"]).kinds) for row in rows]
    return Captions(images, [mentioned_objects(text) for text in texts], truth, "shapeworld")


def coco_captions(rows: list[Row], texts: list[str], options: ChairOptions) -> Captions:
    if options.synonyms is None:
        raise ValueError("--synonyms is missing; give CHAIR's synonyms file (a line per object: person, girl, boy, man)")
    vocabulary = read_vocabulary(options.synonyms)
    image_ids = [coco_id(row, number) for number, row in enumerate(rows)]
    words = caption_words(rows, texts, vocabulary, options.lemmatizer)
    objects = [vocabulary.objects(each) for each in words]
    # Ground-truth captions go through the rule of the answers; "stored" has none, so they get muffin's.
    lemmas = LEMMATIZERS["simple" if options.lemmatizer == "stored" else options.lemmatizer](vocabulary)
    truth = true_objects(rows, image_ids, vocabulary, lemmas, coco_annotations=options.coco_annotations, truth=options.truth)
    return Captions([str(each) for each in image_ids], objects, truth, options.lemmatizer)


def caption_words(rows: list[Row], texts: list[str], vocabulary: Vocabulary, lemmatizer: str) -> list[list[str]]:
    if lemmatizer != "stored":
        lemmas = LEMMATIZERS[lemmatizer](vocabulary)
        return [lemmas(text) for text in texts]
    without = [number for number, row in enumerate(rows) if not isinstance(row.get("words"), list)]
    if without:
        raise ValueError(f"--lemmatizer stored: row {without[0]} of --answers has no list `words`; choose another --lemmatizer")
    return [row["words"] for row in rows]


if __name__ == "__main__":
    main()
