"""Divide images and questions over the rounds of train/iterate.py, with images set aside for choosing checkpoints and for evaluation.

    python data/select_prompts.py --data_path prompts.parquet --output_dir prompts/ --rounds 4 --choice_images 100 --heldout_images 200

No image is in two parts, whatever its rows are: rows belong together when their images are equal byte for byte. What is not set aside
goes to the rounds in equal shares, in random order; every question about the images is kept there, one per image in the parts that are
set aside. Killed: run the command again.

Output: round-1/ ... round-N/, choice/, heldout/: folders of Parquet shards with all columns of the data, under muffin's names, images
as bytes; muffin_selection.json. Rows whose image cannot be read are left out, and counted.
"""

import hashlib
import logging
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import datasets
import pyarrow as pa
from tqdm import tqdm
from transformers import HfArgumentParser

from muffin.pairs import PromptDataset, RowError, load_prompts, normal_columns, parse_column_map
from muffin.scoring import fingerprint
from muffin.shards import Shard, ShardFolder, begin_run, plan_shards, with_columns, write_missing

logger = logging.getLogger("data.select_prompts")

MANIFEST = "muffin_selection.json"
SHARD_ROWS = 500
IMAGE = datasets.Features({"image": datasets.Image()})


@dataclass
class SelectionOptions:
    data_path: str = field(metadata={"help": "Images and questions: Parquet or JSON-lines file, folder of Parquet files, or hub id."})
    output_dir: str = field(metadata={"help": "Folder for the parts; a run that was killed is resumed from it."})
    rounds: int = field(default=4, metadata={"help": "Parts to generate answers for, 1 or more; RLAIF-V takes 4."})
    images_per_round: int | None = field(default=None, metadata={"help": "Images of a round's part at most; default: an equal share."})
    choice_images: int = field(default=100, metadata={"help": "Images that checkpoints are chosen on, usually 50 to 500; 0 for none."})
    heldout_images: int = field(default=200, metadata={"help": "Images that policies are evaluated on, usually 100 to 1000; 0 for none."})
    seed: int = field(default=0, metadata={"help": "Of the division."})
    column_map: str = field(default="", metadata={"help": "Own column names, which get muffin's in the output: question=prompt."})
    image_root: str | None = field(default=None, metadata={"help": "Folder that image paths in the data start from; default: the data's."})

    def __post_init__(self) -> None:
        if self.rounds < 1 or self.choice_images < 0 or self.heldout_images < 0:
            raise ValueError(
                f"--rounds {self.rounds} must be at least 1, --choice_images {self.choice_images} and "
                f"--heldout_images {self.heldout_images} at least 0"
            )
        if self.images_per_round is not None and self.images_per_round < 1:
            raise ValueError(f"--images_per_round {self.images_per_round} must be at least 1")


OPTIONS = (SelectionOptions,)
DECIDING = ("rounds", "images_per_round", "choice_images", "heldout_images", "seed", "column_map")


def main(argv: list[str] | None = None) -> dict[str, int]:
    """Rows by part."""
    (options,) = HfArgumentParser(OPTIONS).parse_args_into_dataclasses(args=argv, look_for_args_file=False)
    logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s")
    column_map = parse_column_map(options.column_map)
    prompts = load_prompts(options.data_path, column_map=column_map, image_root=options.image_root)
    output_dir = Path(options.output_dir)
    manifest = {name: getattr(options, name) for name in DECIDING} | {"input": fingerprint(options.data_path, prompts)}
    begin_run(output_dir, MANIFEST, manifest)

    table = normal_columns(prompts.table, column_map)
    parts = divide(rows_by_image(prompts), options)
    for name, rows in parts.items():
        write_part(prompts, table, rows, output_dir / name)
    print(", ".join(f"{name} {len(rows)} rows" for name, rows in parts.items()) + f" in {output_dir}")
    return {name: len(rows) for name, rows in parts.items()}


def rows_by_image(prompts: PromptDataset) -> list[list[int]]:
    """The rows of every image, in the order of their first. Raises ValueError when no image can be read."""
    images: dict[bytes, list[int]] = {}
    unreadable: list[RowError] = []
    for row in tqdm(range(len(prompts)), desc="reading images", unit="row"):
        try:
            images.setdefault(hashlib.sha256(prompts[row].image_bytes).digest(), []).append(row)
        except RowError as error:
            unreadable.append(error)
    if not images:
        raise ValueError(f"no row can be used; the first: {unreadable[0]}")
    if unreadable:
        logger.warning("%d rows are left out, the first: %s", len(unreadable), unreadable[0])
    return list(images.values())


def divide(images: Sequence[Sequence[int]], options: SelectionOptions) -> dict[str, list[int]]:
    """Rows by part. Raises ValueError when there are not enough images for all of them."""
    aside = options.choice_images + options.heldout_images
    share = (len(images) - aside) // options.rounds
    if share < 1:
        raise ValueError(
            f"--data_path has {len(images)} different images: too few for --choice_images {options.choice_images}, --heldout_images "
            f"{options.heldout_images} and at least one for each of --rounds {options.rounds}; lower one of them"
        )
    share = min(share, options.images_per_round or share)
    shuffled = random.Random(f"prompts/{options.seed}").sample(range(len(images)), len(images))
    heldout, choice, rest = (
        shuffled[: options.heldout_images],
        shuffled[options.heldout_images : aside],
        shuffled[aside:],
    )
    rounds = {f"round-{number + 1}": rest[number * share : (number + 1) * share] for number in range(options.rounds)}
    parts = {name: sorted(row for image in chosen for row in images[image]) for name, chosen in rounds.items()}
    for name, chosen in (("choice", choice), ("heldout", heldout)):
        if chosen:
            parts[name] = sorted(images[image][0] for image in chosen)
    return parts


def write_part(prompts: PromptDataset, table: datasets.Dataset, rows: Sequence[int], path: Path) -> None:
    """The shards of a part that are not there yet."""
    path.mkdir(parents=True, exist_ok=True)
    folder = ShardFolder(path, plan_shards(len(rows), SHARD_ROWS))

    def make(shard: Shard) -> pa.Table:
        positions = rows[shard.start : shard.stop]
        images = [{"bytes": prompts[row].image_bytes, "path": prompts[row].metainfo.get("image_path")} for row in positions]
        return with_columns(table, positions, IMAGE, {"image": images})

    with tqdm(total=len(rows), initial=folder.finished_rows(), desc=f"writing {path.name}", unit="row") as progress:
        write_missing(folder, make, progress)


if __name__ == "__main__":
    main()
