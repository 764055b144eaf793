"""MiniCPM-V 2.5 and 2.6: layout of the public checkpoints, and numbers against slow forms written after the originals."""

import json
import math

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from muffin.policies import PolicyOptions, load_adapter, load_policy, resolve_checkpoint, save_adapter
from muffin.policies.minicpmv2 import Resampler, Slicing, patch_strip, position_buckets, version_of
from tests.policies.tiny_families import tiny_minicpmv25, tiny_minicpmv26

BUILD = {"2.5": tiny_minicpmv25, "2.6": tiny_minicpmv26}


@pytest.fixture(scope="module", params=BUILD)
def path(request, tmp_path_factory):
    return BUILD[request.param](tmp_path_factory.mktemp("minicpmv"))


@pytest.fixture(scope="module")
def path_26(tmp_path_factory):
    return tiny_minicpmv26(tmp_path_factory.mktemp("minicpmv26"))


@pytest.fixture(scope="module")
def path_25(tmp_path_factory):
    return tiny_minicpmv25(tmp_path_factory.mktemp("minicpmv25"))


def adapter_with(path, **options):
    return load_adapter(resolve_checkpoint(path), PolicyOptions(**options))


def model_of(path):
    return load_policy(resolve_checkpoint(path), adapter_with(path), dtype=torch.float32).eval()


# --- slices


@pytest.mark.parametrize(
    ("size", "grid"),
    [
        # size (width, height), number of 448 x 448 areas rounded up, then |ln(W / H) - ln(columns / rows)| over the candidate numbers
        ((448, 448), None),  # 1 area
        ((447, 449), None),  # just below one
        ((640, 480), (2, 1)),  # 2: ln 1.33 = 0.29; 2 x 1 0.41, 3 x 1 0.81
        ((480, 640), (1, 2)),
        ((1024, 768), (2, 2)),  # 4: 3 x 1 0.81, 2 x 2 0.29, 5 x 1 1.3
        ((1344, 1344), (3, 3)),  # 9: 0
        ((2000, 1500), (3, 3)),  # 15, at most 9: 4 x 2 0.41, 3 x 3 0.29
        ((300, 1200), (1, 3)),  # 2: ln 0.25 = -1.39; 1 x 2 0.69, 1 x 3 0.29
        ((3000, 300), (6, 1)),  # 5: ln 10 = 2.3; 4 x 1 0.92, 5 x 1 0.69, 6 x 1 0.51
        ((1000, 500), (2, 1)),  # 3: ln 2; 2 x 1 0
        ((449, 448), (2, 1)),  # 2: 1 x 2 is off by 0.69 + 0.002, 2 x 1 by 0.69 - 0.002
    ],
)
def test_grids_by_hand(size, grid):
    assert Slicing(9, 448, 14).grid(*size) == grid


def test_unit_sizes_by_hand():
    """640 x 480: the overview has height 448 / sqrt(4 / 3) = 387, width 387 * 4 / 3 = 516: 28 and 37 patches (27.6, 36.9).

    A slice has the shape 320 x 480: height 448 / sqrt(2 / 3) = 548, width 365: 39 and 26 patches (39.1, 26.1).
    """
    units, grid = Slicing(9, 448, 14).cut(Image.new("RGB", (640, 480)))
    assert grid == (2, 1)
    assert [unit.size for unit in units] == [(37 * 14, 28 * 14), (26 * 14, 39 * 14), (26 * 14, 39 * 14)]


def test_image_that_is_not_cut_gets_the_area_of_one_unit():
    assert [unit.size for unit in Slicing(9, 448, 14).cut(Image.new("RGB", (100, 100)))[0]] == [(448, 448)]
    assert [unit.size for unit in Slicing(1, 448, 14).cut(Image.new("RGB", (896, 896)))[0]] == [(448, 448)]


