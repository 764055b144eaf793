"""AMBER: CHAIR, Cover, Hal, Cog of descriptions, accuracy, precision, recall, F1 of yes/no questions, and the AMBER score.

    python eval/amber.py --annotations AMBER/data/annotations.json --relation AMBER/data/relation.json \\
        --safe_words AMBER/data/safe_words.txt --answers answers/ --output amber.json

Answers of a policy: data/generate_responses.py --data_path query_all.json --column_map question=query --image_root images --num_answers 1
--temperature 0. Answers made elsewhere: AMBER's form, [{"id": 1, "response": "..."}]. They are matched by id; part of the questions is
enough, and the result says how many of each type were answered.

The result names the rules it was made with. Published numbers need `--extractor nltk --similarity spacy --answer_rule exact`.
"""

import logging
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from transformers import HfArgumentParser

from muffin.amber import (
    SPACY_MODEL,
    Alike,
    Annotation,
    Lexicon,
    count_answers,
    exact_answer,
    first_word_answer,
    read_annotations,
    read_lexicon,
    same_word,
    score_answers,
    spacy_similarity,
    vocabulary_nouns,
)
from muffin.answers import IMAGE_NAMES, Row, answer_text, first_of, read_rows, refuse_repeated, row_ids
from muffin.hallucination import format_table
from muffin.image_counts import result_of, write_result
from muffin.lemmas import Lemmatizer, MissingResource, wordnet_nouns

logger = logging.getLogger(__name__)


@dataclass
class AmberOptions:
    annotations: str = field(metadata={"help": "AMBER's annotations.json."})
    relation: str = field(metadata={"help": "AMBER's relation.json, the associated words."})
    safe_words: str = field(metadata={"help": "AMBER's safe_words.txt."})
    answers: str = field(metadata={"help": "Answers: folder of data/generate_responses.py, or a JSON, JSON-lines or Parquet file."})
    output: str = field(metadata={"help": "JSON file for the result."})
    queries: str | None = field(
        default=None,
        metadata={"help": "AMBER's query file, for the images that intervals resample where the answers do not name them."},
    )
    extractor: Literal["auto", "nltk", "vocabulary"] = field(
        default="auto",
        metadata={"help": "Nouns: nltk's tagger (as published), or words of AMBER's vocabulary; auto is nltk where its data are there."},
    )
    similarity: Literal["auto", "spacy", "exact"] = field(
        default="auto",
        metadata={"help": f"Like words: spaCy's {SPACY_MODEL} above 0.8 (as published), or equal ones; auto is spacy where installed."},
    )
    answer_rule: Literal["exact", "first_word"] = field(
        default="exact",
        metadata={"help": "Yes/no: the whole answer must be Yes or No (as published), or its first word in any case."},
    )


OPTIONS = (AmberOptions,)
RULES = {"exact": exact_answer, "first_word": first_word_answer}


def main(argv: list[str] | None = None) -> dict[str, Any]:
    (options,) = HfArgumentParser(OPTIONS).parse_args_into_dataclasses(args=argv, look_for_args_file=False)
    logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s")
    annotations = read_annotations(options.annotations)
    lexicon = read_lexicon(options.relation, options.safe_words)
    rows = read_rows(options.answers, "--answers")
    asked = annotations_of(rows, annotations)
    answers = [(annotation, answer_text(row, f"--answers, id {annotation.id}")) for annotation, row in zip(asked, rows, strict=True)]
    images = image_names(rows, asked, options.queries)
    extractor, nouns = choose_extractor(options.extractor, lexicon)
    similarity, alike = choose_similarity(options.similarity)

    rule = RULES[options.answer_rule]
    counts = count_answers(answers, images, nouns, lexicon, alike, rule)
    estimates = score_answers(counts)
    wanted, given = Counter(each.type for each in annotations.values()), Counter(each.type for each in asked)
    answered = {kind: f"{given[kind]} of {wanted[kind]}" for kind in sorted(wanted)}
    neither = sum(annotation.type != "generative" and rule(answer) not in ("Yes", "No") for annotation, answer in answers)
    rules = {"extractor": extractor, "similarity": similarity, "answer_rule": options.answer_rule}
    result = {
        "benchmark": "amber",
        "rules": rules,
        "as_published": rules == {"extractor": "nltk", "similarity": f"spacy {SPACY_MODEL}", "answer_rule": "exact"},
        "answered": answered,
        "neither_yes_nor_no": neither,
    } | result_of(estimates, counts)
    print(format_table(f"AMBER: {len(answers)} answers; {', '.join(f'{key} {value}' for key, value in rules.items())}", estimates, 1))
    print("answered: " + ", ".join(f"{kind} {count}" for kind, count in answered.items()) + f"; neither yes nor no: {neither}")
    write_result(Path(options.output), result)
    return result


def annotations_of(rows: list[Row], annotations: dict[int, Annotation]) -> list[Annotation]:
    """The annotation of each answer: by id; without ids by order, of all questions or of all descriptions."""
    ids = row_ids(rows, ("id", "question_id"))
    if ids is not None:
        refuse_repeated("--answers", ids)
        unknown = [each for each in ids if not each.isdecimal() or int(each) not in annotations]
        if unknown:
            raise ValueError(f"--answers: {len(unknown)} ids are not in --annotations, the first is {unknown[0]}")
        return [annotations[int(each)] for each in ids]
    parts = [list(annotations.values()), [each for each in annotations.values() if each.type == "generative"]]
    for part in parts:
        if len(part) == len(rows):
            return part
    raise ValueError(
        f"--answers: found {len(rows)} answers without ids, want {len(parts[0])}, or {len(parts[1])} descriptions; or give ids"
    )


def image_names(rows: list[Row], asked: list[Annotation], queries: str | None) -> list[str]:
    """The image of each answer; where nobody names it, each answer counts as an image of its own (right for descriptions)."""
    known = {} if queries is None else {str(row["id"]): first_of(row, IMAGE_NAMES) for row in read_rows(queries, "--queries")}
    return [
        str(first_of(row, IMAGE_NAMES) or known.get(str(annotation.id)) or f"id {annotation.id}")
        for row, annotation in zip(rows, asked, strict=True)
    ]


def choose_extractor(name: str, lexicon: Lexicon) -> tuple[str, Lemmatizer]:
    if name != "vocabulary":
        try:
            return "nltk", wordnet_nouns()
        except MissingResource as error:
            if name == "nltk":
                raise
            logger.warning("nouns are words of AMBER's vocabulary, not the published nltk nouns: %s", error)
    return "vocabulary", vocabulary_nouns(lexicon)


def choose_similarity(name: str) -> tuple[str, Alike]:
    if name != "exact":
        try:
            return f"spacy {SPACY_MODEL}", spacy_similarity()
        except MissingResource as error:
            if name == "spacy":
                raise
            logger.warning("words must be equal to match, as published they may be alike: %s", error)
    return "exact", same_word


if __name__ == "__main__":
    main()
