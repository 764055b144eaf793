"""What a model family must say about itself: the `PolicyAdapter` protocol and the type it produces.

An adapter turns (image, question, answers) into token ids and image tensors, and loads and saves the model of its family.
It holds a tokenizer and an image processor but no weights, so it is cheap to build and travels to worker processes.
Everything that differs between families lives in one adapter file; nothing else in muffin names a family.
"""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from huggingface_hub import snapshot_download
from PIL import Image
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from muffin.pairs import PreferencePair

WEIGHT_FILES = "*.safetensors"
CHECKPOINT_FILES = [WEIGHT_FILES, "*.json", "*.model", "*.jinja", "*.txt"]


@dataclass(frozen=True)
class PolicyOptions:
    """Choices that change what a policy sees; recipes take them as flags.

    None takes what the checkpoint was saved with, else the family's default. A family refuses an option that means nothing to it.
    """

    policy: str | None = field(
        default=None, metadata={"help": "Model family (a model_type), for a checkpoint whose config names another; default: its config's."}
    )
    prompt_name: str | None = field(
        default=None,
        metadata={"help": "Conversation template (LLaVA-1.5: llava_v1, vicuna_v1, hf); default: the checkpoint's, else its family's."},
    )
    image_aspect_ratio: str | None = field(
        default=None, metadata={"help": "LLaVA-1.5: pad (whole picture) or crop (centre); default: the checkpoint's, else pad."}
    )
    max_pixels: int | None = field(
        default=None, metadata={"help": "Qwen-VL: pixels an image is shrunk to at most; 28 x 28 (Qwen3-VL: 32 x 32) are a token."}
    )
    max_slice_nums: int | None = field(
        default=None, metadata={"help": "MiniCPM-V: most slices an image is cut into besides its overview; 1 never cuts."}
    )
    downsample_mode: str | None = field(default=None, metadata={"help": "MiniCPM-V 4.6: 16x, or 4x for four times the image tokens."})
    model_max_length: int = field(default=2048, metadata={"help": "Limit on prompt (image included) plus response, in tokens."})

    def flags(self) -> list[str]:
        """The options that were given, as command-line words."""
        return [word for name, value in vars(self).items() if value is not None for word in (f"--{name}", str(value))]


