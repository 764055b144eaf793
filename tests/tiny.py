"""Small random things with the shape of the real ones, made in process: a LLaVA-1.5 checkpoint and preference rows.

The checkpoint is in the transformers layout (config.json, model.safetensors, processor_config.json, tokenizer.json), so the code under
test loads it as it loads llava-hf/llava-1.5-7b-hf. Its tokenizer is a real sentencepiece BPE with Llama's settings, 2,000 pieces.
"""

import io
import json
import random
from itertools import product
from pathlib import Path

import torch
from PIL import Image, ImageDraw
from sentencepiece import SentencePieceTrainer, sentencepiece_model_pb2
from tokenizers import AddedToken, Tokenizer, decoders, normalizers, processors
from tokenizers.models import BPE
from transformers import AutoTokenizer, CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.tokenization_utils_base import generate_merges

PIECES = 2000
PATCH = 14
SPARE_ROWS = 62  # embedding rows beyond the tokenizer's, as in llava-hf's 32064 rows for 32002 tokens

# llava-hf's template; muffin's adapters write their own prompt, other code that loads the processor may use it.
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'].upper() + ': ' }}"
    "{% for c in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
    "{% for c in message['content'] | selectattr('type', 'equalto', 'text') %}{{ c['text'] + ' ' }}{% endfor %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)

COLOURS = ("red", "green", "blue", "yellow", "white", "black", "orange", "purple")
SHAPES = ("circle", "square", "triangle", "ring", "bar")

# Words for the tokenizer's corpus beyond those of the answers: enough different ones for 2,000 pieces.
WORDS = """
A chat between a curious human and an artificial intelligence assistant user gives helpful detailed polite answers to the human's
questions USER ASSISTANT What Where How many Which Is Are there Describe picture photograph image shows standing sitting walking
running holding wearing person people woman child children family friends group crowd player driver cyclist tourist worker farmer
doctor teacher student chef painter kitchen bathroom bedroom garden forest mountain river beach ocean harbour street avenue
building church castle bridge station airport market table chair sofa window curtain carpet lamp clock mirror bottle glass plate
spoon knife bowl basket suitcase umbrella backpack newspaper bicycle motorcycle automobile truck train airplane helicopter
sailboat skateboard surfboard wheelchair ambulance tractor scooter wagon horse elephant giraffe zebra sheep goat chicken duck
penguin parrot rabbit squirrel monkey tiger leopard dolphin turtle butterfly spider banana orange apple strawberry pineapple
watermelon broccoli carrot tomato potato sandwich hamburger pancake noodles chocolate coffee foreground background between behind
underneath beside opposite towards around through within outside left right above below corner middle bright dark colourful wooden
metallic transparent striped checkered rectangular circular triangular narrow wide enormous little ancient modern however
therefore although because probably certainly approximately exactly several various different similar another together without
during visible hidden partially completely slightly clearly possibly seems appears suggests indicates reflects represents depicts
contains includes weather sunshine cloudy raining snowing winter summer autumn spring morning evening midnight festival
celebration birthday wedding concert reading writing cooking eating drinking sleeping playing swimming climbing jumping throwing
catching looking smiling laughing talking waiting question answer correct incorrect hallucination evidence description object
attribute relation position number quantity texture material surface
""".split()

# Texts on which tokenizers of this kind differ: digits, CJK, newlines, double spaces, emoji, accents, code-like text.
AWKWARD = (
    "12",
    "3.5 kg, 1984",
    "红色的猫坐在车上。",
    "这是 2 只狗",
    "\nYes",
    "One.\n\nTwo.\n- three\n- four",
    "two  spaces   and three",
    " leading space",
    "🙂 a smile",
    "café naïve émoji 👩‍👩‍👧",
    "http://x.y/z?q=1&r=2",
    '## 1. *bold* it\'s "quoted"; however',
    "x = {'a': [1, 2]}",
    "Здравствуй мир",
)


