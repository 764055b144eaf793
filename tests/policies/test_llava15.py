"""LLaVA-1.5: token ids, prompts, response spans and pixels are those of the original code."""

import json
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import pre_tokenizers
from transformers import AutoModelForImageTextToText, AutoProcessor, AutoTokenizer, BitsAndBytesConfig

from muffin.policies import PolicyOptions, generation_inputs, load_adapter, load_policy, resolve_checkpoint, save_adapter
from muffin.policies.llava15 import Llava15Policy, original_tokenizer
from tests.policies.tiny_families import tiny_llava_original
from tests.sentencepiece_oracle import IMAGE_TOKEN_INDEX, original_token_ids
from tests.tiny import AWKWARD, tiny_llava

# Written out here on purpose: what RLAIF-V's conv_llava_v1, LLaVA's conv_vicuna_v1 and llava-hf's chat template give.
PROMPTS = {
    "llava_v1": (
        "A chat between a curious human and an artificial intelligence assistant. The assistant gives helpful, detailed, and polite "
        "answers to the human's questions. USER: <image>\n{question} ASSISTANT:"
    ),
    "vicuna_v1": (
        "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, and polite "
        "answers to the user's questions. USER: <image>\n{question} ASSISTANT:"
    ),
    "hf": "USER: <image>\n{question} ASSISTANT:",
}
WORDS = (
    "the image shows a cat sitting on red car 12 3.5 1984 红色 猫 \n \n\n - * émoji 🙂 👩‍👩‍👧 USER: ASSISTANT: "
    'Yes No, it\'s "quoted"; http://x.y/z ## 1. 2) Straße'
).split(" ")
CLIP_MEAN = np.array([0.48145466, 0.4578275, 0.40821073])
CLIP_STD = np.array([0.26862954, 0.26130258, 0.27577711])


@pytest.fixture(scope="module")
def adapter(tiny_llava_path) -> Llava15Policy:
    return load_adapter(resolve_checkpoint(tiny_llava_path), PolicyOptions())


@pytest.fixture
def image() -> Image.Image:
    return noise_image(70, 40)


def noise_image(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(width * height).integers(0, 256, (height, width, 3), dtype=np.uint8))


def with_options(folder: Path, **options) -> Llava15Policy:
    return load_adapter(resolve_checkpoint(folder), PolicyOptions(**options))


def random_text(rng: random.Random) -> str:
    if rng.random() < 0.2:
        return rng.choice(AWKWARD)
    return rng.choice([" ", " ", " ", "  ", "   ", "\n"]).join(rng.choices(WORDS, k=rng.randint(1, 25)))


def collapse(ids: list[int], image_token_id: int) -> list[int]:
    """Expanded ids with the run of image placeholders as the original's single -200."""
    first = ids.index(image_token_id)
    count = ids.count(image_token_id)
    assert ids[first : first + count] == [image_token_id] * count
    return [*ids[:first], IMAGE_TOKEN_INDEX, *ids[first + count :]]


def assert_encodes_as_the_original(adapter: Llava15Policy, sentencepiece_model: Path, conversations: int) -> None:
    rng = random.Random(1)
    picture = Image.new("RGB", (14, 14))
    for _ in range(conversations):
        question, answers = random_text(rng), (random_text(rng), random_text(rng))
        encoded = adapter.encode(picture, question, answers)
        prompt = PROMPTS["llava_v1"].format(question=question)
        prompt_ids = collapse(encoded.prompt_ids.tolist(), adapter.image_token_id)
        assert prompt_ids == original_token_ids(sentencepiece_model, prompt)
        for answer, response in zip(answers, encoded.response_ids, strict=True):
            whole = original_token_ids(sentencepiece_model, f"{prompt} {answer}</s>")
            assert prompt_ids + response.tolist() == whole, (question, answer)


def test_ids_are_the_originals(adapter, tiny_llava_path):
    assert_encodes_as_the_original(adapter, tiny_llava_path / "tokenizer.model", 250)


def test_ids_are_the_originals_with_the_real_tokenizer(llama2_tokenizer_model, tmp_path):
    folder = tiny_llava(tmp_path, hidden=32, layers=1, sentencepiece_model=llama2_tokenizer_model)
    assert_encodes_as_the_original(with_options(folder, model_max_length=100_000), llama2_tokenizer_model, 400)