def test_slices_are_pieces_of_the_enlarged_image():
    """56 pixels a side, 112 x 112: 2 x 2 slices of 56 x 56 whose size is the image's own, so they are its quarters, line by line."""
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (112, 112, 3), dtype=np.uint8))
    units, grid = Slicing(9, 56, 14).cut(image)
    assert grid == (2, 2) and len(units) == 5
    pixels = np.asarray(image)
    for unit, (top, left) in zip(units[1:], [(0, 0), (0, 56), (56, 0), (56, 56)], strict=True):
        assert np.array_equal(np.asarray(unit), pixels[top : top + 56, left : left + 56])


def test_patch_strip_lays_patches_side_by_side():
    pixels = np.random.default_rng(0).integers(0, 256, (4, 6, 3), dtype=np.uint8)
    strip = patch_strip(Image.fromarray(pixels), 2)
    assert strip.shape == (3, 2, 12)
    for number, (top, left) in enumerate([(0, 0), (0, 2), (0, 4), (2, 0), (2, 2), (2, 4)]):
        expected = (pixels[top : top + 2, left : left + 2].transpose(2, 0, 1) / 255 - 0.5) / 0.5
        np.testing.assert_allclose(strip[:, :, 2 * number : 2 * number + 2].numpy(), expected, atol=1e-6)


def test_placeholders_by_hand(path_25, path_26):
    """A 112 x 112 image has an overview and 2 x 2 slices."""
    image = Image.new("RGB", (112, 112), "red")
    texts = {}
    for name, path in (("2.5", path_25), ("2.6", path_26)):
        adapter = adapter_with(path)
        texts[name] = adapter.tokenizer.decode(adapter.encode(image, "Q", ()).prompt_ids.tolist()).replace("<unk>", "*")
    six, four = "<image>******</image>", "<slice>****</slice>"
    assert f"\n\n{six}<slice>{six}{six}\n{six}{six}</slice>\nQ<|eot_id|>" in texts["2.5"]
    assert f"user\n<image_id>0</image_id><image>****</image>{four}{four}\n{four}{four}\nQ<|im_end|>" in texts["2.6"]


# --- numbers


@pytest.mark.parametrize("count", [1, 2, 7, 25, 31, 48, 49, 50, 55, 57, 58, 59, 69, 70, 71, 77, 140, 1014])
def test_position_buckets_are_the_originals(count):
    """Patch i of n falls into bucket floor(70 i / n); where that is whole, float32 decides, and only the originals' own lines tell how."""
    boundaries = torch.arange(1 / 70, 1.0, 1 / 70)
    fractions = torch.arange(0, 1 - 1e-6, 1 / count)
    on_edge = {i for i in range(count) if i * 70 % count == 0}
    for i, bucket in enumerate(position_buckets(count, 70).tolist()):
        assert bucket == sum(bool(edge <= fractions[i]) for edge in boundaries)
        assert bucket == i * 70 // count or (i in on_edge and bucket == i * 70 // count - 1)


@pytest.mark.parametrize(("rows", "columns"), [(49, 3), (2, 58), (1, 7)])
def test_embeddings_look_positions_up_by_row_and_column(path_26, rows, columns):
    """With patches of no content and a table that holds its own index, the embedding is the position: row bucket * 10 + column bucket."""
    embeddings = model_of(path_26).vpm.embeddings
    with torch.no_grad():
        embeddings.patch_embedding.weight.zero_()
        embeddings.patch_embedding.bias.zero_()
        embeddings.position_embedding.weight.copy_(torch.arange(100.0)[:, None].expand(-1, 24))
        result = embeddings(torch.ones(1, 3, rows * 14, columns * 14), torch.ones(1, rows, columns, dtype=torch.bool))
    expected = [10 * row + column for row in position_buckets(rows, 10).tolist() for column in position_buckets(columns, 10).tolist()]
    assert result[0, :, 0].int().tolist() == expected


