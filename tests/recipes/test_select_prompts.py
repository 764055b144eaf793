"""data/select_prompts.py: no image is in two parts, none is lost, and the division repeats."""

import io
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from PIL import Image

from muffin.pairs import load_prompts
from tests.tiny import write_parquet

ROUNDS = "--rounds 3 --choice_images 2 --heldout_images 3"


@pytest.fixture
def select(load_recipe, tmp_path: Path):
    def run(flags: str = ROUNDS, output: str = "parts", data: Path | None = None) -> dict[str, int]:
        data = data or write_parquet(tmp_path / "rows.parquet", 45)  # three rows on each of 15 images
        return load_recipe("data/select_prompts.py").main(f"--data_path {data} --output_dir {tmp_path / output} {flags}".split())

    return run


def images(folder: Path) -> list[bytes]:
    return [row["image"]["bytes"] for file in sorted(folder.glob("*.parquet")) for row in pq.read_table(file).to_pylist()]


def test_parts_share_no_image_and_keep_all_columns(select, tmp_path: Path):
    rows = select()
    assert rows == {"round-1": 9, "round-2": 9, "round-3": 9, "choice": 2, "heldout": 3}  # (15 - 5) // 3 = 3 images per round, 1 left over
    found = {name: set(images(tmp_path / "parts" / name)) for name in rows}
    assert [len(each) for each in found.values()] == [3, 3, 3, 2, 3]
    assert len(set().union(*found.values())) == 14
    source = {(row["image"]["bytes"], row["question"], row["idx"]) for row in pq.read_table(tmp_path / "rows.parquet").to_pylist()}
    for name, count in rows.items():
        table = load_prompts(tmp_path / "parts" / name).table
        kept = {(row["image"]["bytes"], row["question"], row["idx"]) for row in table.to_list()}
        assert len(kept) == count and kept <= source
        assert {"chosen", "rejected", "image_path"} <= set(table.column_names)


def test_the_division_repeats_and_follows_the_seed(select, tmp_path: Path):
    for output in ("one", "two"):
        select(output=output)
    select(ROUNDS + " --seed 1", output="other")
    for name in ("round-2", "heldout"):
        assert images(tmp_path / "one" / name) == images(tmp_path / "two" / name) != images(tmp_path / "other" / name)


def test_a_part_that_was_lost_is_written_again(select, tmp_path: Path):
    select()
    (file,) = (tmp_path / "parts" / "choice").glob("*.parquet")
    content = file.read_bytes()
    file.unlink()
    select()
    assert file.read_bytes() == content
    with pytest.raises(ValueError, match="holds another run:\n  - seed: the run in this folder has 0, this one 7"):
        select(ROUNDS + " --seed 7")


def test_own_columns_paths_and_unreadable_images(select, tmp_path: Path):
    """A JSON-lines file with image paths: its parts hold the images themselves, under muffin's names."""
    lines = []
    for number in range(4):
        stream = io.BytesIO()
        Image.new("RGB", (8, 8), (60 * number, 0, 0)).save(stream, "PNG")
        (tmp_path / f"{number}.png").write_bytes(stream.getvalue())
        lines.append(f'{{"picture": "{number}.png", "prompt": "What is it?"}}')
    (tmp_path / "rows.jsonl").write_text("\n".join([*lines, '{"picture": "gone.png", "prompt": "And that?"}']))
    flags = "--rounds 1 --images_per_round 2 --choice_images 0 --heldout_images 1 --column_map question=prompt,image=picture"
    assert select(flags, data=tmp_path / "rows.jsonl") == {"round-1": 2, "heldout": 1}
    prompts = load_prompts(tmp_path / "parts" / "round-1")
    assert [prompts[row].question for row in range(2)] == ["What is it?"] * 2
    assert prompts[0].image_bytes in {(tmp_path / f"{number}.png").read_bytes() for number in range(4)}


def test_too_few_images_are_refused(select):
    with pytest.raises(
        ValueError, match="15 different images: too few for --choice_images 10, --heldout_images 3 and at least one for each"
    ):
        select("--rounds 3 --choice_images 10 --heldout_images 3")
