"""What a model family must say about itself: the `PolicyAdapter` protocol and the type it produces.

An adapter turns (image, question, answers) into token ids and image tensors, and loads and saves the model of its family.
It holds a tokenizer and an image processor but no weights, so it is cheap to build and travels to worker processes.
Everything that differs between families lives in one adapter file; nothing else in muffin names a family.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from PIL import Image
from torch import Tensor, nn

from muffin.pairs import PreferencePair


@dataclass(frozen=True)
class PolicyOptions:
    """Choices that change what a policy sees. None takes what the checkpoint was saved with, else the family's default.

    prompt_name: name of the conversation template (LLaVA-1.5: llava_v1, vicuna_v1, hf).
    image_aspect_ratio: "pad" (whole picture, padded square) or "crop" (centre crop), for families with square inputs.
    model_max_length: limit on prompt (image tokens included) plus response, in tokens.
    """

    prompt_name: str | None = None
    image_aspect_ratio: str | None = None
    model_max_length: int = 2048


@dataclass(frozen=True)
class PolicySpec:
    """Facts about a family that the rest of muffin acts on.

    prefix_sharing: True for decoders with plain causal softmax attention; recurrent layers cannot share a prefix in a row.
    frozen_modules: name prefixes (in memory) that `--freeze_vision_tower True` freezes.
    lora_targets: regular expression over in-memory module names; language-model linears only.
    quantization_skip: module names (prefixes) that stay unquantised under `--bits 4`.
    """

    prefix_sharing: bool
    frozen_modules: tuple[str, ...]
    lora_targets: str
    quantization_skip: tuple[str, ...]


@dataclass(frozen=True)
class EncodedResponses:
    """One prompt with its K >= 0 responses as token ids; a preference pair has K = 2, chosen before rejected.

    prompt_ids: (L,) int64, image placeholders expanded, BOS once.
    response_ids: K tensors (R_k,) int64: the answer's tokens and one terminator (none if truncated).
    vision: tensors that depend on the image alone, the family's forward arguments by name.
    vision_key: equal for equal images under equal image options, so a batch encodes each distinct image once.
    position_ids: (L,) int64, or (3, L) for M-RoPE; responses continue at max + 1.
    """

    prompt_ids: Tensor
    response_ids: tuple[Tensor, ...]
    vision: dict[str, Tensor]
    vision_key: str
    position_ids: Tensor


class PolicyAdapter(Protocol):
    """One model family. Implementations: see `muffin.policies.ADAPTERS`."""

    spec: PolicySpec
    tokenizer: Any
    prompt_name: str
    model_max_length: int

    @classmethod
    def load(cls, path: Path, options: PolicyOptions) -> "PolicyAdapter":
        """Build tokenizer and image processor from the checkpoint folder `path`; reads no weights."""
        ...

    def load_model(self, path: Path, **from_pretrained: Any) -> nn.Module:
        """Load the weights of `path`. Raises ValueError on any missing or unexpected key."""
        ...

    def encode(self, image: Image.Image, question: str, responses: Sequence[str]) -> EncodedResponses:
        """Tokenise one prompt and its responses.

        Raises ValueError when the prompt leaves no room for a response within model_max_length, or when a text holds a special token.
        """
        ...

    def cat_vision(self, vision: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
        """Join the `vision` of several images into one batch of forward arguments."""
        ...

    def settings(self) -> dict[str, Any]:
        """Everything that changes the encoding, as JSON values: prompt, image options, limits. Part of the reference id."""
        ...

    def save(self, path: Path) -> None:
        """Write tokenizer, image processor and settings, so that `load(path)` gives an equal adapter."""
        ...


def vision_key(vision: dict[str, Tensor]) -> str:
    """Content hash of an image's tensors."""
    digest = hashlib.blake2b(digest_size=16)
    for name in sorted(vision):
        tensor = vision[name].contiguous()
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(tensor.view(torch.uint8).numpy())
    return digest.hexdigest()


def encode_pair(adapter: PolicyAdapter, pair: PreferencePair) -> EncodedResponses:
    """Encode a preference pair as K = 2 responses, chosen first.

    Raises ValueError (with the reason, without the row: callers know it) for anything that makes the pair unusable.
    """
    encoded = adapter.encode(pair.image, pair.question, (pair.chosen, pair.rejected))
    chosen, rejected = encoded.response_ids
    if torch.equal(chosen, rejected):
        raise ValueError(
            f"chosen and rejected are the same {len(chosen)} tokens once encoded (model_max_length {adapter.model_max_length}, "
            f"prompt {len(encoded.prompt_ids)} tokens); raise --model_max_length or drop the row"
        )
    return encoded
