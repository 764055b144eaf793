"""MiniCPM-V 4.6 (openbmb/MiniCPM-V-4.6) on transformers' own classes: a SigLIP tower over an overview and slices of the image, and Qwen3.5.

Its text model is a hybrid with recurrent layers, so responses cannot share a prefix; the image is still encoded once per pair.
transformers' processor needs torchvision, its image processor does not: the placeholder text is written here.
"""

from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
import transformers
from PIL import Image
from torch import Tensor, nn
from transformers import AutoTokenizer, MiniCPMV4_6Config, PreTrainedTokenizerBase
from transformers.modeling_outputs import BaseModelOutputWithPooling, CausalLMOutputWithPast
from transformers.models.minicpmv4_6.image_processing_pil_minicpmv4_6 import MiniCPMV4_6ImageProcessorPil

from muffin.policies.base import (
    ChatPolicy,
    PolicyOptions,
    PolicySpec,
    SeenImage,
    flat_rows,
    load_whole,
    refuse_options,
    templates_prompt,
    vision_key,
)

# Text before the image and after the question. no_think closes the empty thought that Qwen3.5 templates put before a plain answer.
PROMPTS = {
    "chatml": ("<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n"),
    "chatml_no_think": ("<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"),
    "chatml_system": (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n",
        "<|im_end|>\n<|im_start|>assistant\n",
    ),
}
TERMINATOR = "<|im_end|>"
# Patches per image token.
DOWNSAMPLE_MODES = {"16x": 16, "4x": 4}


class MiniCPMV4_6ForConditionalGeneration(transformers.MiniCPMV4_6ForConditionalGeneration):
    """transformers' model with `logits_to_keep` (rows of the flattened batch) and `image_index` (which image each row shows).

    It keeps its parent's name because save_pretrained writes the class name into config.json.
    """

    @classmethod
    def is_custom_code(cls) -> bool:
        """False, so that transformers applies its own mapping between checkpoint names and module names."""
        return False

    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        target_sizes: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        image_index: Tensor | None = None,
        units_per_image: Tensor | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """target_sizes: (units, 2) patches of each unit (overview or slice); units_per_image: (images,), read with image_index alone.

        `generate` looks the other names up in the signature before it uses what they offer.
        """
        if image_index is not None:
            units = self.get_image_features(pixel_values, target_sizes).pooler_output
            ends = list(accumulate(units_per_image.tolist()))
            images = [units[start:end] for start, end in zip([0, *ends], ends, strict=False)]
            shown = [unit for image in image_index.tolist() for unit in images[image]]
            pixel_values, mm_encoder_outputs = None, {"image": BaseModelOutputWithPooling(pooler_output=shown)}
        outputs = self.model(
            input_ids=input_ids,
            pixel_values=pixel_values,
            target_sizes=target_sizes,
            attention_mask=attention_mask,
            position_ids=position_ids,
            mm_encoder_outputs=mm_encoder_outputs,
            **kwargs,
        )
        logits = self.lm_head(flat_rows(outputs.last_hidden_state, logits_to_keep))
        return CausalLMOutputWithPast(logits=logits, past_key_values=outputs.past_key_values)