def slow_resampler(module: Resampler, patches: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """The original in numpy, float64, head by head: keys carry positions (column half first), values do not."""
    weights = {name: parameter.detach().double().numpy() for name, parameter in module.named_parameters()}

    def normalise(x: np.ndarray, name: str) -> np.ndarray:
        centred = x - x.mean(-1, keepdims=True)
        return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-6) * weights[f"{name}.weight"] + weights[f"{name}.bias"]

    width = weights["query"].shape[1]
    positions = np.zeros((rows * columns, width))
    for place in range(rows * columns):
        row, column = divmod(place, columns)
        for half, coordinate in enumerate((column, row)):
            for k in range(width // 4):
                angle = coordinate / 10000 ** (k / (width / 4))
                positions[place, half * width // 2 + k] = math.sin(angle)
                positions[place, half * width // 2 + width // 4 + k] = math.cos(angle)

    values = normalise(patches @ weights["kv_proj.weight"].T, "ln_kv")
    sources = (normalise(weights["query"], "ln_q"), values + positions, values)
    projected = []
    for number, source in enumerate(sources):
        part = slice(number * width, (number + 1) * width)
        projected.append(source @ weights["attn.in_proj_weight"][part].T + weights["attn.in_proj_bias"][part])
    heads = []
    for head in range(width // 128):
        q, k, v = (each[:, head * 128 : (head + 1) * 128] for each in projected)
        scores = np.exp(q @ k.T / math.sqrt(128))
        heads.append(scores / scores.sum(-1, keepdims=True) @ v)
    attended = np.concatenate(heads, axis=-1) @ weights["attn.out_proj.weight"].T + weights["attn.out_proj.bias"]
    return normalise(attended, "ln_post") @ weights["proj"]


def test_resampler_is_the_originals():
    torch.manual_seed(0)
    module = Resampler(num_queries=5, width=256, kv_width=24)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    patches = torch.randn(2, 3 * 4, 24)
    with torch.no_grad():
        result = module(patches, 3, 4)
    for one, expected in zip(result, patches, strict=True):
        np.testing.assert_allclose(one.numpy(), slow_resampler(module, expected.double().numpy(), 3, 4), rtol=1e-3, atol=1e-3)
    transposed = slow_resampler(module, patches[0].double().numpy(), 4, 3)
    assert np.abs(result[0].numpy() - transposed).max() > 0.1  # rows and columns are told apart


def test_tower_sees_a_picture_in_26_and_a_strip_in_25(path_25, path_26):
    """2.6 gives the tower the whole unit (3, H, W); 2.5 its patches in one line, whose positions then count along the line."""
    for path in (path_25, path_26):
        model, adapter = model_of(path), adapter_with(path)
        seen = []
        record = lambda module, args, kwargs, seen=seen: seen.append(kwargs["pixel_values"])  # noqa: E731
        model.vpm.embeddings.register_forward_pre_hook(record, with_kwargs=True)
        image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (28, 70, 3), dtype=np.uint8))
        vision = adapter.encode(image, "Q", ()).vision
        rows, columns = vision["target_sizes"][0].tolist()
        with torch.no_grad():
            model.get_image_features(vision["pixel_values"], vision["target_sizes"])
        (unit,), _ = adapter.slicing.cut(image)
        whole = torch.tensor(np.asarray(unit)).permute(2, 0, 1)[None] / 255 * 2 - 1
        if path == path_26:
            expected = whole
        else:
            corners = [(14 * row, 14 * column) for row in range(rows) for column in range(columns)]
            expected = torch.cat([whole[..., top : top + 14, left : left + 14] for top, left in corners], dim=-1)
        torch.testing.assert_close(seen[0], expected, rtol=0, atol=1e-6)


# --- checkpoints


def public_names(layers: int, tower_layers: int, attention_biases: tuple[str, ...]) -> set[str]:
    """Weight names of the public checkpoints, written after their index files."""
    names = {"llm.model.embed_tokens.weight", "llm.model.norm.weight", "llm.lm_head.weight"}
    for layer in range(layers):
        inner = [f"self_attn.{part}_proj.weight" for part in "qkvo"] + [f"mlp.{part}_proj.weight" for part in ("gate", "up", "down")]
        inner += [
            "input_layernorm.weight",
            "post_attention_layernorm.weight",
            *(f"self_attn.{part}_proj.bias" for part in attention_biases),
        ]
        names |= {f"llm.model.layers.{layer}.{name}" for name in inner}
    names |= {f"vpm.{name}" for name in ("embeddings.patch_embedding.weight", "embeddings.patch_embedding.bias")}
    names |= {f"vpm.{name}" for name in ("embeddings.position_embedding.weight", "post_layernorm.weight", "post_layernorm.bias")}
    parts = (
        "self_attn.q_proj",
        "self_attn.k_proj",
        "self_attn.v_proj",
        "self_attn.out_proj",
        "layer_norm1",
        "layer_norm2",
        "mlp.fc1",
        "mlp.fc2",
    )
    names |= {f"vpm.encoder.layers.{n}.{part}.{kind}" for n in range(tower_layers) for part in parts for kind in ("weight", "bias")}
    names |= {f"resampler.{name}" for name in ("query", "proj", "kv_proj.weight", "attn.in_proj_weight", "attn.in_proj_bias")}
    norms = [f"{norm}.{kind}" for norm in ("ln_q", "ln_kv", "ln_post") for kind in ("weight", "bias")]
    return names | {f"resampler.{name}" for name in ("attn.out_proj.weight", "attn.out_proj.bias", *norms)}


def test_weights_have_the_public_names(path_25, path_26, tmp_path):
    for path, biases in ((path_25, ()), (path_26, ("q", "k", "v"))):
        expected = public_names(2, 2, biases)
        assert set(load_file(path / "model.safetensors")) == expected
        model_of(path).save_pretrained(tmp_path)
        assert set(load_file(tmp_path / "model.safetensors")) == expected


def test_stored_position_table_is_ignored(path_26, tmp_path):
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((path_26 / name).read_bytes())
    weights = load_file(path_26 / "model.safetensors") | {"resampler.pos_embed": torch.zeros(4, 64)}
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert model_of(tmp_path).config.query_num == 4


def test_saved_config_is_the_public_one(path, tmp_path):
    """Flat, with the address of the models' own code: that code reads what muffin trained."""
    model_of(path).save_pretrained(tmp_path)
    save_adapter(adapter_with(path), tmp_path)
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (path, tmp_path))
    added = {"image_token_id", "transformers_version", "dtype"}
    assert {name: after[name] for name in before} == before and set(after) - set(before) <= added
    assert isinstance(AutoTokenizer.from_pretrained(tmp_path), PreTrainedTokenizerFast)


def test_other_members_of_the_family_are_refused(path_26, tmp_path):
    assert version_of({"hidden_size": 4096}).name == "MiniCPM-Llama3-V 2.5"
    for change, number in (({"version": 4.0}, "4.0"), ({"version": 4.5}, "4.5")):
        (tmp_path / "config.json").write_text(json.dumps(json.loads((path_26 / "config.json").read_text()) | change))
        with pytest.raises(ValueError, match=f"describes MiniCPM-V {number}; supported with model_type minicpmv: 2.5, 2.6"):
            adapter_with(tmp_path)
    with pytest.raises(ValueError, match="describes MiniCPM-V 2.0"):
        version_of({"hidden_size": 2304})


def test_question_is_trimmed_as_llama3s_template_trims_it(path_25, path_26):
    image = Image.new("RGB", (56, 56))
    for path, same in ((path_25, True), (path_26, False)):
        adapter = adapter_with(path)
        assert torch.equal(adapter.encode(image, "Q \n", ()).prompt_ids, adapter.encode(image, "Q", ()).prompt_ids) == same


def test_prompt_is_the_templates(path_26, tmp_path):
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((path_26 / name).read_bytes())
    (tmp_path / "chat_template.jinja").write_text(
        "{% for m in messages %}"
        "{% if loop.first and m.role != 'system' %}<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
        "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    assert adapter_with(path_26).prompt_name == "chatml"
    assert adapter_with(tmp_path).prompt_name == "chatml_system"
    assert adapter_with(tmp_path, prompt_name="chatml").prompt_name == "chatml"
