"""LLaVA-1.5 in both layouts: transformers' (llava-hf/llava-1.5-7b-hf) and the original (liuhaotian/llava-v1.5-7b, openbmb/RLAIF-V-7B).

An original checkpoint is recognised by `mm_vision_tower` in its config. It has a tokenizer.model, no image processor, and sometimes no
vision weights: those come from the tower that its config names. It is saved in the transformers layout.

Prompts and response tokens follow RLAIF-V's LLaVA-1.5 code: the whole conversation is tokenised as one string, a response is everything
after "ASSISTANT:", terminator included (so an answer that begins with a digit, CJK or newline owns the lone "▁" before it).
"""

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from PIL import Image
from tokenizers import AddedToken, Tokenizer, decoders, normalizers, processors
from tokenizers.models import BPE
from torch import Tensor, nn
from transformers import (
    AutoTokenizer,
    CLIPVisionConfig,
    CLIPVisionModel,
    GenerationConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
from transformers.models.llava.modeling_llava import LlavaCausalLMOutputWithPast
from transformers.tokenization_utils_base import generate_merges

from muffin.policies.base import (
    EncodedResponses,
    PolicyOptions,
    PolicySpec,
    SeenImage,
    checkpoint_folder,
    control_texts,
    flat_text_config,
    load_whole,
    refuse_control_texts,
    refuse_incomplete,
    refuse_options,
    room_for_response,
    vision_key,
)

logger = logging.getLogger(__name__)

# Text before "USER:" by prompt name. llava_v1 is RLAIF-V's (training, log-probs, generation), vicuna_v1 the original LLaVA-1.5's.
SYSTEM_PROMPTS = {
    "llava_v1": "A chat between a curious human and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the human's questions. ",
    "vicuna_v1": "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions. ",
    "hf": "",
}
IMAGE_ASPECT_RATIOS = ("pad", "crop")
IMAGE_TOKEN = "<image>"
PAD_TOKEN = "<pad>"

# Original names of weights -> names in memory.
ORIGINAL_NAMES = {
    r"^model\.vision_tower\.vision_tower\.(vision_model\.)?": "model.vision_tower.",
    r"^model\.mm_projector\.0\.": "model.multi_modal_projector.linear_1.",
    r"^model\.mm_projector\.2\.": "model.multi_modal_projector.linear_2.",
    r"^model\.(embed_tokens|layers|norm)\.": r"model.language_model.\1.",
}


class LlavaForConditionalGeneration(transformers.LlavaForConditionalGeneration):
    """transformers' model, with `image_index`: which encoded image each placeholder group shows, so that an image is encoded once however
    often a batch shows it. It keeps its parent's name because save_pretrained writes the class name into config.json.

    A config with `num_output_tokens` (checkpoints that were in the original layout) gives no probability to rows of lm_head behind it.
    """

    # buffers of old transformers versions
    _keys_to_ignore_on_load_unexpected = [r"rotary_emb\.inv_freq", r"embeddings\.position_ids"]

    def __init__(self, config: LlavaConfig) -> None:
        super().__init__(config)
        self.num_output_tokens: int | None = config.to_dict().get("num_output_tokens")

    @classmethod
    def is_custom_code(cls) -> bool:
        """False, so that transformers applies LLaVA's own mapping between checkpoint names and module names."""
        return False

    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        image_index: Tensor | None = None,
        **kwargs: Any,
    ) -> LlavaCausalLMOutputWithPast:
        # `generate` looks these names up in the signature before it uses what they offer
        if image_index is not None:
            features = self.get_image_features(pixel_values=pixel_values).pooler_output
            shown = [features[image] for image in image_index.tolist()]
            pixel_values, mm_encoder_outputs = None, {"image": BaseModelOutputWithPooling(pooler_output=shown)}
        outputs = super().forward(
            input_ids=input_ids,
            pixel_values=pixel_values,
            attention_mask=attention_mask,
            position_ids=position_ids,
            logits_to_keep=logits_to_keep,
            mm_encoder_outputs=mm_encoder_outputs,
            **kwargs,
        )
        if self.num_output_tokens is not None:
            outputs.logits[..., self.num_output_tokens :] = -torch.inf
        return outputs