@dataclass(frozen=True)
class PolicySpec:
    """Facts about a family that the rest of muffin acts on.

    prefix_sharing: True for decoders with plain causal softmax attention; recurrent layers cannot share a prefix in a row.
    frozen_modules: name prefixes (in memory) that `--freeze_vision_tower True` freezes.
    lora_targets: regular expression over in-memory module names; language-model linears only.
    quantization_skip: module names that stay unquantised under `--bits 4`: beginnings of full names, or their last parts.
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


@dataclass(frozen=True)
class SeenImage:
    """An image as a family's model takes it: decoded and preprocessed once, for any number of prompts about it.

    vision, vision_key: as in EncodedResponses. text: what stands for the image in a prompt.
    """

    vision: dict[str, Tensor]
    vision_key: str
    text: str


class PolicyAdapter(Protocol):
    """One model family. Implementations: see `muffin.policies.ADAPTERS`."""

    spec: PolicySpec
    tokenizer: Any
    terminator_id: int
    prompt_name: str
    model_max_length: int

    @classmethod
    def load(cls, path: Path, options: PolicyOptions) -> "PolicyAdapter":
        """Build tokenizer and image processor from the checkpoint folder `path`; reads no weights."""
        ...

    def load_model(self, path: Path, **from_pretrained: Any) -> nn.Module:
        """Load the weights of `path`. Raises ValueError on any missing or unexpected key."""
        ...

    def empty_model(self, path: Path) -> nn.Module:
        """The model of `path` from its config alone, with random weights; under torch.device("meta") it takes no memory."""
        ...

    def see(self, image: Image.Image) -> SeenImage:
        """Preprocess an image. Raises ValueError for one that the family cannot take."""
        ...

    def encode_seen(self, seen: SeenImage, question: str, responses: Sequence[str]) -> EncodedResponses:
        """Tokenise one prompt about an image and its responses.

        Raises ValueError when the prompt leaves no room for a response within model_max_length, or when a text holds a special token.
        """
        ...

    def encode(self, image: Image.Image, question: str, responses: Sequence[str]) -> EncodedResponses:
        """`encode_seen` of the image seen; for several prompts about one image see it once."""
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


def generation_inputs(adapter: PolicyAdapter, encoded: Sequence[EncodedResponses]) -> dict[str, Tensor]:
    """Arguments for `model.generate` (stock attention) on several prompts: left-padded input_ids and attention_mask, an image each.

    The same for every family: its model derives whatever else it needs (position ids) from these. Stop at `adapter.terminator_id`.
    For several samples of a prompt use num_return_sequences, which encodes its image once.
    """
    width = max(len(item.prompt_ids) for item in encoded)
    input_ids = torch.full((len(encoded), width), adapter.terminator_id)
    attention_mask = torch.zeros_like(input_ids)
    for row, item in enumerate(encoded):
        input_ids[row, width - len(item.prompt_ids) :] = item.prompt_ids
        attention_mask[row, width - len(item.prompt_ids) :] = 1
    return {"input_ids": input_ids, "attention_mask": attention_mask, **adapter.cat_vision([item.vision for item in encoded])}


# --- blocks that families share


def checkpoint_folder(name_or_path: str | Path, source: str = "--model_name_or_path", *, weights: bool = True) -> Path:
    """The folder of a local path or a hub id (downloaded once to the hub cache; without its weights where they are not wanted).

    Pickled weights are fetched only where a repository has no safetensors; transformers reads them with torch's `weights_only`.
    Raises ValueError naming `source` for a path that does not exist.
    """
    folder = Path(name_or_path)
    if folder.exists():
        return folder
    if folder.is_absolute() or str(name_or_path).startswith("."):
        raise ValueError(f"{source} {name_or_path} does not exist; give a checkpoint folder or a hub id")
    if not weights:
        return Path(snapshot_download(str(name_or_path), allow_patterns=[name for name in CHECKPOINT_FILES if name != WEIGHT_FILES]))
    folder = Path(snapshot_download(str(name_or_path), allow_patterns=CHECKPOINT_FILES))
    if not any(folder.glob("*.safetensors")):
        folder = Path(snapshot_download(str(name_or_path), allow_patterns=[*CHECKPOINT_FILES, "pytorch_model*.bin"]))
    return folder


def flat_text_config(config_class: type[PreTrainedConfig], values: dict[str, Any]) -> PreTrainedConfig:
    """The language model's config out of a config.json that keeps its fields on the top level, among others."""
    own = {"model_type", "architectures", "dtype", "transformers_version", "_name_or_path"}
    known = {"rope_theta", "rope_scaling", *config_class().to_dict()} - own
    return config_class(**{name: value for name, value in values.items() if name in known})


def control_texts(tokenizer: PreTrainedTokenizerBase) -> tuple[str, ...]:
    """Texts that the tokenizer turns into control tokens wherever they stand."""
    return tuple(sorted({token.content for token in tokenizer.added_tokens_decoder.values() if token.special}))


def refuse_control_texts(controls: Sequence[str], question: str, responses: Sequence[str]) -> None:
    """Raise ValueError when a text would be read as a control token: it could end a response early or claim to be an image."""
    for name, text in [("question", question), *(("answer", response) for response in responses)]:
        found = [control for control in controls if control in text]
        if found:
            raise ValueError(f"the {name} holds {found[0]!r}, which the tokenizer reads as a control token; remove it from the text")


def room_for_response(prompt_length: int, image_tokens: int, model_max_length: int) -> int:
    """Tokens left for a response. Raises ValueError when there are none."""
    if prompt_length >= model_max_length:
        raise ValueError(
            f"the prompt has {prompt_length} tokens ({image_tokens} of the image), "
            f"which leaves no room for a response within --model_max_length {model_max_length}"
        )
    return model_max_length - prompt_length


def refuse_options(options: PolicyOptions, family: str, known: Sequence[str]) -> None:
    """Raise ValueError for an option that was given but means nothing to the family."""
    for name, value in vars(options).items():
        if value is not None and name not in ("policy", "model_max_length", *known):
            raise ValueError(
                f"--{name} {value} means nothing to {family}; leave it out (it knows {', '.join(f'--{each}' for each in known)})"
            )


def load_whole(model_class: type[PreTrainedModel], path: Path, **from_pretrained: Any) -> PreTrainedModel:
    """`model_class.from_pretrained(path)`; ValueError on missing, unexpected or mismatched weights, which transformers only reports."""
    model, info = model_class.from_pretrained(path, output_loading_info=True, ignore_mismatched_sizes=True, **from_pretrained)
    refuse_incomplete(path, model, info)
    return model