def train_sentencepiece(path: Path, pieces: int = PIECES) -> Path:
    """Train a byte-fallback BPE with Llama-2's settings on a small built-in corpus and write the model file to `path`.

    As in Llama-2's model, pieces of spaces alone have low ids and the score -1e9, so that sentencepiece merges them last.
    """
    rng = random.Random(0)
    sentences = [" ".join(rng.choices(WORDS, k=12)) for _ in range(400)]
    sentences += [f"The {size} {colour} {shape} is here." for size, colour, shape in product(("small", "large"), COLOURS, SHAPES)]
    sentences += [line for text in AWKWARD for line in text.split("\n") if line] * 3
    sentences += [(" " * rng.randint(2, 9)).join(rng.choices(WORDS, k=12)) for _ in range(100)]
    model = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter(sentences),
        model_writer=model,
        model_type="bpe",
        vocab_size=pieces,
        byte_fallback=True,
        split_digits=True,
        allow_whitespace_only_pieces=True,
        remove_extra_whitespaces=False,
        add_dummy_prefix=True,
        normalization_rule_name="identity",
        character_coverage=0.9995,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        num_threads=1,
        minloglevel=2,
    )
    proto = sentencepiece_model_pb2.ModelProto.FromString(model.getvalue())
    for piece in proto.pieces:
        if set(piece.piece) == {"▁"}:
            piece.score = -1e9
    path.write_bytes(proto.SerializeToString())
    return path


def save_tokenizer(sentencepiece_model: Path, folder: Path) -> int:
    """Write llava-hf's tokenizer files for a sentencepiece model into `folder`; returns the id of `<image>` (`<pad>` follows it).

    generate_merges needs the scores: ordered by id alone, runs of spaces merge first and differ from sentencepiece.
    """
    proto = sentencepiece_model_pb2.ModelProto.FromString(sentencepiece_model.read_bytes())
    vocab = {piece.piece: number for number, piece in enumerate(proto.pieces)}
    merges = generate_merges(vocab, {piece.piece: piece.score for piece in proto.pieces})
    tokenizer = Tokenizer(BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in ("<unk>", "<s>", "</s>")])
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in ("<image>", "<pad>")])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)])
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "LlamaTokenizer",
        "processor_class": "LlavaProcessor",
        "add_bos_token": True,
        "add_eos_token": False,
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "pad_token": "<pad>",
        "image_token": "<image>",
        "extra_special_tokens": {"image_token": "<image>"},
        "legacy": False,
        "padding_side": "left",
        "model_max_length": 4096,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    # AutoTokenizer takes tokenizer.json as it is only for a model_type in its list; LlamaTokenizer rebuilds it without the normalizer.
    (folder / "config.json").write_text(json.dumps({"model_type": "llava"}))
    return len(vocab)


