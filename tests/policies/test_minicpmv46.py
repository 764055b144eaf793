"""MiniCPM-V 4.6: slices, placeholders and options worked out by hand; prompts as the checkpoint's template has them."""

import shutil

import pytest
import torch
from PIL import Image
from transformers import AutoTokenizer

from muffin.policies import PolicyOptions, generation_inputs, load_adapter, load_policy, resolve_checkpoint
from tests.policies.tiny_families import tiny_minicpmv46

# 300 x 150 pixels at slices of 112 x 112: 45000 / 12544 = 3.6, so 3 or 4 slices; the width is twice the height: |ln 2 - ln 3| = 0.41 is
# the least of 1 x 3, 3 x 1 (1.79), 1 x 4, 2 x 2 (both 0.69), 4 x 1 (2.08).
WIDE = Image.linear_gradient("L").resize((300, 150)).convert("RGB")


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return tiny_minicpmv46(tmp_path_factory.mktemp("minicpmv46"))


def adapter_with(path, **options):
    return load_adapter(resolve_checkpoint(path), PolicyOptions(**options))


def prompt_text(adapter, image) -> str:
    return adapter.tokenizer.decode(adapter.encode(image, "Q", ()).prompt_ids.tolist())


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        # overview: height 112 / sqrt 2 = 79, width 158, to multiples of 56: 56 x 168, 4 x 12 patches, 16 to a token.
        # a slice is 100 x 150: height 112 / sqrt(2 / 3) = 137, width 91: 112 x 112, 8 x 8 patches.
        ({}, ("<image>***</image>", "<slice>****</slice>" * 3)),
        ({"max_slice_nums": 1}, ("<image>***</image>", "")),
        # multiples of 28 and 4 patches to a token: 84 x 168 is 6 x 12 patches, 140 x 84 is 10 x 6
        ({"downsample_mode": "4x"}, (f"<image>{'*' * 18}</image>", f"<slice>{'*' * 15}</slice>" * 3)),
    ],
)
def test_wide_image_is_cut_into_three(path, options, expected):
    overview, slices = expected
    text = prompt_text(adapter_with(path, **options), WIDE).replace("<|image_pad|>", "*")
    assert text == f"<|im_start|>user\n<image_id>0</image_id>{overview}{slices}\nQ<|im_end|>\n<|im_start|>assistant\n"


def test_rows_of_slices_are_lines(path):
    """224 x 224 is four times 112 x 112: 2 x 2 slices."""
    text = prompt_text(adapter_with(path), Image.new("RGB", (224, 224), "red")).replace("<|image_pad|>", "*")
    row = "<slice>****</slice>" * 2
    assert f"<image>****</image>{row}\n{row}\nQ" in text


def test_model_downsamples_as_the_adapter_counts(path):
    adapter = adapter_with(path, downsample_mode="4x")
    model = load_policy(resolve_checkpoint(path), adapter, dtype=torch.float32)
    assert model.config.downsample_mode == "4x"
    with torch.no_grad():
        assert model(**generation_inputs(adapter, [adapter.encode(WIDE, "Q", ())])).logits.isfinite().all()


@pytest.mark.parametrize(
    ("closing", "prompt_name"),
    [("", "chatml"), ("<think>\n\n</think>\n\n", "chatml_no_think"), ("<think>\n", None)],
)
def test_prompt_is_the_templates(path, tmp_path, closing, prompt_name):
    folder = shutil.copytree(path, tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% for c in m.content %}{{ '<|image_pad|>\n' if c.type == 'image' else c.text }}"
        "{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n" + closing + "{% endif %}"
    )
    tokenizer.save_pretrained(folder)
    if prompt_name is None:
        with pytest.raises(ValueError, match="choose --prompt_name from chatml, chatml_no_think, chatml_system"):
            adapter_with(folder)
    else:
        assert adapter_with(folder).prompt_name == prompt_name
    assert adapter_with(folder, prompt_name="chatml").prompt_name == "chatml"