def refuse_incomplete(path: Path, model: nn.Module, info: dict[str, Any]) -> None:
    """Raise ValueError when from_pretrained's loading info shows missing, unexpected or mismatched weights."""
    problems = {kind: sorted(map(str, info[kind])) for kind in ("missing_keys", "unexpected_keys", "mismatched_keys") if info[kind]}
    if problems:
        summary = "; ".join(f"{len(keys)} {kind.replace('_', ' ')} ({', '.join(keys[:3])})" for kind, keys in problems.items())
        raise ValueError(
            f"{path} does not hold exactly the weights of {type(model).__name__}: {summary}; check that the checkpoint is complete"
        )


class ChatPolicy(ABC):
    """Base of families whose prompt is control tokens around an image and a question, and ends where the answer begins.

    Prompt and responses are tokenised apart: an answer that begins with a line break must not merge with the prompt's last one, since a
    generated answer cannot either. Subclasses set `spec`, the attributes that `__init__` does not, and define `see`.
    """

    spec: PolicySpec
    prompt_name: str

    def __init__(self, tokenizer: PreTrainedTokenizerBase, prompt: tuple[str, str], terminator: str, image_token: str, limit: int) -> None:
        """prompt: text before the image and after the question; limit: model_max_length."""
        self.tokenizer = tokenizer
        self.model_max_length = limit
        self.terminator_id = self._token_id(terminator)
        self.image_token_id = self._token_id(image_token)
        self._prompt = prompt
        self._terminator = terminator
        self._control_texts = tuple(sorted({*control_texts(tokenizer), terminator, image_token}))

    @abstractmethod
    def see(self, image: Image.Image) -> SeenImage:
        """The image's tensors, and the text that stands for it in the prompt (one image token per feature)."""

    def _question(self, question: str) -> str:
        """The question as the family's chat template writes it."""
        return question

    def _position_ids(self, prompt_ids: Tensor, vision: dict[str, Tensor]) -> Tensor:
        return torch.arange(len(prompt_ids))

    def encode(self, image: Image.Image, question: str, responses: Sequence[str]) -> EncodedResponses:
        return self.encode_seen(self.see(image), question, responses)

    def encode_seen(self, seen: SeenImage, question: str, responses: Sequence[str]) -> EncodedResponses:
        refuse_control_texts(self._control_texts, question, responses)
        before, after = self._prompt
        prompt_ids = torch.tensor(self._ids(f"{before}{seen.text}{self._question(question)}{after}"))
        image_tokens = int((prompt_ids == self.image_token_id).sum())
        room = room_for_response(len(prompt_ids), image_tokens, self.model_max_length)
        response_ids = tuple(torch.tensor(self._ids(response + self._terminator)[:room]) for response in responses)
        return EncodedResponses(prompt_ids, response_ids, seen.vision, seen.vision_key, self._position_ids(prompt_ids, seen.vision))

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False).input_ids

    def _token_id(self, token: str) -> int:
        ids = self._ids(token)
        if len(ids) != 1:
            raise ValueError(
                f"the tokenizer reads {token!r} as {len(ids)} tokens, expected one control token; use the checkpoint's own tokenizer"
            )
        return ids[0]


def templates_prompt(tokenizer: PreTrainedTokenizerBase, prompts: dict[str, tuple[str, str]], content: Any) -> str:
    """Name of the prompt that the checkpoint's own chat template writes around `content` (thinking off); the first where it has none.

    content: one user message with an image and the text QUESTION, in the template's form. Raises ValueError when the template writes
    something else, so that a prompt the checkpoint was not trained on is never used silently.
    """
    if tokenizer.chat_template is None:
        return next(iter(prompts))
    message = [{"role": "user", "content": content}]
    written = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True, enable_thinking=False)
    for name, (before, after) in prompts.items():
        if written.startswith(before) and written.endswith(f"QUESTION{after}"):
            return name
    names = ", ".join(prompts)
    raise ValueError(f"the checkpoint's chat template writes {written!r}, a prompt that is unknown here; choose --prompt_name from {names}")


def flat_rows(hidden: Tensor, logits_to_keep: int | Tensor) -> Tensor:
    """Of hidden states (S, T, H) what `lm_head` is needed for: the last n of each row (0: all), or rows of (S * T) as (1, N, H)."""
    if isinstance(logits_to_keep, Tensor):
        return hidden.flatten(0, 1)[logits_to_keep][None]
    return hidden[:, -logits_to_keep:]
