"""Qwen2.5-VL and Qwen3-VL (Qwen/Qwen2.5-VL-7B-Instruct, Qwen/Qwen3-VL-4B-Instruct and other sizes) on transformers' own classes.

Rotary positions have three axes (time, row, column); a response continues at the largest position of its prompt plus one, so an image of
100 tokens may move it by 10 only. transformers' processor needs torchvision, its image processor does not.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from PIL import Image
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.modeling_outputs import BaseModelOutputWithPooling, ModelOutput
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from muffin.policies.base import ChatPolicy, PolicyOptions, PolicySpec, SeenImage, load_whole, refuse_options, templates_prompt, vision_key

# Text before the image and after the question; Qwen2.5-VL's template puts a system message in front, Qwen3-VL's does not.
_QUESTION = ("<|im_start|>user\n<|vision_start|>", "<|im_end|>\n<|im_start|>assistant\n")
PROMPTS = {
    "chatml_system": ("<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n" + _QUESTION[0], _QUESTION[1]),
    "chatml": _QUESTION,
}
IMAGE_TOKEN = "<|image_pad|>"
IMAGE_END = "<|vision_end|>"
TERMINATOR = "<|im_end|>"


class _SharedImages:
    """What both models add to transformers': `image_index` (which image each placeholder group shows), and image positions from ids alone.

    The classes below keep their parents' names because save_pretrained writes the class name into config.json.
    """

    @classmethod
    def is_custom_code(cls) -> bool:
        """False, so that transformers applies its own mapping between checkpoint names and module names."""
        return False

    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        image_grid_thw: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        image_index: Tensor | None = None,
        **kwargs: Any,
    ) -> ModelOutput:
        # `generate` looks these names up in the signature before it uses what they offer
        if image_index is not None:
            encoded = self.get_image_features(pixel_values, image_grid_thw)
            pixel_values, mm_encoder_outputs = None, {"image": _select_images(encoded, image_index.tolist())}
            image_grid_thw = image_grid_thw[image_index]
        if position_ids is None and input_ids is not None:
            kwargs["mm_token_type_ids"] = self._token_types(input_ids)
        return super().forward(
            input_ids=input_ids,
            pixel_values=pixel_values,
            image_grid_thw=image_grid_thw,
            attention_mask=attention_mask,
            position_ids=position_ids,
            logits_to_keep=logits_to_keep,
            mm_encoder_outputs=mm_encoder_outputs,
            **kwargs,
        )

    def _token_types(self, input_ids: Tensor) -> Tensor:
        return (input_ids == self.config.image_token_id).int()

    def _prepare_position_ids_for_generation(self, inputs_tensor: Tensor, model_kwargs: dict[str, Any]) -> Tensor:
        types = {"mm_token_type_ids": self._token_types(inputs_tensor)}
        return super()._prepare_position_ids_for_generation(inputs_tensor, model_kwargs | types)


def _select_images(encoded: ModelOutput, index: list[int]) -> ModelOutput:
    """Vision outputs with their per-image features (of every deepstack level, too) in the order of `index`."""
    chosen = {"pooler_output": [encoded.pooler_output[image] for image in index]}
    if "deepstack_features" in encoded:
        chosen["deepstack_features"] = [[level[image] for image in index] for level in encoded.deepstack_features]
    return type(encoded)(**chosen)


class Qwen2_5_VLForConditionalGeneration(_SharedImages, transformers.Qwen2_5_VLForConditionalGeneration):
    """transformers' model whose forward takes an image once for several responses."""


class Qwen3VLForConditionalGeneration(_SharedImages, transformers.Qwen3VLForConditionalGeneration):
    """transformers' model whose forward takes an image once for several responses."""


