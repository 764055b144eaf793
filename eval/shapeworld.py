"""Measure answers in the tiny image world against its ground truth: hallucination, the labeler's mistakes, the order of pairs.

    python eval/shapeworld.py --answers before=answers-0/ after=answers-1/ --output measures.json --gallery before-after.png

--answers takes folders of data/generate_responses.py on heldout.parquet of data/make_shapeworld.py, each under a name. With --judged_dir
(from data/score_claims.py) and --pairs_dir (from data/build_pairs.py) the labeler and the pairs are measured, too. Percent (words: a
number), with 95 % bootstrap intervals over images.

POPE, CHAIR and best of N on what `make demo` made: scripts/demo_benchmarks.sh.

Output: JSON {"answers": {name: {"chair_s": {"value", "low", "high"}, ...}}, "labeler": {...}, "pairs": {...}}, and with --gallery a
picture: held-out images with the first answer of every folder, wrong statements marked.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from transformers import HfArgumentParser

from muffin.hallucination import format_table
from muffin.pairs import load_prompts
from muffin.provenance import write_atomically
from muffin.shapeworld.measure import describe_answers, describe_labeler, describe_pairs, draw_gallery
from muffin.shapeworld.scenes import Scene, draw

TEXT_COLUMNS = ("scene", "image_path", "answer", "p_yes", "p_no", "chosen", "rejected")

Rows = list[Mapping[str, Any]]


@dataclass
class ShapeworldOptions:
    output: str = field(metadata={"help": "JSON file for the numbers."})
    answers: list[str] = field(default_factory=list, metadata={"help": "NAME=FOLDER of answers, one or more."})
    judged_dir: str | None = field(default=None, metadata={"help": "Judged answers of data/score_claims.py."})
    pairs_dir: str | None = field(default=None, metadata={"help": "Pairs of data/build_pairs.py."})
    gallery: str | None = field(default=None, metadata={"help": "PNG file for images with the answers of every folder side by side."})
    gallery_columns: list[str] = field(default_factory=list, metadata={"help": "Names out of --answers to show; default: all."})
    gallery_images: int = field(default=6, metadata={"help": "Images in the gallery, usually 4 to 10."})

    def __post_init__(self) -> None:
        if not (self.answers or self.judged_dir or self.pairs_dir):
            raise ValueError("nothing to measure: give --answers, --judged_dir or --pairs_dir")
        if wrong := [entry for entry in self.answers if not all(entry.partition("="))]:
            raise ValueError(f"--answers: found {wrong[0]!r}, want NAME=FOLDER")
        if self.gallery and not self.answers:
            raise ValueError("--gallery shows answers; give --answers NAME=FOLDER")
        names = [entry.partition("=")[0] for entry in self.answers]
        if unknown := sorted(set(self.gallery_columns).difference(names)):
            raise ValueError(f"--gallery_columns {unknown[0]}: want names out of --answers, which are {', '.join(names)}")


OPTIONS = (ShapeworldOptions,)


def main(argv: list[str] | None = None) -> dict[str, Any]:
    (options,) = HfArgumentParser(OPTIONS).parse_args_into_dataclasses(args=argv, look_for_args_file=False)
    answers = {name: read_rows(folder) for name, _, folder in (entry.partition("=") for entry in options.answers)}
    found: dict[str, Any] = {"answers": {name: describe_answers(rows) for name, rows in answers.items()}}
    if options.judged_dir:
        found["labeler"] = describe_labeler(read_rows(options.judged_dir))
    if options.pairs_dir:
        found["pairs"] = describe_pairs(read_rows(options.pairs_dir))
    output = Path(options.output)
    output.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(output, (json.dumps(found, indent=1, default=asdict) + "\n").encode())
    for title, estimates in {**found["answers"], **{name: found[name] for name in found if name != "answers"}}.items():
        print(format_table(title, estimates, digits=1))
    if options.gallery:
        shown = {name: answers[name] for name in options.gallery_columns or answers}
        write_gallery(shown, options.gallery_images, Path(options.gallery))
    return found


def read_rows(folder: str) -> Rows:
    """The rows of a folder without their images. Raises ValueError when they carry no ground truth."""
    table = load_prompts(folder).table
    if "scene" not in table.column_names:
        raise ValueError(f"{folder} has no column `scene`; only data of data/make_shapeworld.py carries its ground truth")
    return table.select_columns([name for name in TEXT_COLUMNS if name in table.column_names]).to_list()


def write_gallery(answers: Mapping[str, Rows], images: int, path: Path) -> None:
    """The first answer of every folder about the first images that all of them answer."""
    first = {name: {row["image_path"]: row for row in reversed(rows)} for name, rows in answers.items()}
    shown = [path for path in next(iter(first.values())) if all(path in rows for rows in first.values())][-images:]
    scenes = [Scene.from_json(next(iter(first.values()))[image]["scene"]) for image in shown]
    columns = {name: [rows[image]["answer"] for image in shown] for name, rows in first.items()}
    draw_gallery(columns, [draw(scene) for scene in scenes], scenes).save(path)
    print(f"{path}: {len(shown)} held-out images with their answers")


if __name__ == "__main__":
    main()