class Llava15Policy:
    """`PolicyAdapter` of LLaVA-1.5."""

    spec = PolicySpec(
        prefix_sharing=True,
        frozen_modules=("model.vision_tower",),
        lora_targets=r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)",
        quantization_skip=("model.vision_tower", "model.multi_modal_projector", "lm_head"),
    )

    def __init__(
        self,
        tokenizer: transformers.PreTrainedTokenizerBase,
        image_processor: LlavaImageProcessorPil,
        vision: dict[str, Any],
        prompt_name: str,
        image_aspect_ratio: str,
        model_max_length: int,
    ) -> None:
        """vision: patch_size, image_size and feature select strategy, as `load` reads them from the checkpoint's config."""
        if prompt_name not in SYSTEM_PROMPTS:
            raise ValueError(f"--prompt_name {prompt_name} is unknown to LLaVA-1.5; choose from {', '.join(SYSTEM_PROMPTS)}")
        if image_aspect_ratio not in IMAGE_ASPECT_RATIOS:
            raise ValueError(
                f"--image_aspect_ratio {image_aspect_ratio} is unknown to LLaVA-1.5; choose from {', '.join(IMAGE_ASPECT_RATIOS)}"
            )
        self.tokenizer = tokenizer
        self.image_processor = image_processor
        self.vision = vision
        self.prompt_name = prompt_name
        self.image_aspect_ratio = image_aspect_ratio
        self.model_max_length = model_max_length
        self.image_token_id = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
        self.num_image_tokens = (vision["image_size"] // vision["patch_size"]) ** 2 + (vision["select_strategy"] == "full")
        self.terminator_id = tokenizer.eos_token_id
        self._control_texts = control_texts(tokenizer)
        self._check_tokenizer()

    @classmethod
    def load(cls, path: Path, options: PolicyOptions) -> "Llava15Policy":
        """Tokenizer, image processor and sizes of a checkpoint folder in either layout."""
        refuse_options(options, "LLaVA-1.5", ("prompt_name", "image_aspect_ratio"))
        original = _is_original(path)
        config = original_config(path) if original else _config(path)
        image_aspect_ratio = options.image_aspect_ratio or "pad"
        image_files = _vision_tower(path) if original else path
        return cls(
            tokenizer=original_tokenizer(path / "tokenizer.model")
            if original
            else AutoTokenizer.from_pretrained(path, config=config, trust_remote_code=False),
            image_processor=LlavaImageProcessorPil.from_pretrained(image_files, do_pad=image_aspect_ratio == "pad"),
            vision={
                "patch_size": config.vision_config.patch_size,
                "image_size": config.vision_config.image_size,
                "select_strategy": config.vision_feature_select_strategy,
            },
            prompt_name=options.prompt_name or "llava_v1",
            image_aspect_ratio=image_aspect_ratio,
            model_max_length=options.model_max_length,
        )

    def load_model(self, path: Path, **from_pretrained: Any) -> nn.Module:
        if _is_original(path):
            return load_original_model(path, **from_pretrained)
        return load_whole(LlavaForConditionalGeneration, path, config=_config(path), **from_pretrained)

    def empty_model(self, path: Path) -> nn.Module:
        if not _is_original(path):
            return LlavaForConditionalGeneration(_config(path))
        config = original_config(path)
        config.text_config.vocab_size = config.num_output_tokens + 2  # the rows that load_original_model adds
        return LlavaForConditionalGeneration(config)

    def see(self, image: Image.Image) -> SeenImage:
        vision = {"pixel_values": self.image_processor(image, return_tensors="pt").pixel_values}
        return SeenImage(vision, vision_key(vision), IMAGE_TOKEN)

    def encode(self, image: Image.Image, question: str, responses: Sequence[str]) -> EncodedResponses:
        return self.encode_seen(self.see(image), question, responses)

    def encode_seen(self, seen: SeenImage, question: str, responses: Sequence[str]) -> EncodedResponses:
        refuse_control_texts(self._control_texts, question, responses)
        prompt = f"{SYSTEM_PROMPTS[self.prompt_name]}USER: {seen.text}\n{question} ASSISTANT:"
        prompt_ids = self.tokenizer(prompt).input_ids
        room = room_for_response(len(prompt_ids) - 1 + self.num_image_tokens, self.num_image_tokens, self.model_max_length)
        response_ids = tuple(self._response_ids(prompt, prompt_ids, response)[:room] for response in responses)
        at = prompt_ids.index(self.image_token_id)
        expanded = torch.tensor(prompt_ids[:at] + [self.image_token_id] * self.num_image_tokens + prompt_ids[at + 1 :])
        return EncodedResponses(expanded, response_ids, seen.vision, seen.vision_key, torch.arange(len(expanded)))

    def _response_ids(self, prompt: str, prompt_ids: list[int], response: str) -> Tensor:
        ids = self.tokenizer(f"{prompt} {response}{self.tokenizer.eos_token}").input_ids
        if ids[: len(prompt_ids)] != prompt_ids:
            raise ValueError(f"the answer {response[:20]!r}... changes the tokens of its prompt when they are joined; edit its beginning")
        return torch.tensor(ids[len(prompt_ids) :])

    def cat_vision(self, vision: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
        return {"pixel_values": torch.cat([item["pixel_values"] for item in vision])}

    def settings(self) -> dict[str, Any]:
        return {
            "family": "llava",
            "prompt_name": self.prompt_name,
            "image_aspect_ratio": self.image_aspect_ratio,
            "model_max_length": self.model_max_length,
        }

    def save(self, path: Path) -> None:
        LlavaProcessor(
            image_processor=self.image_processor,
            tokenizer=self.tokenizer,
            patch_size=self.vision["patch_size"],
            vision_feature_select_strategy=self.vision["select_strategy"],
            num_additional_image_tokens=1,
            chat_template=self.tokenizer.chat_template,
        ).save_pretrained(path)

    def _check_tokenizer(self) -> None:
        """Raise ValueError unless conversations get the ids that the original LLaVA code gives them."""
        ids = self.tokenizer(f"USER: {IMAGE_TOKEN}\nWhat").input_ids
        if ids.count(self.image_token_id) != 1 or ids.count(self.tokenizer.bos_token_id) != 1 or ids[0] != self.tokenizer.bos_token_id:
            raise ValueError(
                f"the tokenizer must give <s> once, in front, and one id for {IMAGE_TOKEN}; 'USER: {IMAGE_TOKEN}\\nWhat' gave {ids}"
            )
        # sentencepiece text starts with "▁" after every control token; a Metaspace(prepend_scheme="first") tokenizer.json loses it
        space = self.tokenizer.get_vocab().get("▁")
        if space is not None and ids[ids.index(self.image_token_id) + 1] != space:
            raise ValueError(
                f"this tokenizer.json drops the '▁' after {IMAGE_TOKEN}; its log-probs would not be LLaVA-1.5's. Use llava-hf's tokenizer"
            )


def _config(path: Path) -> LlavaConfig:
    config = LlavaConfig.from_pretrained(path)
    config.model_type = "llava"  # transformers looks weight names and the tokenizer's kind up by it; --policy may override another
    return config


# --- the original layout


def _is_original(path: Path) -> bool:
    return "mm_vision_tower" in json.loads((path / "config.json").read_text())


def _vision_tower(path: Path) -> Path:
    tower = json.loads((path / "config.json").read_text())["mm_vision_tower"]
    return checkpoint_folder(tower, source=f"mm_vision_tower in {path / 'config.json'}:")


def original_config(path: Path) -> LlavaConfig:
    """The transformers config of a checkpoint in the original layout. Raises ValueError for variants other than LLaVA-1.5's."""
    values = json.loads((path / "config.json").read_text())
    for name, wanted in (("mm_projector_type", "mlp2x_gelu"), ("mm_use_im_start_end", False)):
        if values.get(name) != wanted:
            raise ValueError(
                f"{path / 'config.json'} has {name} {values.get(name)!r}; LLaVA-1.5 has {wanted!r}, other variants are not supported"
            )
    tower = CLIPVisionConfig.from_pretrained(_vision_tower(path))
    return LlavaConfig(
        vision_config=tower,
        text_config=flat_text_config(LlamaConfig, values),
        image_token_index=values["vocab_size"],
        image_seq_length=(tower.image_size // tower.patch_size) ** 2,
        vision_feature_layer=values["mm_vision_select_layer"],
        vision_feature_select_strategy={"patch": "default", "cls_patch": "full"}[values["mm_vision_select_feature"]],
        num_output_tokens=values["vocab_size"],
    )


def load_original_model(path: Path, **from_pretrained: Any) -> LlavaForConditionalGeneration:
    """The model of a checkpoint in the original layout, with rows for `<image>` and `<pad>` that get no probability.

    Vision weights are the checkpoint's own (RLAIF-V-7B), or those of the tower it names (liuhaotian's).
    """
    model, info = LlavaForConditionalGeneration.from_pretrained(
        path,
        config=original_config(path),
        key_mapping=ORIGINAL_NAMES,
        output_loading_info=True,
        ignore_mismatched_sizes=True,
        **from_pretrained,
    )
    del model._weight_conversions  # the names it was read by; it is saved under transformers' own
    tower = model.model.vision_tower
    vision = {f"model.vision_tower.{name}" for name in tower.state_dict()}
    if vision <= info["missing_keys"]:
        info["missing_keys"] -= vision
        tower.load_state_dict(_load_tower(_vision_tower(path), tower.dtype))
    refuse_incomplete(path, model, info)
    tokens = model.num_output_tokens
    model.resize_token_embeddings(tokens + 2, mean_resizing=False)
    with torch.no_grad():
        for table in (model.get_input_embeddings(), model.get_output_embeddings()):
            table.weight[tokens:] = table.weight[:tokens].mean(dim=0)
    model.config.text_config.pad_token_id = tokens + 1
    # the originals' own generation_config.json sets a temperature without sampling, which save_pretrained refuses
    model.generation_config = GenerationConfig(bos_token_id=1, eos_token_id=2, pad_token_id=tokens + 1)
    return model


def _load_tower(path: Path, dtype: torch.dtype) -> dict[str, Tensor]:
    """Weights of a CLIP checkpoint's vision half."""
    logger.info("taking the vision weights from %s", path)
    tower, info = CLIPVisionModel.from_pretrained(path, dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True)
    refuse_incomplete(path, tower, info | {"unexpected_keys": set()})  # the text half
    return tower.state_dict()


def original_tokenizer(sentencepiece_model: Path) -> PreTrainedTokenizerFast:
    """llava-hf's tokenizer, built from the original's tokenizer.model; `<image>` and `<pad>` follow the vocabulary.

    transformers' own conversion orders merges by id, so that runs of spaces merge first; sentencepiece orders them by score.
    """
    from sentencepiece import SentencePieceProcessor  # only checkpoints in the original layout need it

    if not sentencepiece_model.exists():
        raise ValueError(f"{sentencepiece_model} does not exist; a LLaVA checkpoint in the original layout needs its tokenizer.model")
    pieces = SentencePieceProcessor(model_file=str(sentencepiece_model))
    vocab = {pieces.id_to_piece(number): number for number in range(pieces.get_piece_size())}
    merges = generate_merges(vocab, {piece: pieces.get_score(number) for piece, number in vocab.items()})
    tokenizer = Tokenizer(BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    for group in (("<unk>", "<s>", "</s>"), (IMAGE_TOKEN, PAD_TOKEN)):
        tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in group])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", vocab["<s>"])])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token=PAD_TOKEN,
        extra_special_tokens={"image_token": IMAGE_TOKEN},
        padding_side="left",
    )