def test_answer_owns_the_lone_space_before_digits_and_newlines_with_the_real_tokenizer(llama2_tokenizer_model, tmp_path):
    """Llama-2 ids by hand: 29871 "▁", 29896 "1", 29906 "2", 13 newline, 8241 "Yes", 3869 "▁Yes", 2 "</s>"."""
    folder = tiny_llava(tmp_path, hidden=32, layers=1, sentencepiece_model=llama2_tokenizer_model)
    encoded = with_options(folder).encode(Image.new("RGB", (14, 14)), "How many?", ("12", "\nYes", "Yes", ""))
    assert [ids.tolist() for ids in encoded.response_ids] == [[29871, 29896, 29906, 2], [29871, 13, 8241, 2], [3869, 2], [29871, 2]]


@pytest.mark.parametrize("prompt_name", PROMPTS)
def test_prompts_are_byte_for_byte(tiny_llava_path, image, prompt_name):
    adapter = with_options(tiny_llava_path, prompt_name=prompt_name)
    ids = adapter.encode(image, "Is it red?\nWhy", ()).prompt_ids.tolist()
    prompt = PROMPTS[prompt_name].format(question="Is it red?\nWhy")
    assert collapse(ids, adapter.image_token_id) == original_token_ids(tiny_llava_path / "tokenizer.model", prompt)
    assert adapter.prompt_name == prompt_name


def test_llava_v1_and_pad_are_the_defaults(adapter):
    assert adapter.settings() == {"family": "llava", "prompt_name": "llava_v1", "image_aspect_ratio": "pad", "model_max_length": 2048}


@pytest.mark.parametrize(
    ("answer", "pieces"),
    [
        ("12", ["▁", "1", "2", "</s>"]),
        ("\nYes", ["▁", "<0x0A>", "Yes", "</s>"]),
        ("The image", ["▁The", "▁image", "</s>"]),
        ("  red", ["▁▁", "▁red", "</s>"]),
        ("red ASSISTANT: red", ["▁red", "▁ASSISTANT", ":", "▁red", "</s>"]),
        ("", ["▁", "</s>"]),
    ],
)
def test_response_is_everything_after_the_colon(adapter, image, answer, pieces):
    (response,) = adapter.encode(image, "What is there?", (answer,)).response_ids
    assert adapter.tokenizer.convert_ids_to_tokens(response.tolist()) == pieces


@pytest.mark.parametrize("special", ["<image>", "</s>", "<s>", "<unk>", "<pad>"])
def test_control_tokens_in_a_text_are_refused(adapter, image, special):
    with pytest.raises(ValueError, match=f"the question holds '{special}'"):
        adapter.encode(image, f"What is{special}this?", ("Yes",))
    with pytest.raises(ValueError, match=f"the answer holds '{special}'"):
        adapter.encode(image, "What is this?", ("Yes", f"a {special}"))


def test_truncation_cuts_only_the_response(tiny_llava_path, image):
    whole = with_options(tiny_llava_path).encode(image, "What is red?", ("12345678", "1"))
    prompt = len(whole.prompt_ids)
    cut = with_options(tiny_llava_path, model_max_length=prompt + 5).encode(image, "What is red?", ("12345678", "1"))
    assert torch.equal(cut.prompt_ids, whole.prompt_ids)
    assert cut.response_ids[0].tolist() == whole.response_ids[0][:5].tolist()  # "▁1234", and no terminator
    assert cut.response_ids[1].tolist() == whole.response_ids[1].tolist()
    with pytest.raises(ValueError, match=rf"the prompt has {prompt} tokens \(16 of the image\).*--model_max_length {prompt}"):
        with_options(tiny_llava_path, model_max_length=prompt).encode(image, "What is red?", ("1",))


# --- pixels: PIL and numpy, as the original's expand2square and openai's CLIP preprocessing


def clip_pixels(image: Image.Image, side: int) -> np.ndarray:
    """Shortest edge to `side` (bicubic), centre crop, normalise: (3, side, side)."""
    width, height = image.size
    short = min(width, height)
    size = (side, int(side * height / short)) if width == short else (int(side * width / short), side)
    pixels = np.asarray(image.resize(size, Image.Resampling.BICUBIC))
    top, left = (pixels.shape[0] - side) // 2, (pixels.shape[1] - side) // 2
    pixels = pixels[top : top + side, left : left + side]
    return ((pixels / 255.0 - CLIP_MEAN) / CLIP_STD).transpose(2, 0, 1)


