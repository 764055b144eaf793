"""A tiny policy of LLaVA architecture for the tiny world: 1.2 M parameters that learn to see and to talk in two minutes on a CPU.

One CLIP layer on 32 px patches (one image token per cell), three Llama layers, width 128, a tokenizer of about 70 phrases. Two Llama layers
describe as well; as labelers they were only seen to judge whether an object exists, not where it stands, which three learned in one
of two seeds. Its checkpoint folder is an ordinary LLaVA-1.5 one, so that everything in muffin treats it as it treats a 7B model.
"""

import random
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from torch import Tensor, nn
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, PreTrainedTokenizerFast
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

from muffin.policies import save_adapter
from muffin.policies.llava15 import Llava15Policy, LlavaForConditionalGeneration
from muffin.shapeworld.language import vocabulary
from muffin.shapeworld.scenes import CELL_PIXELS, COLORS, SHAPES, SIZES, WORLDS, Scene, World

SPECIAL_TOKENS = ("<unk>", "<pad>", "<s>", "</s>", "<image>")
WIDTH = 128
HEADS = 4
MAX_LENGTH = 256  # tokens; the longest conversation of the world has about 40


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token per phrase of the language, whatever its case; what is no phrase becomes <unk>, white space disappears.

    Decoding puts spaces and sentence capitals back, so decode(encode(text)) is text for every sentence of the language:

        "USER: <image>\\nWhat is on the left? ASSISTANT: Nothing.</s>"
        <s> | user: | <image> | what is | on the left | ? | assistant: | nothing | . | </s>
    """
    phrases = [*vocabulary(), "user:", "assistant:"]
    tokens = [*SPECIAL_TOKENS, *phrases]
    tokenizer = Tokenizer(models.WordLevel({token: number for number, token in enumerate(tokens)}, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    longest_first = sorted(phrases, key=len, reverse=True)
    pattern = "|".join([rf"{_escaped(phrase)}(?![a-z-])" if phrase[-1].isalpha() else _escaped(phrase) for phrase in longest_first])
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(rf"{pattern}|[a-z-]+|[^\sa-z-]"), "removed", invert=True)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", tokens.index("<s>"))])
    capitals = [
        decoders.Replace(Regex(rf"(?:^|(?<=[.?:] )){initial}"), initial.upper()) for initial in sorted({p[0] for p in phrases} - set(".,?"))
    ]
    tokenizer.decoder = decoders.Sequence(
        [decoders.WordPiece(prefix="##", cleanup=True), decoders.Fuse(), decoders.Replace(" i see", " I see"), *capitals]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=["<image>"],
        clean_up_tokenization_spaces=False,
    )


def _escaped(phrase: str) -> str:
    return "".join(f"\\{character}" if character in ".?" else character for character in phrase)


def build_adapter(world: World) -> Llava15Policy:
    """LLaVA-1.5's adapter with the tiny tokenizer; pictures of the world keep their size."""
    side = world.image_size
    return Llava15Policy(
        tokenizer=build_tokenizer(),
        image_processor=LlavaImageProcessorPil(
            do_pad=True,
            size={"shortest_edge": side},
            crop_size={"height": side, "width": side},
            image_mean=[0.5, 0.5, 0.5],
            image_std=[0.25, 0.25, 0.25],
        ),
        vision={"patch_size": CELL_PIXELS, "image_size": side, "select_strategy": "default"},
        prompt_name="hf",
        image_aspect_ratio="pad",
        model_max_length=MAX_LENGTH,
    )


def build_policy(world: World, tokenizer: PreTrainedTokenizerFast, seed: int) -> LlavaForConditionalGeneration:
    """A freshly initialised policy.

    Initial values are larger than the libraries' (0.08 for matrices, 0.5 for CLIP's positions against 0.01 for its patches): with the
    usual ones a model this small sits on the language prior for hundreds of steps.
    """
    torch.manual_seed(seed)
    vision = CLIPVisionConfig(
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=1,
        num_attention_heads=HEADS,
        image_size=world.image_size,
        patch_size=CELL_PIXELS,
        projection_dim=WIDTH,
    )
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=352,
        num_hidden_layers=3,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        max_position_embeddings=MAX_LENGTH,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        tie_word_embeddings=False,
        initializer_range=0.08,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-1,
        image_seq_length=world.grid**2,
        tie_word_embeddings=False,
    )
    policy = LlavaForConditionalGeneration(config)
    for name, parameter in policy.named_parameters():
        if "multi_modal_projector" in name and parameter.dim() == 2:
            nn.init.normal_(parameter, std=0.08)
        elif name.endswith("position_embedding.weight"):
            nn.init.normal_(parameter, std=0.5)
        elif name.endswith("patch_embedding.weight"):
            nn.init.normal_(parameter, std=0.01)
    policy.generation_config.update(
        pad_token_id=tokenizer.pad_token_id, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id
    )
    return policy


def save_policy(policy: LlavaForConditionalGeneration, adapter: Llava15Policy, path: Path) -> None:
    """Write a complete checkpoint folder: weights, configuration, tokenizer, image processor, and the options to load it with."""
    policy.save_pretrained(path)
    save_adapter(adapter, path)


def pretrain_vision(
    policy: LlavaForConditionalGeneration, scenes: Sequence[Scene], pixel_values: Tensor, *, steps: int, seed: int
) -> Iterator[dict[str, float]]:
    """Teach the vision tower what stands in each cell: the stand-in for CLIP's pre-training, 200 steps of 64 pictures.

    Linear heads on every patch feature read colour, shape, size and place; they are thrown away. pixel_values: (scenes, 3, H, W).
    Yields, per step, the loss and the accuracies of colour and shape on cells that hold an object.
    """
    tower = policy.model.vision_tower
    places = {place: cell for cell, place in enumerate(WORLDS[scenes[0].world].places)}
    labels = torch.zeros(len(scenes), len(places), 4, dtype=torch.long)  # 0 stands for an empty cell
    labels[:, :, 3] = torch.arange(len(places))
    for number, scene in enumerate(scenes):
        for thing in scene.objects:
            known = [list(COLORS).index(thing.color) + 1, SHAPES.index(thing.shape) + 1, SIZES.index(thing.size) + 1]
            labels[number, places[thing.place], :3] = torch.tensor(known)
    torch.manual_seed(seed)
    heads = nn.ModuleList(nn.Linear(WIDTH, classes) for classes in (len(COLORS) + 1, len(SHAPES) + 1, len(SIZES) + 1, len(places)))
    optimizer = torch.optim.AdamW([*tower.parameters(), *heads.parameters()], lr=2e-3)
    rng = random.Random(seed)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * min(1, (step + 1) / 20) * (1 - 0.9 * step / steps)
        batch = torch.tensor([rng.randrange(len(scenes)) for _ in range(64)])
        features = tower(pixel_values=pixel_values[batch]).last_hidden_state[:, 1:]
        wanted = labels[batch]
        logits = [head(features) for head in heads]
        loss = sum(nn.functional.cross_entropy(scores.flatten(0, 1), wanted[:, :, k].flatten()) for k, scores in enumerate(logits))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        holds = wanted[:, :, 0] > 0
        right = [(scores.argmax(-1) == wanted[:, :, k])[holds].float().mean().item() for k, scores in enumerate(logits[:2])]
        yield {"loss": loss.item(), "color_accuracy": right[0], "shape_accuracy": right[1]}