class MiniCPMVPolicy(ChatPolicy):
    """`PolicyAdapter` of MiniCPM-V 4.6."""

    spec = PolicySpec(
        prefix_sharing=False,
        frozen_modules=("model.vision_tower",),
        lora_targets=r".*language_model\.layers\.\d+\."
        r"(self_attn\.[qkvo]_proj|linear_attn\.(in_proj_qkv|in_proj_z|out_proj)|mlp\.(gate|up|down)_proj)",
        quantization_skip=("model.vision_tower", "model.merger", "in_proj_a", "in_proj_b", "lm_head"),
    )

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        image_processor: MiniCPMV4_6ImageProcessorPil,
        image_token: str,
        prompt_name: str,
        model_max_length: int,
    ) -> None:
        if prompt_name not in PROMPTS:
            raise ValueError(f"--prompt_name {prompt_name} is unknown to MiniCPM-V 4.6; choose from {', '.join(PROMPTS)}")
        super().__init__(tokenizer, PROMPTS[prompt_name], TERMINATOR, image_token, model_max_length)
        self.image_processor = image_processor
        self.image_token = image_token
        self.prompt_name = prompt_name

    @classmethod
    def load(cls, path: Path, options: PolicyOptions) -> "MiniCPMVPolicy":
        refuse_options(options, "MiniCPM-V 4.6", ("prompt_name", "max_slice_nums", "downsample_mode"))
        config = MiniCPMV4_6Config.from_pretrained(path)
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
        image_processor = MiniCPMV4_6ImageProcessorPil.from_pretrained(path)
        if options.max_slice_nums is not None:
            image_processor.max_slice_nums = options.max_slice_nums
        image_processor.downsample_mode = options.downsample_mode or config.downsample_mode
        if image_processor.max_slice_nums < 1:
            raise ValueError(f"--max_slice_nums {image_processor.max_slice_nums} must be at least 1 (1 never cuts an image)")
        if image_processor.downsample_mode not in DOWNSAMPLE_MODES:
            raise ValueError(f"--downsample_mode {image_processor.downsample_mode} is unknown; choose from {', '.join(DOWNSAMPLE_MODES)}")
        content = [{"type": "image"}, {"type": "text", "text": "QUESTION"}]
        return cls(
            tokenizer=tokenizer,
            image_processor=image_processor,
            image_token=tokenizer.convert_ids_to_tokens(config.image_token_id),
            prompt_name=options.prompt_name or templates_prompt(tokenizer, PROMPTS, content),
            model_max_length=options.model_max_length,
        )

    def load_model(self, path: Path, **from_pretrained: Any) -> nn.Module:
        mode = self.image_processor.downsample_mode
        return load_whole(MiniCPMV4_6ForConditionalGeneration, path, downsample_mode=mode, **from_pretrained)

    def empty_model(self, path: Path) -> nn.Module:
        mode = self.image_processor.downsample_mode
        return MiniCPMV4_6ForConditionalGeneration(MiniCPMV4_6Config.from_pretrained(path, downsample_mode=mode))

    def see(self, image: Image.Image) -> SeenImage:
        processed = self.image_processor(image, return_tensors="pt")
        target_sizes = processed["target_sizes"].long()
        counts = (target_sizes.prod(dim=-1) // DOWNSAMPLE_MODES[self.image_processor.downsample_mode]).tolist()
        (grid,) = processed["grids"]
        vision = {
            "pixel_values": processed["pixel_values"],
            "target_sizes": target_sizes,
            "units_per_image": torch.tensor([len(target_sizes)]),
        }
        return SeenImage(vision, vision_key(vision), self._image_text(counts, *grid) + "\n")

    def _image_text(self, counts: list[int], rows: int, columns: int) -> str:
        """Placeholders of the overview and of each slice, a line per row of slices; counts: image tokens per unit."""
        tokens = self.tokenizer
        text = f"{tokens.image_id_start_token}0{tokens.image_id_end_token}"
        text += f"{tokens.image_start_token}{self.image_token * counts[0]}{tokens.image_end_token}"
        slices = [f"{tokens.slice_start_token}{self.image_token * count}{tokens.slice_end_token}" for count in counts[1:]]
        return text + "\n".join("".join(slices[row * columns : (row + 1) * columns]) for row in range(rows))

    def cat_vision(self, vision: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
        return {
            "pixel_values": torch.cat([item["pixel_values"] for item in vision], dim=-1),
            "target_sizes": torch.cat([item["target_sizes"] for item in vision]),
            "units_per_image": torch.cat([item["units_per_image"] for item in vision]),
        }

    def settings(self) -> dict[str, Any]:
        return {
            "family": "minicpmv4_6",
            "prompt_name": self.prompt_name,
            "max_slice_nums": self.image_processor.max_slice_nums,
            "downsample_mode": self.image_processor.downsample_mode,
            "model_max_length": self.model_max_length,
        }

    def save(self, path: Path) -> None:
        self.tokenizer.save_pretrained(path)
        self.image_processor.save_pretrained(path)
