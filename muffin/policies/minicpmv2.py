"""MiniCPM-Llama3-V 2.5 and MiniCPM-V 2.6 without remote code: the public checkpoints' own names (`llm.`, `vpm.`, `resampler.`) and config.

An overview and slices of the image pass through a SigLIP tower; a resampler turns each into a fixed number of tokens for Llama-3 (2.5) or
Qwen2 (2.6). What is saved keeps names and config, so that the models' own code reads it, too.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from transformers import (
    GenerationMixin,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithPooling, CausalLMOutputWithPast
from transformers.models.idefics2.configuration_idefics2 import Idefics2VisionConfig
from transformers.models.idefics2.modeling_idefics2 import Idefics2VisionEmbeddings, Idefics2VisionTransformer

from muffin.policies.base import (
    ChatPolicy,
    PolicyOptions,
    PolicySpec,
    SeenImage,
    flat_rows,
    flat_text_config,
    load_whole,
    refuse_options,
    templates_prompt,
    vision_key,
)

# Text before the image and after the question.
PROMPTS = {
    "llama3": (
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n",
        "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
    ),
    "chatml": ("<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n"),
    "chatml_system": (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n",
        "<|im_end|>\n<|im_start|>assistant\n",
    ),
}
IMAGE_TOKEN = "<unk>"


@dataclass(frozen=True)
class Version:
    """What differs between the two models.

    prompt_names: prompts of PROMPTS that fit; the first where the checkpoint has no chat template.
    patches_in_strip: the tower sees the patches as one line of height 1, so that their positions count along it (2.5).
    new_marks: `<image_id>` in front, and `<slice>` around each slice instead of around all of them (2.6).
    trims_question: its chat template strips white space around the message (2.5).
    """

    name: str
    config_class: type[PreTrainedConfig]
    model_class: type[PreTrainedModel]
    prompt_names: tuple[str, ...]
    terminator: str
    patches_in_strip: bool
    new_marks: bool
    trims_question: bool


VERSIONS = {
    "2.5": Version("MiniCPM-Llama3-V 2.5", LlamaConfig, LlamaForCausalLM, ("llama3",), "<|eot_id|>", True, False, True),
    "2.6": Version("MiniCPM-V 2.6", Qwen2Config, Qwen2ForCausalLM, ("chatml", "chatml_system"), "<|im_end|>", False, True, False),
}


def version_of(config: dict[str, Any]) -> Version:
    """The model a config describes; 2.5's own has no version. Raises ValueError for the other members of the family."""
    number = str(config.get("version", "2.0" if config.get("hidden_size") == 2304 else "2.5"))
    if number not in VERSIONS:
        raise ValueError(f"config.json describes MiniCPM-V {number}; supported with model_type minicpmv: {', '.join(VERSIONS)}")
    return VERSIONS[number]


class MiniCPMVConfig(PreTrainedConfig):
    """The public config.json: fields of the language model on the top level, `vision_config` below, read into two configs in memory."""

    model_type = "minicpmv"

    def __init__(self, **values: Any) -> None:
        version = version_of(values)
        self.decoder = flat_text_config(version.config_class, values)
        tower = {name: value for name, value in values.get("vision_config", {}).items() if name != "model_type"}
        self.tower = Idefics2VisionConfig(**tower)
        super().__init__(**values)

    def get_text_config(self, decoder: bool | None = None, encoder: bool | None = None) -> PreTrainedConfig:
        return self.decoder

    def to_dict(self) -> dict[str, Any]:
        return {name: value for name, value in super().to_dict().items() if name not in ("decoder", "tower")}


class VisionEmbeddings(Idefics2VisionEmbeddings):
    """transformers' embeddings with the originals' positions: they round otherwise where a patch lies on the edge of a bucket."""

    def forward(self, pixel_values: Tensor, patch_attention_mask: Tensor) -> Tensor:
        """(N, 3, H, W) pixels -> (N, patches, hidden), with the positions of a square grid stretched over the slice."""
        patches = self.patch_embedding(pixel_values)
        rows, columns = (position_buckets(count, self.num_patches_per_side) for count in patches.shape[-2:])
        positions = (rows[:, None] * self.num_patches_per_side + columns).flatten().to(patches.device)
        return patches.flatten(2).transpose(1, 2) + self.position_embedding(positions)