def tiny_llava(
    folder: Path,
    *,
    seed: int = 0,
    image_size: int = 56,
    hidden: int = 64,
    layers: int = 2,
    kv_heads: int = 2,
    sentencepiece_model: Path | None = None,
) -> Path:
    """Save a random LLaVA-1.5 into `folder` and return it: (image_size / 14)^2 image tokens, 16 by default.

    Without `sentencepiece_model` a 2,000-piece one is trained; it is kept as `folder/tokenizer.model`, as hub repositories do.
    initializer_range 0.1 (not 0.02) makes log-probs of different inputs differ by far more than rounding.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if sentencepiece_model is None:
        train_sentencepiece(folder / "tokenizer.model")
    else:
        (folder / "tokenizer.model").write_bytes(sentencepiece_model.read_bytes())
    image_token = save_tokenizer(folder / "tokenizer.model", folder)

    vision = CLIPVisionConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=image_size,
        patch_size=PATCH,
        projection_dim=64,
        initializer_range=0.1,
    )
    text = LlamaConfig(
        vocab_size=image_token + 2 + SPARE_ROWS,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=kv_heads,
        max_position_embeddings=4096,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=image_token + 1,
        initializer_range=0.1,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=image_token,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        image_seq_length=(image_size // PATCH) ** 2,
        initializer_range=0.1,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlavaForConditionalGeneration(config)
    model.save_pretrained(folder)
    side = {"height": image_size, "width": image_size}
    processor = LlavaProcessor(
        image_processor=CLIPImageProcessorPil(size={"shortest_edge": image_size}, crop_size=side),
        tokenizer=AutoTokenizer.from_pretrained(folder),
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )
    processor.save_pretrained(folder)
    return folder


def draw_image(rng: random.Random) -> tuple[bytes, list[tuple[str, str]]]:
    """A PNG of one to three shapes, of varied size and aspect ratio, and what is on it as (colour, shape)."""
    width, height = rng.randint(40, 120), rng.randint(40, 120)
    background, *colours = rng.sample(COLOURS, k=rng.randint(2, 4))
    image = Image.new("RGB", (width, height), background)
    pen = ImageDraw.Draw(image)
    drawn = []
    for colour in colours:
        shape = rng.choice(SHAPES)
        x, y, size = rng.randint(0, width - 20), rng.randint(0, height - 20), rng.randint(10, 20)
        box = (x, y, x + size, y + size)
        if shape == "circle":
            pen.ellipse(box, fill=colour)
        elif shape == "ring":
            pen.ellipse(box, outline=colour, width=3)
        elif shape == "square":
            pen.rectangle(box, fill=colour)
        elif shape == "bar":
            pen.rectangle((x, y, x + size, y + 3), fill=colour)
        else:
            pen.polygon([(x, y + size), (x + size, y + size), (x + size // 2, y)], fill=colour)
        drawn.append((colour, shape))
    file = io.BytesIO()
    image.save(file, format="PNG")
    return file.getvalue(), drawn


def preference_rows(n: int, seed: int = 0) -> list[dict]:
    """`n` rows as RLAIF-V stores them. Of each three rows the first two share image and question, the third asks the same image anew.

    Answers take turns: a long caption against one that goes wrong in the middle, one word against another, an awkward text against
    another, an answer against the same with more behind it.
    """
    rng = random.Random(seed)
    rows = []
    for number in range(n):
        if number % 3 == 0:
            png, drawn = draw_image(rng)
        name = f"scene_{number // 3:05d}.png"
        colour, shape = drawn[0]
        wrong = rng.choice([other for other in COLOURS if other != colour])
        caption = f"The image shows {len(drawn)} shapes. There is a {colour} {shape} in the picture"
        ending = ", and " + " and ".join(f"a {c} {s}" for c, s in drawn) + "." * rng.randint(1, 3)
        awkward = rng.sample(AWKWARD, k=2)
        chosen, rejected = (
            (caption + ending, caption.replace(f"a {colour} {shape}", f"a {wrong} {shape}") + " near a dog."),
            ("Yes", "No, there is nothing of that kind in this image."),
            (awkward[0], awkward[1]),
            (caption + ".", caption + "." + ending[2:]),
        )[number % 4]
        rows.append(
            {
                "ds_name": "tiny",
                "image": {"bytes": png, "path": name},
                "question": f"What is {colour}?" if number % 3 == 2 else "Describe the picture.\nWhat shapes are there?",
                "chosen": chosen,
                "rejected": rejected,
                "origin_dataset": "drawn",
                "origin_split": json.dumps({"model": "none", "type": "generated"}),
                "idx": str(number),
                "image_path": name,
            }
        )
    return rows


def write_parquet(path: Path, n: int, seed: int = 0) -> Path:
    """Write `preference_rows(n, seed)` as the Parquet file that `datasets` writes for RLAIF-V; returns `path`."""
    from datasets import Dataset, Features, Value
    from datasets import Image as ImageFeature

    rows = preference_rows(n, seed)
    features = Features({name: ImageFeature(decode=False) if name == "image" else Value("string") for name in rows[0]})
    path.parent.mkdir(parents=True, exist_ok=True)
    Dataset.from_list(rows, features=features).to_parquet(path)
    return path
