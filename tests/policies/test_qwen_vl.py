"""Qwen-VL: image sizes and three-axis positions worked out by hand."""

import numpy as np
import pytest
import torch
from PIL import Image

from muffin.packing import pack
from muffin.policies import PolicyOptions, load_adapter, resolve_checkpoint
from tests.policies.tiny_families import tiny_qwen3vl, tiny_qwen25vl


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return tiny_qwen25vl(tmp_path_factory.mktemp("qwen25vl"))


def adapter_with(path, **options):
    return load_adapter(resolve_checkpoint(path), PolicyOptions(**options))


def test_positions_by_hand(path):
    """84 x 56 pixels are 3 x 2 tokens. They follow n tokens of text, count rows and columns from n, and text goes on at n + 3."""
    adapter = adapter_with(path)
    encoded = adapter.encode(Image.new("RGB", (84, 56), "red"), "Q", ("Yes", "No"))
    is_image = encoded.prompt_ids == adapter.image_token_id
    n = int(is_image.nonzero()[0])
    assert is_image.sum() == 6
    assert encoded.position_ids[:, :n].tolist() == [list(range(n))] * 3
    assert (encoded.position_ids[:, is_image] - n).tolist() == [[0, 0, 0, 0, 0, 0], [0, 0, 0, 1, 1, 1], [0, 1, 2, 0, 1, 2]]
    after = len(encoded.prompt_ids) - n - 6
    assert encoded.position_ids[:, n + 6 :].tolist() == [list(range(n + 3, n + 3 + after))] * 3
    # the last prompt token stands at n + 2 + after: both answers' tokens go on from there, though the row has n + 6 + after tokens
    batch = pack([encoded], adapter)
    assert batch.position_ids.shape == (3, 1, batch.num_tokens)
    assert batch.position_ids[:, 0, len(encoded.prompt_ids) :].unique().tolist()[0] == n + 3 + after


@pytest.mark.parametrize(
    ("size", "max_pixels", "tokens"),
    [
        ((280, 140), None, (7, 3)),  # 10 x 5 tokens of 28 x 28, 30 allowed: shrunk by sqrt(50 / 30) to 7.7 x 3.9, rounded down
        ((140, 84), None, (5, 3)),
        ((140, 84), 8 * 28 * 28, (3, 2)),  # shrunk by sqrt(15 / 8): 3.65 x 2.19, rounded down
        ((20, 20), None, (2, 2)),  # enlarged to 4 tokens
    ],
)
def test_image_sizes_by_hand(path, size, max_pixels, tokens):
    columns, rows = tokens
    vision = adapter_with(path, max_pixels=max_pixels).encode(Image.new("RGB", size), "Q", ()).vision
    assert vision["image_grid_thw"].tolist() == [[1, 2 * rows, 2 * columns]]
    assert vision["pixel_values"].shape == (4 * rows * columns, 3 * 2 * 14 * 14)


def test_images_are_cut_by_their_grids(path):
    adapter = adapter_with(path)
    noise = np.random.default_rng(0).integers(0, 256, (56, 84, 3), dtype=np.uint8)
    encoded = [adapter.encode(image, "Q", ("Yes", "No")) for image in (Image.fromarray(noise), Image.new("RGB", (140, 84)))]
    batch = pack(encoded, adapter)
    assert batch.vision["image_grid_thw"].tolist() == [[1, 4, 6], [1, 6, 10]]
    assert torch.equal(batch.vision["pixel_values"][:24], encoded[0].vision["pixel_values"])
    assert torch.equal(batch.vision["pixel_values"][24:], encoded[1].vision["pixel_values"])


def test_too_few_pixels_are_refused(path):
    with pytest.raises(ValueError, match="--max_pixels 3135 is below the 3136 pixels that Qwen2.5-VL enlarges small images to"):
        adapter_with(path, max_pixels=3135)
    with pytest.raises(ValueError, match="--image_aspect_ratio pad means nothing to Qwen2.5-VL"):
        adapter_with(path, image_aspect_ratio="pad")


def test_each_model_has_its_templates_prompt(path, tmp_path):
    assert adapter_with(path).settings()["prompt_name"] == "chatml_system"
    adapter = adapter_with(tiny_qwen3vl(tmp_path))
    assert (adapter.settings()["family"], adapter.prompt_name) == ("qwen3_vl", "chatml")
