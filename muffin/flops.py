"""Analytic cost of a step of a LLaVA-shaped policy: FLOPs of its matrix products (a multiply-add counts two), from the shapes computed.

Norms, softmax, activations, embeddings and the optimizer are left out: a few per cent of the time, next to nothing of the FLOPs.
"""

from dataclasses import astuple, dataclass
from typing import Literal

from transformers import LlavaConfig

from muffin.packing import PackedBatch

Mode = Literal["full", "lora", "score"]


@dataclass(frozen=True)
class Work:
    """What a forward computes.

    images: pictures through the vision tower; tokens: positions through the decoder; attended: (query, key) pairs of causal attention;
    head_rows: positions whose logits are computed.
    """

    images: int
    tokens: int
    attended: int
    head_rows: int

    def __add__(self, other: "Work") -> "Work":
        return Work(*(mine + theirs for mine, theirs in zip(astuple(self), astuple(other), strict=True)))


def packed_work(batch: PackedBatch) -> Work:
    """Work of `muffin.logps.response_logps` on a packed row; every branch attends to its prefix and to itself."""
    attended = sum(
        _causal(span.prefix) + sum(length * span.prefix + _causal(length) for length in span.branches) for span in batch.layout.spans
    )
    return Work(len(batch.vision["pixel_values"]), batch.num_tokens, attended, len(batch.logit_rows))


def padded_work(sequences: int, length: int, head_rows: int) -> Work:
    """Work of a batch of whole sequences padded to `length`, an image in each."""
    return Work(sequences, sequences * length, sequences * _causal(length), head_rows)


def _causal(length: int) -> int:
    return length * (length + 1) // 2


@dataclass(frozen=True)
class ForwardFlops:
    """FLOPs of a forward by the part that spends them; `linears` are the decoder's."""

    vision: int
    projector: int
    linears: int
    attention: int
    head: int


# Passes of each part relative to its forward. A product costs one more for the gradient of its input and one more for that of its weight;
# frozen weights (LoRA's base) save the latter, and a frozen vision tower has no backward at all. Attention has two inputs and no weight.
PASSES: dict[Mode, ForwardFlops] = {
    "full": ForwardFlops(vision=1, projector=3, linears=3, attention=3, head=3),
    "lora": ForwardFlops(vision=1, projector=1, linears=2, attention=3, head=2),
    "score": ForwardFlops(vision=1, projector=1, linears=1, attention=1, head=1),
}


def forward_flops(config: LlavaConfig, work: Work) -> ForwardFlops:
    """FLOPs of one forward; the vision tower is CLIP's with every layer, as transformers runs it. LoRA's own products are left out."""
    vision, text = config.vision_config, config.text_config
    patches = (vision.image_size // vision.patch_size) ** 2
    positions = patches + 1  # the class token
    tower_layer = positions * (4 * vision.hidden_size**2 + 2 * vision.hidden_size * vision.intermediate_size)
    tower_layer += 2 * positions**2 * vision.hidden_size
    patch_embedding = patches * vision.num_channels * vision.patch_size**2 * vision.hidden_size
    query_width = text.num_attention_heads * text.head_dim
    key_width = text.num_key_value_heads * text.head_dim
    decoder_layer = text.hidden_size * (2 * query_width + 2 * key_width + 3 * text.intermediate_size)
    return ForwardFlops(
        vision=2 * work.images * (patch_embedding + vision.num_hidden_layers * tower_layer),
        projector=2 * work.images * patches * text.hidden_size * (vision.hidden_size + text.hidden_size),
        linears=2 * work.tokens * text.num_hidden_layers * decoder_layer,
        attention=4 * work.attended * text.num_hidden_layers * query_width,
        head=2 * work.head_rows * text.hidden_size * text.vocab_size,
    )


def step_flops(config: LlavaConfig, work: Work, mode: Mode) -> int:
    """FLOPs of a training step ("full", "lora"; vision tower frozen, no gradient checkpointing) or of a forward alone ("score")."""
    parts = zip(astuple(PASSES[mode]), astuple(forward_flops(config, work)), strict=True)
    return sum(passes * flops for passes, flops in parts)