class QwenVLPolicy(ChatPolicy):
    """What the adapters of both models share; the classes below name the model and its default prompt."""

    model_class: type[PreTrainedModel]
    name: str
    family: str
    prompt_names: tuple[str, ...]  # the first where the checkpoint has no chat template

    spec = PolicySpec(
        prefix_sharing=True,
        frozen_modules=("model.visual",),
        lora_targets=r".*language_model\.layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)",
        quantization_skip=("model.visual", "lm_head"),
    )

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        image_processor: Qwen2VLImageProcessorPil,
        prompt_name: str,
        model_max_length: int,
    ) -> None:
        if prompt_name not in PROMPTS:
            raise ValueError(f"--prompt_name {prompt_name} is unknown to {self.name}; choose from {', '.join(self.prompt_names)}")
        super().__init__(tokenizer, PROMPTS[prompt_name], TERMINATOR, IMAGE_TOKEN, model_max_length)
        self.image_processor = image_processor
        self.prompt_name = prompt_name

    @classmethod
    def load(cls, path: Path, options: PolicyOptions) -> "QwenVLPolicy":
        refuse_options(options, cls.name, ("prompt_name", "max_pixels"))
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
        image_processor = Qwen2VLImageProcessorPil.from_pretrained(path)
        if options.max_pixels is not None:
            least = image_processor.size["shortest_edge"]
            if options.max_pixels < least:
                raise ValueError(f"--max_pixels {options.max_pixels} is below the {least} pixels that {cls.name} enlarges small images to")
            image_processor.size = {"shortest_edge": least, "longest_edge": options.max_pixels}
        prompts = {name: PROMPTS[name] for name in cls.prompt_names}
        content = [{"type": "image"}, {"type": "text", "text": "QUESTION"}]
        return cls(
            tokenizer=tokenizer,
            image_processor=image_processor,
            prompt_name=options.prompt_name or templates_prompt(tokenizer, prompts, content),
            model_max_length=options.model_max_length,
        )

    def load_model(self, path: Path, **from_pretrained: Any) -> nn.Module:
        return load_whole(self.model_class, path, **from_pretrained)

    def empty_model(self, path: Path) -> nn.Module:
        return self.model_class(self.model_class.config_class.from_pretrained(path))

    def see(self, image: Image.Image) -> SeenImage:
        processed = self.image_processor(image, return_tensors="pt")
        vision = {"pixel_values": processed["pixel_values"], "image_grid_thw": processed["image_grid_thw"]}
        tokens = int(vision["image_grid_thw"].prod()) // self.image_processor.merge_size**2
        return SeenImage(vision, vision_key(vision), IMAGE_TOKEN * tokens + IMAGE_END)

    def _position_ids(self, prompt_ids: Tensor, vision: dict[str, Tensor]) -> Tensor:
        """(3, L): text counts on all three axes; image tokens stand at (0, row, column) from where the text stopped."""
        before = int((prompt_ids == self.image_token_id).nonzero()[0])
        rows, columns = (vision["image_grid_thw"][0, 1:] // self.image_processor.merge_size).tolist()
        row, column = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
        image = torch.stack([torch.zeros_like(row), row, column]).flatten(1) + before
        after = len(prompt_ids) - before - rows * columns
        text = torch.arange(after) + before + max(rows, columns)
        return torch.cat([torch.arange(before).expand(3, -1), image, text.expand(3, -1)], dim=1)

    def cat_vision(self, vision: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
        """pixel_values (patches of all images, values per patch), image_grid_thw (images, 3)."""
        return {name: torch.cat([item[name] for item in vision]) for name in vision[0]}

    def settings(self) -> dict[str, Any]:
        return {
            "family": self.family,
            "prompt_name": self.prompt_name,
            "max_pixels": self.image_processor.size["longest_edge"],
            "model_max_length": self.model_max_length,
        }

    def save(self, path: Path) -> None:
        self.tokenizer.save_pretrained(path)
        self.image_processor.save_pretrained(path)


class Qwen25VLPolicy(QwenVLPolicy):
    """`PolicyAdapter` of Qwen2.5-VL."""

    model_class = Qwen2_5_VLForConditionalGeneration
    name = "Qwen2.5-VL"
    family = "qwen2_5_vl"
    prompt_names = ("chatml_system", "chatml")


class Qwen3VLPolicy(QwenVLPolicy):
    """`PolicyAdapter` of Qwen3-VL."""

    model_class = Qwen3VLForConditionalGeneration
    name = "Qwen3-VL"
    family = "qwen3_vl"
    prompt_names = ("chatml", "chatml_system")
