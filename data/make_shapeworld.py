"""Make the data sets of the tiny image world: Parquet files in the row format of data/README.md, with the ground truth in every row.

    python data/make_shapeworld.py --output_dir outputs/shapeworld

sft.parquet        captions by the careless annotator and clean answers to questions: cold start of the tiny policy (no rejected)
labeler.parquet    yes/no questions with hard negatives, on the same pictures: training of the labeler (no rejected)
prompts-1.parquet  "Describe the image." on new pictures, for the first iteration: what candidates are generated for (question only)
choice.parquet     the same on pictures that checkpoints are chosen on (question only)
heldout.parquet    the same on pictures that occur nowhere else and are equal for every --seed: evaluation (question only)
policy/            a newborn policy: vision tower taught what stands where, language untrained; what train/sft.py starts from
pope.parquet       "Is there a red circle in the image?" on the held-out pictures, random, popular and adversarial negatives

The columns `scene` (JSON: what stands where) and `kind` (describe, claim, existence, count, how_many, what_is; in pope.parquet random,
popular and adversarial) come on top of the usual ones; rows about one picture share `image_path`. Train with shuffled rows.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Features, Image, Value
from tqdm import tqdm
from transformers import HfArgumentParser

from muffin.pairs import decode_image
from muffin.shapeworld.language import (
    DESCRIBE,
    Annotator,
    QuestionAnswer,
    absent_kinds,
    caption,
    clean_question,
    labeler_question,
    pope_questions,
    popular_kinds,
)
from muffin.shapeworld.model import build_adapter, build_policy, pretrain_vision, save_policy
from muffin.shapeworld.scenes import WORLDS, Scene, World, draw, encode_png, sample_scenes

FEATURES = Features(
    {"image": Image(), "idx": Value("int64")}
    | {
        name: Value("string")
        for name in ("question", "chosen", "rejected", "image_path", "origin_dataset", "origin_split", "ds_name", "scene", "kind")
    }
)


ROW_GROUP = 4096


@dataclass
class MakeShapeworldOptions:
    output_dir: str = field(metadata={"help": "Folder for the Parquet files; files of an earlier run are replaced."})
    world: str = field(default="standard", metadata={"help": "standard (3x3 cells, 96 px) or small (2x2 cells, 64 px; for tests)."})
    seed: int = field(default=0, metadata={"help": "Seed of all pictures and texts but the held-out ones, which are always the same."})
    train_images: int = field(default=6000, metadata={"help": "Pictures that sft.parquet and labeler.parquet share."})
    captions_per_image: int = field(default=2, metadata={"help": "Rows of sft.parquet per picture that describe it."})
    questions_per_image: int = field(default=2, metadata={"help": "Rows of sft.parquet per picture that ask something else."})
    labeler_questions_per_image: int = field(default=4, metadata={"help": "Rows of labeler.parquet per picture."})
    iterations: int = field(default=1, metadata={"help": "Number of prompts-N.parquet files, each with pictures of its own."})
    prompt_images: int = field(default=256, metadata={"help": "Pictures, and rows, of each prompts-N.parquet."})
    choice_images: int = field(default=100, metadata={"help": "Pictures of choice.parquet, which checkpoints are chosen on."})
    heldout_images: int = field(default=200, metadata={"help": "Pictures of heldout.parquet and pope.parquet."})
    vision_steps: int = field(default=200, metadata={"help": "Steps of 64 pictures that teach the newborn policy's vision tower."})

    def __post_init__(self) -> None:
        if self.world not in WORLDS:
            raise ValueError(f"--world is {self.world!r}, must be one of {', '.join(WORLDS)}")


OPTIONS = (MakeShapeworldOptions,)


def main(argv: list[str] | None = None) -> None:
    (options,) = HfArgumentParser(OPTIONS).parse_args_into_dataclasses(args=argv, look_for_args_file=False)
    world = WORLDS[options.world]
    folder = Path(options.output_dir)
    folder.mkdir(parents=True, exist_ok=True)

    train = draw_pictures(world, options.train_images, options.seed, "train")
    rng = random.Random(f"texts/{options.seed}")
    sft = [turn for picture in train for turn in sft_turns(picture, options, rng)]
    write(folder / "sft.parquet", "sft", sft)
    labeler = [(p, labeler_question(p.scene, rng)) for p in train for _ in range(options.labeler_questions_per_image)]
    write(folder / "labeler.parquet", "labeler", labeler)

    make_policy(world, train, options, folder / "policy")

    for number in range(1, options.iterations + 1):
        prompts = draw_pictures(world, options.prompt_images, options.seed, f"prompts-{number}")
        write(folder / f"prompts-{number}.parquet", "prompts", to_describe(prompts))
    write(folder / "choice.parquet", "choice", to_describe(draw_pictures(world, options.choice_images, options.seed, "choice")))

    heldout = draw_pictures(world, options.heldout_images, 0, "heldout")
    write(folder / "heldout.parquet", "heldout", to_describe(heldout))
    write(folder / "pope.parquet", "pope", list(pope_turns(heldout)))


@dataclass(frozen=True)
class Picture:
    scene: Scene
    path: str
    png: bytes


Turn = tuple[Picture, QuestionAnswer]


def make_policy(world: World, pictures: list[Picture], options: MakeShapeworldOptions, folder: Path) -> None:
    """A policy that sees (as one does that starts from CLIP) and cannot speak yet."""
    adapter = build_adapter(world)
    policy = build_policy(world, adapter.tokenizer, options.seed)
    pixels = adapter.image_processor([decode_image(picture.png) for picture in pictures], return_tensors="pt").pixel_values
    steps = pretrain_vision(policy, [picture.scene for picture in pictures], pixels, steps=options.vision_steps, seed=options.seed)
    progress = tqdm(steps, total=options.vision_steps, desc="teaching the vision tower", unit="step")
    for found in progress:
        progress.set_postfix({name: f"{value:.2f}" for name, value in found.items()})
    save_policy(policy, adapter, folder)


def to_describe(pictures: list[Picture]) -> list[Turn]:
    return [(picture, QuestionAnswer("describe", DESCRIBE, None)) for picture in pictures]


def draw_pictures(world: World, count: int, seed: int, split: str) -> list[Picture]:
    scenes = tqdm(sample_scenes(world, count, seed, split), desc=f"drawing {split}", unit="picture")
    return [Picture(scene, f"{split}/{number:06d}.png", encode_png(draw(scene))) for number, scene in enumerate(scenes)]


def sft_turns(picture: Picture, options: MakeShapeworldOptions, rng: random.Random) -> Iterator[Turn]:
    for _ in range(options.captions_per_image):
        yield picture, QuestionAnswer("describe", DESCRIBE, caption(picture.scene, rng, Annotator()))
    for _ in range(options.questions_per_image):
        yield picture, clean_question(picture.scene, rng)


def pope_turns(pictures: list[Picture]) -> Iterator[Turn]:
    """Absent kinds are any ("random"), those of the picture's theme ("adversarial"), or the three that most pictures have ("popular")."""
    rng = random.Random("pope")
    popular = popular_kinds([picture.scene for picture in pictures])
    for negatives in ("random", "adversarial", "popular"):
        for picture in pictures:
            scene = picture.scene
            absent = [kind for kind in popular if kind not in scene.kinds][:3] if negatives == "popular" else absent_kinds(scene, negatives)
            for question in pope_questions(scene, rng, absent):
                yield picture, replace(question, kind=negatives)


def write(path: Path, split: str, turns: list[Turn]) -> None:
    """Rows about one picture stand together: the dictionary of a row group then stores its bytes once."""
    schema = FEATURES.arrow_schema
    with pq.ParquetWriter(path, schema, compression="zstd", dictionary_pagesize_limit=2**26) as writer:
        for start in range(0, len(turns), ROW_GROUP):
            rows = [as_row(start + i, split, *turn) for i, turn in enumerate(turns[start : start + ROW_GROUP])]
            writer.write_table(pa.Table.from_pylist(rows, schema=schema))
    print(f"{path}: {len(turns)} rows")


def as_row(idx: int, split: str, picture: Picture, turn: QuestionAnswer) -> dict:
    return {
        "image": {"bytes": picture.png, "path": picture.path},
        "question": turn.question,
        "chosen": turn.answer,
        "rejected": None,
        "idx": idx,
        "image_path": picture.path,
        "origin_dataset": "shapeworld",
        "origin_split": split,
        "ds_name": "shapeworld",
        "scene": picture.scene.to_json(),
        "kind": turn.kind,
    }


if __name__ == "__main__":
    main()
