"""Random LLaVA-shaped models over other decoders, and hand-made prompts, for the log-prob tests: cases no tokenizer would produce."""

from collections.abc import Sequence
from types import SimpleNamespace

import torch
from torch import Tensor, nn
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, PretrainedConfig, Qwen2Config

from muffin.policies.base import EncodedResponses, PolicySpec
from muffin.policies.llava15 import LlavaForConditionalGeneration

IMAGE_TOKEN_ID = 90
IMAGE_TOKENS = 4
VOCABULARY = 100
LORA_TARGETS = r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"

# What `pack` needs to know of a family.
SHARING = SimpleNamespace(
    spec=PolicySpec(True, (), LORA_TARGETS, ()), cat_vision=lambda items: {"pixel_values": torch.cat([v["pixel_values"] for v in items])}
)
PADDING = SimpleNamespace(spec=PolicySpec(False, (), LORA_TARGETS, ()), cat_vision=SHARING.cat_vision)

TEXT_CONFIGS: dict[str, type[PretrainedConfig]] = {"llama": LlamaConfig, "qwen2": Qwen2Config}


def decoder(
    name: str = "llama",
    kv_heads: int = 4,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
    hidden: int = 32,
    initializer_range: float = 0.2,
) -> nn.Module:
    """A LLaVA with 2 decoder layers and 4 image tokens, in eval mode; the wide initialisation makes wrong inputs show clearly."""
    text = TEXT_CONFIGS[name](
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=kv_heads,
        max_position_embeddings=128,
        initializer_range=initializer_range,
    )
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14, projection_dim=16
    )
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_id=IMAGE_TOKEN_ID, initializer_range=initializer_range)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlavaForConditionalGeneration(config).to(dtype).eval()


def prompt(responses: Sequence[Sequence[int]], question: Sequence[int] = (5, 6, 7), image: int = 0) -> EncodedResponses:
    """BOS, image, question and the given responses as token ids; `image` seeds the pixels."""
    pixels = torch.randn(1, 3, 28, 28, generator=torch.Generator().manual_seed(image), dtype=torch.float64)
    ids = torch.tensor([1, *[IMAGE_TOKEN_ID] * IMAGE_TOKENS, *question])
    return EncodedResponses(ids, tuple(torch.tensor(r) for r in responses), {"pixel_values": pixels}, str(image), torch.arange(len(ids)))


def plain_sequences(encoded: Sequence[EncodedResponses]) -> list[tuple[Tensor, Tensor, Tensor]]:
    """(input_ids (1, L), labels (1, L), pixel_values) of every response on its own: what the plain path is given."""
    sequences = []
    for item in encoded:
        for response in item.response_ids:
            ids = torch.cat([item.prompt_ids, response])[None]
            labels = ids.clone()
            labels[:, : len(item.prompt_ids)] = -100
            sequences.append((ids, labels, item.vision["pixel_values"]))
    return sequences