def expand2square(image: Image.Image) -> Image.Image:
    width, height = image.size
    side = max(width, height)
    square = Image.new("RGB", (side, side), (122, 116, 104))  # int(255 * mean): 122.77, 116.74, 104.09
    square.paste(image, ((side - width) // 2, (side - height) // 2))
    return square


@pytest.mark.parametrize("size", [(100, 60), (61, 100), (56, 56), (45, 44), (300, 20), (9, 40)])
def test_pixels_are_the_originals(tiny_llava_path, size):
    picture = noise_image(*size)
    expected = {"crop": clip_pixels(picture, 56), "pad": clip_pixels(expand2square(picture), 56)}
    for image_aspect_ratio, pixels in expected.items():
        encoded = with_options(tiny_llava_path, image_aspect_ratio=image_aspect_ratio).encode(picture, "What?", ())
        assert encoded.vision["pixel_values"].shape == (1, 3, 56, 56)
        torch.testing.assert_close(encoded.vision["pixel_values"][0], torch.tensor(pixels).float(), rtol=0, atol=2e-6)
    if size[0] != size[1]:
        assert np.abs(expected["crop"] - expected["pad"]).mean() > 0.1


# --- checkpoints


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt_name": "llava_v2"}, "--prompt_name llava_v2 is unknown to LLaVA-1.5; choose from llava_v1, vicuna_v1, hf"),
        (
            {"max_slice_nums": 4},
            "--max_slice_nums 4 means nothing to LLaVA-1.5; leave it out",
        ),
        ({"image_aspect_ratio": "square"}, "--image_aspect_ratio square is unknown to LLaVA-1.5; choose from pad, crop"),
    ],
)
def test_unknown_options_are_refused(tiny_llava_path, options, message):
    with pytest.raises(ValueError, match=message):
        with_options(tiny_llava_path, **options)