def position_buckets(count: int, buckets: int) -> Tensor:
    """(count,) bucket of each of `count` patches spread over [0, 1), on the CPU as in the originals, whose rounding this keeps."""
    boundaries = torch.arange(1 / buckets, 1.0, 1 / buckets)
    return torch.bucketize(torch.arange(0, 1 - 1e-6, 1 / count), boundaries, right=True)


class Resampler(nn.Module):
    """Cross-attention of learned queries to a picture's patches; 2-D sine positions are added to the keys alone."""

    def __init__(self, num_queries: int, width: int, kv_width: int) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.empty(num_queries, width))
        self.kv_proj = nn.Identity() if kv_width == width else nn.Linear(kv_width, width, bias=False)
        self.attn = nn.MultiheadAttention(width, max(width // 128, 1), batch_first=True)
        self.ln_q, self.ln_kv, self.ln_post = (nn.LayerNorm(width, eps=1e-6) for _ in range(3))
        self.proj = nn.Parameter(torch.empty(width, width))

    def forward(self, patches: Tensor, rows: int, columns: int) -> Tensor:
        """patches: (B, rows * columns, kv_width) -> (B, num_queries, width)."""
        values = self.ln_kv(self.kv_proj(patches))
        keys = values + sine_positions(rows, columns, values.shape[-1]).to(values)
        queries = self.ln_q(self.query).expand(len(patches), -1, -1)
        attended = self.attn(queries, keys, values, need_weights=False)[0]
        return self.ln_post(attended) @ self.proj


def sine_positions(rows: int, columns: int, width: int) -> Tensor:
    """(rows * columns, width) float32: sines and cosines of the column, then of the row."""
    frequencies = 1 / 10000 ** (torch.arange(width // 4, dtype=torch.float32) / (width / 4))
    row, column = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    angles = [axis.flatten()[:, None] * frequencies for axis in (column, row)]
    return torch.cat([wave for angle in angles for wave in (angle.sin(), angle.cos())], dim=-1)


class MiniCPMV(PreTrainedModel, GenerationMixin):
    """Both models, under the originals' class name and weight names. `image_index`: which encoded image each placeholder group shows."""

    config_class = MiniCPMVConfig
    base_model_prefix = ""
    main_input_name = "input_ids"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True
    _no_split_modules = ["LlamaDecoderLayer", "Qwen2DecoderLayer", "Idefics2EncoderLayer"]
    _keys_to_ignore_on_load_unexpected = [r"resampler\.pos_embed"]  # a table that some checkpoints store

    def __init__(self, config: MiniCPMVConfig) -> None:
        super().__init__(config)
        self.version = version_of(config.to_dict())
        self.llm = self.version.model_class(config.decoder)
        self.vpm = Idefics2VisionTransformer(config.tower)
        self.vpm.embeddings = VisionEmbeddings(config.tower)
        self.resampler = Resampler(config.query_num, config.decoder.hidden_size, config.tower.hidden_size)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, Resampler):
            init.normal_(module.query, std=0.02)
            init.normal_(module.proj, std=module.proj.shape[0] ** -0.5)

    def get_input_embeddings(self) -> nn.Module:
        return self.llm.get_input_embeddings()

    def get_output_embeddings(self) -> nn.Module:
        """The language model's head."""
        return self.llm.get_output_embeddings()

    def get_image_features(self, pixel_values: Tensor, target_sizes: Tensor, return_dict: bool = True) -> BaseModelOutputWithPooling:
        """pooler_output: (query_num, hidden) per unit. Units of one size pass together: nothing is ever padded.

        pixel_values: (3, patch, n * patch), the patches of all units in a row, line by line; target_sizes: (units, 2) rows and columns.
        """
        patch = self.vpm.config.patch_size
        sizes = [tuple(size) for size in target_sizes.tolist()]
        strips = pixel_values.to(self.vpm.dtype).split([rows * columns * patch for rows, columns in sizes], dim=-1)
        features: dict[int, Tensor] = {}
        for rows, columns in dict.fromkeys(sizes):
            members = [unit for unit, size in enumerate(sizes) if size == (rows, columns)]
            pixels = torch.stack([strips[unit] for unit in members])
            if not self.version.patches_in_strip:
                blocks = pixels.unflatten(-1, (rows, columns, patch))  # (B, 3, patch, rows, columns, patch)
                pixels = blocks.permute(0, 1, 3, 2, 4, 5).reshape(len(members), 3, rows * patch, columns * patch)
            tokens = self.resampler(self.vpm(pixels).last_hidden_state, rows, columns)
            features |= dict(zip(members, tokens, strict=True))
        return BaseModelOutputWithPooling(pooler_output=[features[unit] for unit in range(len(sizes))])

    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        target_sizes: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        image_index: Tensor | None = None,
        units_per_image: Tensor | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """units_per_image: (images,) how many of target_sizes belong to each image, read with image_index alone."""
        if pixel_values is not None:
            mm_encoder_outputs = {"image": self.get_image_features(pixel_values, target_sizes)}
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
        if mm_encoder_outputs is not None and "image" in mm_encoder_outputs:
            units = mm_encoder_outputs["image"].pooler_output
            if image_index is not None:
                ends = list(accumulate(units_per_image.tolist()))
                images = [units[start:end] for start, end in zip([0, *ends], ends, strict=False)]
                units = [unit for image in image_index.tolist() for unit in images[image]]
            shown, slots = torch.cat(units), input_ids == self.config.image_token_id
            if len(shown) != slots.sum():
                raise ValueError(f"{len(shown)} image features for {int(slots.sum())} image tokens")
            inputs_embeds = inputs_embeds.masked_scatter(slots[..., None], shown.to(inputs_embeds.dtype))
        outputs = self.llm.model(inputs_embeds=inputs_embeds, attention_mask=attention_mask, position_ids=position_ids, **kwargs)
        logits = self.llm.lm_head(flat_rows(outputs.last_hidden_state, logits_to_keep))
        return CausalLMOutputWithPast(logits=logits, past_key_values=outputs.past_key_values)


class MiniCPMV2Policy(ChatPolicy):
    """`PolicyAdapter` of MiniCPM-Llama3-V 2.5 and MiniCPM-V 2.6."""

    spec = PolicySpec(
        prefix_sharing=True,
        frozen_modules=("vpm",),
        lora_targets=r".*llm\.model\.layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)",
        quantization_skip=("vpm", "resampler", "llm.lm_head"),
    )

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        version: Version,
        prompt_name: str,
        slicing: "Slicing",
        query_num: int,
        model_max_length: int,
    ) -> None:
        """query_num: image tokens per unit."""
        if prompt_name not in version.prompt_names:
            raise ValueError(f"--prompt_name {prompt_name} is unknown to {version.name}; choose from {', '.join(version.prompt_names)}")
        super().__init__(tokenizer, PROMPTS[prompt_name], version.terminator, IMAGE_TOKEN, model_max_length)
        self.version = version
        self.prompt_name = prompt_name
        self.slicing = slicing
        self.query_num = query_num

    @classmethod
    def load(cls, path: Path, options: PolicyOptions) -> "MiniCPMV2Policy":
        config = json.loads((path / "config.json").read_text())
        version = version_of(config)
        refuse_options(options, version.name, ("prompt_name", "max_slice_nums"))
        tokenizer = PreTrainedTokenizerFast.from_pretrained(path)  # the class that tokenizer_config.json names is remote code
        prompts = {name: PROMPTS[name] for name in version.prompt_names}
        limit = config["slice_config"]["max_slice_nums"] if options.max_slice_nums is None else options.max_slice_nums
        if limit < 1:
            raise ValueError(f"--max_slice_nums {limit} must be at least 1 (1 never cuts an image)")
        return cls(
            tokenizer=tokenizer,
            version=version,
            prompt_name=options.prompt_name or templates_prompt(tokenizer, prompts, "QUESTION"),
            slicing=Slicing(limit, config["image_size"], config["patch_size"]),
            query_num=config["query_num"],
            model_max_length=options.model_max_length,
        )

    def load_model(self, path: Path, **from_pretrained: Any) -> nn.Module:
        return load_whole(MiniCPMV, path, config=self._config(path), **from_pretrained)

    def empty_model(self, path: Path) -> nn.Module:
        return MiniCPMV(self._config(path))

    def _config(self, path: Path) -> MiniCPMVConfig:
        config = MiniCPMVConfig.from_dict(json.loads((path / "config.json").read_text()))
        config.image_token_id = self.image_token_id
        return config

    def see(self, image: Image.Image) -> SeenImage:
        units, grid = self.slicing.cut(image)
        patch = self.slicing.patch_size
        vision = {
            "pixel_values": torch.cat([patch_strip(unit, patch) for unit in units], dim=-1),
            "target_sizes": torch.tensor([(unit.height // patch, unit.width // patch) for unit in units]),
            "units_per_image": torch.tensor([len(units)]),
        }
        return SeenImage(vision, vision_key(vision), self._image_text(grid) + "\n")

    def _image_text(self, grid: tuple[int, int] | None) -> str:
        """Placeholders of the overview and, with a grid of (columns, rows), of the slices, a line per row."""
        tokens = IMAGE_TOKEN * self.query_num
        text = f"<image>{tokens}</image>"
        if self.version.new_marks:
            text = "<image_id>0</image_id>" + text
        if grid is None:
            return text
        columns, rows = grid
        if self.version.new_marks:
            return text + "\n".join([f"<slice>{tokens}</slice>" * columns] * rows)
        return text + "<slice>" + "\n".join([f"<image>{tokens}</image>" * columns] * rows) + "</slice>"

    def _question(self, question: str) -> str:
        return question.rstrip() if self.version.trims_question else question

    def cat_vision(self, vision: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
        return {
            "pixel_values": torch.cat([item["pixel_values"] for item in vision], dim=-1),
            "target_sizes": torch.cat([item["target_sizes"] for item in vision]),
            "units_per_image": torch.cat([item["units_per_image"] for item in vision]),
        }

    def settings(self) -> dict[str, Any]:
        return {
            "family": self.version.name,
            "prompt_name": self.prompt_name,
            "max_slice_nums": self.slicing.max_slice_nums,
            "model_max_length": self.model_max_length,
        }

    def save(self, path: Path) -> None:
        self.tokenizer.save_pretrained(path)


def patch_strip(image: Image.Image, patch: int) -> Tensor:
    """(3, patch, n * patch) float32 in [-1, 1]: the image's n patches side by side, line by line."""
    pixels = torch.from_numpy(np.array(image)).float().div(255).sub(0.5).div(0.5)
    blocks = pixels.permute(2, 0, 1).unflatten(2, (-1, patch)).unflatten(1, (-1, patch))  # (3, rows, patch, columns, patch)
    return blocks.permute(0, 2, 1, 3, 4).flatten(2)


@dataclass(frozen=True)
class Slicing:
    """How an image becomes units (OpenBMB's slice_image): an overview of about side^2 pixels, and slices of that area when it is larger.

    max_slice_nums: largest number of slices; side, patch_size: pixels.
    """

    max_slice_nums: int
    side: int
    patch_size: int

    def cut(self, image: Image.Image) -> tuple[list[Image.Image], tuple[int, int] | None]:
        """Overview and slices, all of sizes that divide by patch_size, and the grid (columns, rows), None for an image that is not cut."""
        width, height = image.size
        grid = self.grid(width, height)
        overview = image.resize(self._fit(width, height), Image.Resampling.BICUBIC)
        if grid is None:
            return [overview], None
        columns, rows = grid
        cell = (_nearest_multiple(width, columns) / columns, _nearest_multiple(height, rows) / rows)
        wide, high = self._fit(*cell)
        large = image.resize((wide * columns, high * rows), Image.Resampling.BICUBIC)
        corners = [(column * wide, row * high) for row in range(rows) for column in range(columns)]
        return [overview, *(large.crop((left, top, left + wide, top + high)) for left, top in corners)], grid

    def grid(self, width: int, height: int) -> tuple[int, int] | None:
        """(columns, rows) whose shape is nearest to the image's, of about as many slices as the image has areas; None for one area."""
        areas = min(math.ceil(width * height / self.side**2), self.max_slice_nums)
        if areas <= 1:
            return None
        numbers = [number for number in (areas - 1, areas, areas + 1) if 1 < number <= self.max_slice_nums]
        grids = [(columns, number // columns) for number in numbers for columns in range(1, number + 1) if number % columns == 0]
        return min(grids, key=lambda grid: abs(math.log(width / height) - math.log(grid[0] / grid[1])))

    def _fit(self, width: float, height: float) -> tuple[int, int]:
        """The size of about side^2 pixels in this shape, in whole patches."""
        ratio = width / height
        height = int(self.side / math.sqrt(ratio))
        return _nearest_multiple(int(height * ratio), self.patch_size), _nearest_multiple(height, self.patch_size)


def _nearest_multiple(length: float, divisor: int) -> int:
    return max(round(length / divisor) * divisor, divisor)
