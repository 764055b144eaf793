"""Object HalBench with a judge that lists the objects an answer names, counted as CHAIR; with 95 % intervals over images.

    python eval/object_halbench.py --answers answers/ --synonyms synonyms.txt --coco_annotations annotations/ --output objhal.json \\
        --judge_model Qwen/Qwen2.5-72B-Instruct

Answers and truth are those of eval/chair.py, which counts the same by rules and without a judge. chair_s_refined is the number that is
reported as the response level, chair_i the mention level; an object counts once per answer. Truth is by rules in either case, where
RLAIF-V's script sends people's captions to the judge, too.

Who judges (a server, a model loaded here, or files in OpenAI's batch format): see eval/mmhal.py.

The result names judge, date and prompt version, and says what it may be compared with. A failed request or an unreadable list is a
missing value: reported, left out of every share.
"""

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from transformers import HfArgumentParser

from muffin.answers import answer_text, read_rows
from muffin.chair import LEMMATIZERS, chair_scores, coco_id, count_captions, read_vocabulary, true_objects
from muffin.hallucination import format_table
from muffin.image_counts import estimate_counts, result_of, write_result
from muffin.judge import JudgeOptions, Reply, describe_missing, load_judge
from muffin.object_halbench import PROMPT_VERSION, comparable_with, extraction_prompt, is_short, objects_named, parse_objects


@dataclass
class ObjectHalbenchOptions:
    answers: str = field(metadata={"help": "Captions: folder of data/generate_responses.py, or a JSON-lines, JSON or Parquet file."})
    synonyms: str = field(metadata={"help": "CHAIR's synonyms file: a line per object."})
    output: str = field(metadata={"help": "JSON file for the result, every list included."})
    coco_annotations: str | None = field(default=None, metadata={"help": "Folder of COCO's instances_*.json and captions_*.json."})
    truth: str | None = field(default=None, metadata={"help": "JSON file {image_id: [objects]}, in place of --coco_annotations."})
    lemmatizer: Literal["simple", "chair", "rlaifv", "nltk-pos"] = field(
        default="simple", metadata={"help": "How the words of lists and of people's captions are reduced; see eval/chair.py."}
    )

    def __post_init__(self) -> None:
        if self.coco_annotations is not None and self.truth is not None:
            raise ValueError(f"--coco_annotations {self.coco_annotations} and --truth {self.truth} both say what is there; give one")


OPTIONS = (JudgeOptions, ObjectHalbenchOptions)


def main(argv: list[str] | None = None) -> dict[str, Any]:
    judge_options, options = HfArgumentParser(OPTIONS).parse_args_into_dataclasses(args=argv, look_for_args_file=False)
    rows = read_rows(options.answers, "--answers")
    texts = [answer_text(row, f"--answers, row {number}") for number, row in enumerate(rows)]
    vocabulary = read_vocabulary(options.synonyms)
    lemmas = LEMMATIZERS[options.lemmatizer](vocabulary)
    image_ids = [coco_id(row, number) for number, row in enumerate(rows)]
    truth = true_objects(rows, image_ids, vocabulary, lemmas, coco_annotations=options.coco_annotations, truth=options.truth)

    judge = load_judge(judge_options, options.output, os.environ)
    long = [number for number, text in enumerate(texts) if not is_short(text)]
    asked = dict(zip(long, judge.ask([extraction_prompt(texts[number]) for number in long]), strict=True))
    replies = [asked.get(number, Reply("[]")) for number in range(len(texts))]
    lists = [None if reply.text is None else parse_objects(reply.text) for reply in replies]
    objects = [None if listed is None else objects_named(listed, vocabulary, lemmas) for listed in lists]
    listed = [number for number, each in enumerate(objects) if each is not None]
    if not listed:
        raise ValueError(f"none of the {len(texts)} captions has a list of objects; look at the judge's replies")
    counts = count_captions(
        [objects[n] for n in listed], [truth[n] for n in listed], [texts[n] for n in listed], [str(image_ids[n]) for n in listed]
    )
    estimates = estimate_counts(counts, chair_scores)
    missing = describe_missing(replies, lists, "no readable list")
    result = {
        "benchmark": "chair",
        "rules": {"judge": judge.name, "prompt": PROMPT_VERSION, "lemmatizer": options.lemmatizer},
        "judge": judge.describe() | {"prompt": PROMPT_VERSION},
        "comparable_with": comparable_with(judge.name),
        "captions": len(texts),
        "missing": missing,
    } | result_of(estimates, counts)
    result["per_caption"] = [
        {"image": str(image_id), "listed": own, "objects": named, "truth": sorted(true), "reply": reply.text}
        | ({"failure": reply.failure} if reply.failure else {})
        for image_id, own, named, true, reply in zip(image_ids, lists, objects, truth, replies, strict=True)
    ]
    print(format_table(f"Object HalBench: {len(texts)} captions, judge {judge.name}, prompt {PROMPT_VERSION}", estimates, 2))
    print(f"missing: {missing}\ncomparable with {result['comparable_with']}")
    write_result(Path(options.output), result)
    return result


if __name__ == "__main__":
    main()
