"""data/make_shapeworld.py: what the files hold, that they repeat, and that held-out pictures stay held out."""

import io
import json
from collections import Counter

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from muffin.policies import PolicyOptions, load_adapter, load_policy, resolve_checkpoint
from muffin.shapeworld.claims import mentioned_objects
from muffin.shapeworld.model import build_policy
from muffin.shapeworld.scenes import WORLDS, Scene, draw

FILES = ("sft", "labeler", "prompts-1", "prompts-2", "choice", "heldout", "pope")
COLUMNS = {
    "image", "question", "chosen", "rejected", "idx", "image_path", "origin_dataset", "origin_split", "ds_name", "scene", "kind",
}  # fmt: skip


@pytest.fixture(scope="module")
def make(load_recipe, tmp_path_factory):
    def run(seed: int):
        folder = tmp_path_factory.mktemp(f"seed-{seed}")
        counts = "--train_images 30 --captions_per_image 1 --questions_per_image 3 --labeler_questions_per_image 2"
        prompts = "--prompt_images 7 --iterations 2 --choice_images 5 --heldout_images 40 --vision_steps 2"
        load_recipe("data/make_shapeworld.py").main(f"--output_dir {folder} --seed {seed} {counts} {prompts}".split())
        return folder

    return run


@pytest.fixture(scope="module")
def made(make):
    return make(0)


@pytest.fixture(scope="module")
def rows(made):
    assert {file.name for file in made.iterdir()} == {"policy", *(f"{name}.parquet" for name in FILES)}
    return {name: pq.read_table(made / f"{name}.parquet").to_pylist() for name in FILES}


def test_files_have_the_rows_that_were_asked_for(rows):
    assert {name: len(table) for name, table in rows.items() if name != "pope"} == {
        "sft": 30 * (1 + 3),
        "labeler": 30 * 2,
        "prompts-1": 7,
        "prompts-2": 7,
        "choice": 5,
        "heldout": 40,
    }
    assert Counter(row["kind"] == "describe" for row in rows["sft"]) == {True: 30, False: 90}
    assert all(row["chosen"] in ("Yes.", "No.") for row in rows["labeler"] if row["kind"] == "claim")


def test_rows_have_the_columns_of_the_format(rows):
    for name, table in rows.items():
        for number, row in enumerate(table):
            assert set(row) == COLUMNS
            assert row["idx"] == number
            assert row["rejected"] is None
            assert row["image"]["path"] == row["image_path"]
            assert row["origin_dataset"] == row["ds_name"] == "shapeworld"
            assert row["origin_split"] == name.partition("-")[0]
            assert (row["chosen"] is None) == (name in ("prompts-1", "prompts-2", "choice", "heldout"))
            if row["chosen"] is None:
                assert (row["question"], row["kind"]) == ("Describe the image.", "describe")


def test_the_scene_of_a_row_is_its_picture(rows):
    for table in rows.values():
        for row in table[:10]:
            shown = np.asarray(Image.open(io.BytesIO(row["image"]["bytes"])))
            assert np.array_equal(shown, np.asarray(draw(Scene.from_json(row["scene"]))))


def test_one_path_is_one_picture(rows):
    pictures = {(row["image_path"], row["image"]["bytes"]) for table in rows.values() for row in table}
    assert len(pictures) == len({path for path, _ in pictures}) == len({png for _, png in pictures}) == 30 + 7 + 7 + 5 + 40


def test_captions_hallucinate_and_answers_do_not(rows):
    wrong = []
    for row in rows["sft"]:
        kinds = [(thing["color"], thing["shape"]) for thing in json.loads(row["scene"])["objects"]]
        if row["kind"] == "describe":
            wrong += [kind not in kinds for kind in mentioned_objects(row["chosen"])]
        if row["kind"] == "existence":
            assert (tuple(row["question"].split()[3:5]) in kinds) == (row["chosen"] == "Yes.")
    assert 0 < sum(wrong) < len(wrong) / 2


def test_pope_is_balanced_per_picture_and_sort(rows):
    asked = Counter((row["kind"], row["image_path"], row["chosen"]) for row in rows["pope"])
    for (kind, path, _), count in asked.items():
        assert count == asked[kind, path, "Yes."] == asked[kind, path, "No."]
    assert {kind for kind, _, _ in asked} == {"random", "popular", "adversarial"}
    scenes = {row["image_path"]: Scene.from_json(row["scene"]) for row in rows["pope"]}
    held = Counter(kind for scene in scenes.values() for kind in set(scene.kinds))
    for row in rows["pope"]:
        scene = Scene.from_json(row["scene"])
        kind = tuple(row["question"].split()[3:5])
        assert (kind in scene.kinds) == (row["chosen"] == "Yes.")
        if row["chosen"] == "No." and row["kind"] == "adversarial":
            assert kind in WORLDS["standard"].themes[scene.theme]
        if row["chosen"] == "No." and row["kind"] == "popular":  # fewer than three absent kinds are in more pictures
            assert sum(times > held[kind] for other, times in held.items() if other not in scene.kinds) < 3


def test_files_repeat_and_only_evaluation_is_shared_between_seeds(make, made):
    again, other = make(0), make(1)
    for name in FILES:
        content = (made / f"{name}.parquet").read_bytes()
        assert (again / f"{name}.parquet").read_bytes() == content
        assert ((other / f"{name}.parquet").read_bytes() == content) == (name in ("heldout", "pope"))


def test_a_picture_is_stored_once(made):
    """120 rows on 30 pictures: the file is nearer to 30 pictures than to 120."""
    bytes_of_pictures = sum(len(row["image"]["bytes"]) for row in pq.read_table(made / "sft.parquet").to_pylist()) / 4
    assert (made / "sft.parquet").stat().st_size < 1.5 * bytes_of_pictures


def test_the_newborn_policy_loads(made):
    checkpoint = resolve_checkpoint(made / "policy")
    adapter = load_adapter(checkpoint, PolicyOptions())
    assert adapter.prompt_name == "hf"
    born = build_policy(WORLDS["standard"], adapter.tokenizer, seed=0).state_dict()
    trained = load_policy(checkpoint, adapter, dtype=torch.float32).state_dict()
    differing = {name for name in born if not torch.equal(born[name], trained[name])}
    assert differing and all("vision_tower" in name for name in differing)


def test_datasets_shows_the_pictures(made, tmp_path):
    table = datasets.load_dataset("parquet", data_files=str(made / "prompts-1.parquet"), split="train", cache_dir=str(tmp_path))
    assert isinstance(table.features["image"], datasets.Image)
    assert table[0]["image"].size == (96, 96)


def test_small_world(load_recipe, tmp_path):
    flags = (
        f"--output_dir {tmp_path} --world small --train_images 3 --prompt_images 3 --choice_images 3 --heldout_images 3 --vision_steps 1"
    )
    load_recipe("data/make_shapeworld.py").main(flags.split())
    row = pq.read_table(tmp_path / "heldout.parquet").to_pylist()[0]
    assert Image.open(io.BytesIO(row["image"]["bytes"])).size == (64, 64)


def test_unknown_worlds_are_refused(load_recipe, tmp_path):
    with pytest.raises(ValueError, match="--world is 'big', must be one of standard, small"):
        load_recipe("data/make_shapeworld.py").main(["--output_dir", str(tmp_path), "--world", "big"])
    assert not list(tmp_path.iterdir())
