"""One tiny random checkpoint per model family, and what the conformance suite cannot work out by itself about the family."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from torch import Tensor, nn
from transformers import (
    CLIPConfig,
    CLIPModel,
    LlavaForConditionalGeneration,
    MiniCPMV4_6Config,
    MiniCPMV4_6ForConditionalGeneration,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3_5TextConfig,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)
from transformers.models.minicpmv4_6.image_processing_pil_minicpmv4_6 import MiniCPMV4_6ImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from muffin.policies.llava15 import Llava15Policy
from muffin.policies.minicpmv import MiniCPMVPolicy
from muffin.policies.minicpmv2 import MiniCPMV, MiniCPMV2Policy, MiniCPMVConfig
from muffin.policies.qwen_vl import Qwen3VLPolicy, Qwen25VLPolicy
from tests.tiny import PIECES, WORDS, tiny_llava


@dataclass(frozen=True)
class Family:
    """adapter: the class that must be chosen. build: writes the checkpoint into a folder.
    placeholder, terminator, bos: texts of the image token, of the token that ends a response, and of the token in front ("" if none).
    golden: text of the encoded prompt of GOLDEN_QUESTION on a 70 x 40 image, control tokens included, written by hand.
    image_features: number of image features that the model makes of an adapter's `vision`.
    vision_modules: name prefixes of everything that is not the language model.
    lora_modules: how many linears the LoRA expression must hit.
    options: PolicyOptions fields the family knows, with a value that is not the default.
    """

    adapter: type
    build: Callable[[Path], Path]
    placeholder: str
    terminator: str
    bos: str
    golden: str
    image_features: Callable[[nn.Module, dict[str, Tensor]], int]
    vision_modules: tuple[str, ...]
    lora_modules: int
    options: dict[str, str | int]


GOLDEN_QUESTION = "Is it 12?\nSay why"


def tiny_llava_original(folder: Path, *, vision_inside: bool = True, safetensors: bool = True) -> Path:
    """The model of `tiny_llava` as the original code would have saved it: flat config, original names, 2,000 rows, tokenizer.model.

    The tower it names is `folder/clip`, a CLIP checkpoint with openai's old processor config; `vision_inside=False` leaves the vision
    weights to it alone, `safetensors=False` writes a pickled file.
    """
    converted = tiny_llava(folder / "converted")
    model = LlavaForConditionalGeneration.from_pretrained(converted)
    (folder / "tokenizer.model").write_bytes((converted / "tokenizer.model").read_bytes())
    text = model.config.text_config
    values = {
        "model_type": "llava_llama",
        "architectures": ["LlavaLlamaForCausalLM"],
        "hidden_size": text.hidden_size,
        "intermediate_size": text.intermediate_size,
        "num_hidden_layers": text.num_hidden_layers,
        "num_attention_heads": text.num_attention_heads,
        "num_key_value_heads": text.num_key_value_heads,
        "max_position_embeddings": text.max_position_embeddings,
        "rms_norm_eps": text.rms_norm_eps,
        "rope_scaling": None,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "tie_word_embeddings": False,
        "vocab_size": PIECES,
        "torch_dtype": "float16",
        "image_aspect_ratio": "pad",
        "mm_hidden_size": 64,
        "mm_projector_type": "mlp2x_gelu",
        "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False,
        "mm_vision_select_feature": "patch",
        "mm_vision_select_layer": -2,
        "mm_vision_tower": str(folder / "clip"),
    }
    (folder / "config.json").write_text(json.dumps(values))
    (folder / "generation_config.json").write_text('{"bos_token_id": 1, "eos_token_id": 2, "temperature": 0.9, "top_p": 0.6}')

    weights = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(8)}  # transformers 4.31 stored this buffer
    clip = {}
    for name, weight in model.state_dict().items():
        part, _, rest = name.removeprefix("model.").partition(".")
        if part == "vision_tower":
            clip[f"vision_model.{rest}"] = weight.contiguous()
        elif part == "multi_modal_projector":
            weights[f"model.mm_projector.{rest.replace('linear_1', '0').replace('linear_2', '2')}"] = weight
        elif part == "language_model":
            weights[f"model.{rest}"] = weight[:PIECES].clone() if rest == "embed_tokens.weight" else weight
        else:
            weights["lm_head.weight"] = weight[:PIECES].clone()
    if vision_inside:
        weights |= {f"model.vision_tower.vision_tower.{name}": weight for name, weight in clip.items()}
        clip = {name: torch.zeros_like(weight) for name, weight in clip.items()}  # must not be read
    smallest = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "vocab_size": 8}
    whole = CLIPModel(CLIPConfig(text_config=smallest, vision_config=model.config.vision_config.to_dict(), projection_dim=64))
    whole.load_state_dict(clip, strict=False)
    whole.save_pretrained(folder / "clip")
    processor = {
        "feature_extractor_type": "CLIPFeatureExtractor",
        "do_resize": True,
        "size": 56,
        "resample": 3,
        "do_center_crop": True,
        "crop_size": 56,
        "do_normalize": True,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
    }
    (folder / "clip" / "preprocessor_config.json").write_text(json.dumps(processor))
    if safetensors:
        save_file({name: weight.clone() for name, weight in weights.items()}, folder / "model.safetensors", metadata={"format": "pt"})
    else:
        torch.save(weights, folder / "pytorch_model.bin")
    return folder


LLAVA15 = Family(
    adapter=Llava15Policy,
    build=tiny_llava,
    placeholder="<image>",
    terminator="</s>",
    bos="<s>",
    # the space before \n is sentencepiece's own, put after every control token
    golden="<s> A chat between a curious human and an artificial intelligence assistant. The assistant gives helpful, detailed, and "
    f"polite answers to the human's questions. USER: {'<image>' * 16} \nIs it 12?\nSay why ASSISTANT:",
    image_features=lambda model, vision: sum(map(len, model.get_image_features(**vision).pooler_output)),
    vision_modules=("model.vision_tower", "model.multi_modal_projector"),
    lora_modules=2 * 7,
    options={"prompt_name": "vicuna_v1", "image_aspect_ratio": "crop"},
)

# Split rule of Qwen2's and Llama-3's tokenizers (they differ in the number of digits that stay together).
WORDS_PATTERN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def save_byte_level_tokenizer(folder: Path, controls: Sequence[str], **config: object) -> PreTrainedTokenizerFast:
    """Write a byte-level BPE with 600 pieces (line breaks in twos merge, as in the real ones) and `controls` behind them."""
    tokenizer = Tokenizer(BPE())
    split = pre_tokenizers.Split(Regex(WORDS_PATTERN), behavior="isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(vocab_size=600, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
    tokenizer.train_from_iterator([*sorted(WORDS), "user", "assistant", "\n\n", "\n\n"] * 2, trainer)
    tokenizer.add_special_tokens([AddedToken(control, normalized=False, special=True) for control in controls])
    saved = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **config)
    saved.save_pretrained(folder)
    return saved


# Two decoder layers with heads of 16; widths of 64, so that 4-bit blocks fit; weights large enough that inputs matter.
SMALL_TEXT = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "initializer_range": 0.2,
}
CHATML = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
MINICPM_MARKS = ("<image>", "</image>", "<slice>", "</slice>", "<image_id>", "</image_id>")


def tiny_minicpmv46(folder: Path) -> Path:
    """A random MiniCPM-V 4.6: 28-pixel patches merge 4 x 4, slices of 112 pixels, one recurrent and one attention layer."""
    names = ("image_start_token", "image_end_token", "slice_start_token", "slice_end_token", "image_id_start_token", "image_id_end_token")
    tokenizer = save_byte_level_tokenizer(
        folder,
        (*CHATML, *MINICPM_MARKS, "<|image_pad|>", "<|video_pad|>"),
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens=dict(zip(names, MINICPM_MARKS, strict=True))
        | {"image_token": "<|image_pad|>", "video_token": "<|video_pad|>"},
    )
    text = Qwen3_5TextConfig(
        vocab_size=len(tokenizer) + 6,
        **SMALL_TEXT,
        head_dim=16,
        layer_types=["linear_attention", "full_attention"],
        linear_key_head_dim=16,
        linear_value_head_dim=16,
        linear_num_key_heads=4,
        linear_num_value_heads=4,
        eos_token_id=tokenizer.eos_token_id,
    )
    layers = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = MiniCPMV4_6Config(
        text_config=text.to_dict(),
        vision_config={**layers, "image_size": 112, "patch_size": 14},
        insert_layer_id=0,
        image_size=112,
        image_token_id=tokenizer.convert_tokens_to_ids("<|image_pad|>"),
        video_token_id=tokenizer.convert_tokens_to_ids("<|video_pad|>"),
        initializer_range=0.2,
    )
    save_random(MiniCPMV4_6ForConditionalGeneration, config, folder)
    MiniCPMV4_6ImageProcessorPil(scale_resolution=112, max_slice_nums=4).save_pretrained(folder)
    return folder


def tiny_qwen_vl(
    folder: Path, model_class: type[PreTrainedModel], config_class: type[PreTrainedConfig], patch: int, **vision: object
) -> Path:
    """A random Qwen-VL: 2 x 2 patches to a token, 4 to 30 tokens an image, head size 16 (8 frequencies: 2 time, 3 rows, 3 columns)."""
    controls = (*CHATML, "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>")
    tokenizer = save_byte_level_tokenizer(folder, controls, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"tokenizer_class": "Qwen2Tokenizer"}))
    config = config_class(
        text_config={
            "vocab_size": len(tokenizer) + 6,
            **SMALL_TEXT,
            "head_dim": 16,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]},
            "bos_token_id": None,
            "eos_token_id": tokenizer.eos_token_id,
        },
        vision_config={
            "depth": 2,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_heads": 2,
            "patch_size": patch,
            "out_hidden_size": SMALL_TEXT["hidden_size"],
            "initializer_range": 0.2,
            **vision,
        },
        initializer_range=0.2,
        image_token_id=tokenizer.convert_tokens_to_ids("<|image_pad|>"),
        video_token_id=tokenizer.convert_tokens_to_ids("<|video_pad|>"),
        vision_start_token_id=tokenizer.convert_tokens_to_ids("<|vision_start|>"),
        vision_end_token_id=tokenizer.convert_tokens_to_ids("<|vision_end|>"),
    )
    save_random(model_class, config, folder)
    token = (2 * patch) ** 2
    Qwen2VLImageProcessorPil(patch_size=patch, min_pixels=4 * token, max_pixels=30 * token).save_pretrained(folder)
    return folder


def tiny_qwen25vl(folder: Path) -> Path:
    return tiny_qwen_vl(folder, Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLConfig, 14, window_size=56, fullatt_block_indexes=[1])


def tiny_qwen3vl(folder: Path) -> Path:
    shape = {"num_position_embeddings": 16, "deepstack_visual_indexes": [0, 1]}
    return tiny_qwen_vl(folder, Qwen3VLForConditionalGeneration, Qwen3VLConfig, 16, **shape)


def tiny_minicpmv2(folder: Path, version: str | None, controls: Sequence[str], bos: str | None, terminator: str, query_num: int) -> Path:
    """A random MiniCPM-V 2.x with the public layout: flat config, tokenizer of a remote class; sides of 56 pixels, up to 4 slices."""
    tokenizer = save_byte_level_tokenizer(
        folder, (*controls, "<unk>", *MINICPM_MARKS), bos_token=bos, eos_token=terminator, unk_token="<unk>"
    )
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    remote = {"tokenizer_class": "MiniCPMVTokenizerFast", "auto_map": {"AutoTokenizer": [None, "tokenization_fast.MiniCPMVTokenizerFast"]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | remote))
    values = {
        "model_type": "minicpmv",
        "architectures": ["MiniCPMV"],
        "auto_map": {"AutoModel": "modeling_minicpmv.MiniCPMV"},
        **SMALL_TEXT,
        "rope_theta": 1000000.0,
        "vocab_size": len(tokenizer) + 6,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "tie_word_embeddings": False,
        "image_size": 56,
        "patch_size": 14,
        "query_num": query_num,
        "slice_config": {"max_slice_nums": 4, "patch_size": 14, "model_type": "minicpmv"},
        "vision_config": {
            "model_type": "siglip",
            "hidden_size": 24,
            "intermediate_size": 48,
            "num_attention_heads": 2,
            "num_hidden_layers": 2,
            "patch_size": 14,
            "image_size": 140,
        },
    }
    if version is not None:
        values["version"] = float(version)
    (folder / "config.json").write_text(json.dumps(values))
    config = MiniCPMVConfig.from_pretrained(folder)
    save_random(MiniCPMV, config, folder)
    (folder / "config.json").write_text(json.dumps(values))
    return folder


def tiny_minicpmv25(folder: Path) -> Path:
    controls = ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
    return tiny_minicpmv2(folder, None, controls, "<|begin_of_text|>", "<|eot_id|>", query_num=6)


def tiny_minicpmv26(folder: Path) -> Path:
    return tiny_minicpmv2(folder, "2.6", CHATML, None, "<|im_end|>", query_num=4)


def save_random(model_class: type[PreTrainedModel], config: PreTrainedConfig, folder: Path) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model_class(config).save_pretrained(folder)


QWEN25VL = Family(
    adapter=Qwen25VLPolicy,
    build=tiny_qwen25vl,
    placeholder="<|image_pad|>",
    terminator="<|im_end|>",
    bos="",
    # 70 x 40 is enlarged to 4 tokens of 28 x 28 pixels at least, rounding up: 84 x 56, 3 x 2 tokens
    golden="<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
    f"<|vision_start|>{'<|image_pad|>' * 6}<|vision_end|>Is it 12?\nSay why<|im_end|>\n<|im_start|>assistant\n",
    image_features=lambda model, vision: sum(map(len, model.get_image_features(**vision).pooler_output)),
    vision_modules=("model.visual",),
    lora_modules=2 * 7,
    options={"prompt_name": "chatml", "max_pixels": 8 * 28 * 28},
)

MINICPMV26 = Family(
    adapter=MiniCPMV2Policy,
    build=tiny_minicpmv26,
    placeholder="<unk>",
    terminator="<|im_end|>",
    bos="",
    # 70 x 40 is less than 56 x 56, so it is not cut
    golden=f"<|im_start|>user\n<image_id>0</image_id><image>{'<unk>' * 4}</image>\nIs it 12?\nSay why<|im_end|>\n<|im_start|>assistant\n",
    image_features=lambda model, vision: sum(
        map(len, model.get_image_features(vision["pixel_values"], vision["target_sizes"]).pooler_output)
    ),
    vision_modules=("vpm", "resampler"),
    lora_modules=2 * 7,
    options={"prompt_name": "chatml_system", "max_slice_nums": 1},
)

FAMILIES: dict[str, Family] = {
    "llava15": LLAVA15,
    "llava15_original": replace(LLAVA15, build=tiny_llava_original),
    "minicpmv46": Family(
        adapter=MiniCPMVPolicy,
        build=tiny_minicpmv46,
        placeholder="<|image_pad|>",
        terminator="<|im_end|>",
        bos="",
        # 70 x 40 is enlarged to 112 * 112 pixels of area: 148 x 84, then 168 x 112 (multiples of 56): 12 x 8 patches, 16 to a token
        golden=f"<|im_start|>user\n<image_id>0</image_id><image>{'<|image_pad|>' * 6}</image>\nIs it 12?\nSay why<|im_end|>\n"
        "<|im_start|>assistant\n",
        image_features=lambda model, vision: sum(
            map(len, model.get_image_features(vision["pixel_values"], vision["target_sizes"]).pooler_output)
        ),
        vision_modules=("model.vision_tower", "model.merger"),
        lora_modules=6 + 7,
        options={"prompt_name": "chatml_no_think", "max_slice_nums": 1, "downsample_mode": "4x"},
    ),
    "qwen25vl": QWEN25VL,
    "qwen3vl": replace(
        QWEN25VL,
        adapter=Qwen3VLPolicy,
        build=tiny_qwen3vl,
        # tokens of 32 x 32: 96 x 64
        golden=f"<|im_start|>user\n<|vision_start|>{'<|image_pad|>' * 6}<|vision_end|>Is it 12?\nSay why<|im_end|>\n"
        "<|im_start|>assistant\n",
        options={"prompt_name": "chatml_system", "max_pixels": 8 * 32 * 32},
    ),
    "minicpmv26": MINICPMV26,
    "minicpmv25": replace(
        MINICPMV26,
        build=tiny_minicpmv25,
        terminator="<|eot_id|>",
        bos="<|begin_of_text|>",
        golden=f"<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n<image>{'<unk>' * 6}</image>\nIs it 12?\nSay why<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
        options={"max_slice_nums": 1},
    ),
}