@pytest.mark.parametrize("change", ["missing", "unexpected", "mismatched"])
def test_incomplete_weights_are_refused(tiny_llava_path, tmp_path, change):
    folder = shutil.copytree(tiny_llava_path, tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    name = "language_model.model.layers.0.self_attn.q_proj.weight"
    if change == "missing":
        del weights[name]
    elif change == "unexpected":
        weights["language_model.model.layers.7.self_attn.q_proj.weight"] = weights[name].clone()
    else:
        weights[name] = weights[name][:32].clone()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    checkpoint = resolve_checkpoint(folder)
    with pytest.raises(ValueError, match=rf"1 {change} keys \(.*q_proj"):
        load_policy(checkpoint, load_adapter(checkpoint, PolicyOptions()), dtype=torch.float32)


def test_tokenizer_that_loses_the_space_after_the_image_is_refused(tiny_llava_path, tmp_path):
    folder = shutil.copytree(tiny_llava_path, tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.backend_tokenizer.normalizer = None
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Metaspace("▁", "first", split=False)
    tokenizer.save_pretrained(folder)
    with pytest.raises(ValueError, match="drops the '▁' after <image>"):
        with_options(folder)


def test_saved_options_are_the_next_runs_defaults(tiny_llava_path, tmp_path):
    adapter = with_options(tiny_llava_path, prompt_name="vicuna_v1", image_aspect_ratio="crop", model_max_length=512)
    folder = shutil.copytree(tiny_llava_path, tmp_path / "model")
    save_adapter(adapter, folder)
    assert json.loads((folder / "muffin_policy.json").read_text()) == {"prompt_name": "vicuna_v1", "image_aspect_ratio": "crop"}
    kept = with_options(folder)
    assert (kept.prompt_name, kept.image_aspect_ratio, kept.model_max_length) == ("vicuna_v1", "crop", 2048)
    assert with_options(folder, prompt_name="hf").prompt_name == "hf"
    picture = noise_image(70, 40)
    first, second = (each.encode(picture, "What?", ("red",)) for each in (adapter, kept))
    assert torch.equal(first.prompt_ids, second.prompt_ids) and torch.equal(first.response_ids[0], second.response_ids[0])
    assert first.vision_key == second.vision_key


# --- the original layout


@pytest.fixture(scope="module")
def original_path(tmp_path_factory) -> Path:
    return tiny_llava_original(tmp_path_factory.mktemp("original"))


def last_logits(folder: Path, picture: Image.Image, **from_pretrained) -> torch.Tensor:
    checkpoint = resolve_checkpoint(folder)
    adapter = load_adapter(checkpoint, PolicyOptions())
    model = load_policy(checkpoint, adapter, dtype=torch.float32, **from_pretrained).eval()
    with torch.no_grad():
        return model(**generation_inputs(adapter, [adapter.encode(picture, "What is red?", ())])).logits[0, -1]


@pytest.mark.parametrize("vision_inside", [True, False])
@pytest.mark.parametrize("safetensors", [True, False])
def test_original_layout_is_the_same_model(tmp_path, image, vision_inside, safetensors):
    """The same weights in the transformers layout, cut to the 2,000 rows that the original has; added rows get no probability."""
    folder = tiny_llava_original(tmp_path, vision_inside=vision_inside, safetensors=safetensors)
    logits = last_logits(folder, image)
    assert logits.shape == (2002,) and (logits[2000:] == -torch.inf).all()
    expected = last_logits(folder / "converted", image)[:2000]
    torch.testing.assert_close(logits.log_softmax(-1)[:2000], expected.log_softmax(-1), rtol=0, atol=1e-6)


def test_original_layout_gives_the_originals_ids(original_path):
    assert_encodes_as_the_original(with_options(original_path), original_path / "tokenizer.model", 250)


def test_tokenizer_built_from_the_real_model_gives_the_originals_ids(llama2_tokenizer_model, tmp_path):
    """Built, saved, and loaded as a checkpoint of the transformers layout loads it."""
    tokenizer = original_tokenizer(llama2_tokenizer_model)
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llava"}')
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    rng = random.Random(2)
    assert tokenizer.convert_tokens_to_ids(["<image>", "<pad>"]) == [32000, 32001]
    for _ in range(400):
        text = f"{PROMPTS['llava_v1'].format(question=random_text(rng))} {random_text(rng)}</s>"
        expected = original_token_ids(llama2_tokenizer_model, text)
        for built in (tokenizer, loaded):
            assert [IMAGE_TOKEN_INDEX if token == 32000 else token for token in built(text).input_ids] == expected


def test_original_layout_is_saved_for_transformers(original_path, tmp_path, image):
    """transformers' own classes load what was saved, and differ by the probability of the two added rows alone."""
    checkpoint = resolve_checkpoint(original_path)
    adapter = load_adapter(checkpoint, PolicyOptions())
    load_policy(checkpoint, adapter, dtype=torch.float32).save_pretrained(tmp_path)
    save_adapter(adapter, tmp_path)
    model = AutoModelForImageTextToText.from_pretrained(tmp_path, dtype=torch.float32)
    prompt = PROMPTS["llava_v1"].format(question="What is red?")
    processor = AutoProcessor.from_pretrained(tmp_path)
    with torch.no_grad():
        stock = model(**processor(images=image, text=prompt, return_tensors="pt")).logits[0, -1]
    assert stock.isfinite().all()
    torch.testing.assert_close(stock[:2000], last_logits(original_path, image)[:2000], rtol=0, atol=1e-5)
    torch.testing.assert_close(last_logits(tmp_path, image), last_logits(original_path, image), rtol=0, atol=1e-6)


def test_original_layout_loads_in_four_bits(original_path, image):
    skip = list(Llava15Policy.spec.quantization_skip)
    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", llm_int8_skip_modules=skip, bnb_4bit_compute_dtype=torch.float32
    )
    logits, exact = (last_logits(original_path, image, **kwargs)[:2000].log_softmax(-1) for kwargs in ({"quantization_config": config}, {}))
    assert torch.corrcoef(torch.stack([logits, exact]))[0, 1] > 0.8


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mm_projector_type": "linear"}, "has mm_projector_type 'linear'; LLaVA-1.5 has 'mlp2x_gelu'"),
        ({"mm_use_im_start_end": True}, "has mm_use_im_start_end True; LLaVA-1.5 has False"),
        ({"mm_vision_tower": "./nowhere/clip"}, "mm_vision_tower in .*config.json: ./nowhere/clip does not exist"),
    ],
)
def test_other_original_variants_are_refused(original_path, tmp_path, change, message):
    config = json.loads((original_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(ValueError, match=message):
        with_options(tmp_path)


def test_original_layout_needs_its_tokenizer_model(original_path, tmp_path):
    shutil.copy(original_path / "config.json", tmp_path)
    with pytest.raises(ValueError, match="tokenizer.model does not exist"):
        with_options(tmp_path)


@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.weight", "model.vision_tower.vision_tower.vision_model.post_layernorm.bias"])
def test_original_weights_must_be_whole(original_path, tmp_path, name):
    """One missing weight is refused, also one of the vision tower's: only a tower that is missing as a whole comes from elsewhere."""
    folder = shutil.copytree(original_path, tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    del weights[name]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="1 missing keys"):
        last_logits(folder, noise_image(20, 20))
