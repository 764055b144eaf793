"""The tiny model and rows are what the other tests stand on: token ids are the original's, the checkpoint loads, rows are as described."""

import io
import random
from itertools import pairwise
from pathlib import Path

import pyarrow.parquet
import pytest
import torch
from PIL import Image
from sentencepiece import SentencePieceProcessor
from transformers import AutoModelForImageTextToText, AutoProcessor, AutoTokenizer

from tests.sentencepiece_oracle import IMAGE_TOKEN_INDEX, original_token_ids
from tests.tiny import AWKWARD, preference_rows, save_tokenizer, tiny_llava, write_parquet

SYSTEM = (
    "A chat between a curious human and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the human's questions."
)
WORDS = (
    "the image shows a cat sitting on red car 12 3.5 1984 红色 猫 \n \n\n - * émoji 🙂 👩‍👩‍👧 "
    'Yes No, it\'s "quoted"; http://x.y/z ## 1. 2) Straße'
).split(" ")


def random_conversation(rng: random.Random) -> str:
    """A LLaVA-1.5 conversation of awkward words, joined by one space, several, or line ends."""

    def text() -> str:
        if rng.random() < 0.2:
            return rng.choice(AWKWARD)
        separator = rng.choice([" ", " ", " ", "  ", " " * rng.randint(3, 9), "\n"])
        return separator.join(rng.choices(WORDS, k=rng.randint(1, 25)))

    return f"{SYSTEM} USER: <image>\n{text()} ASSISTANT: {text()}</s>"


def assert_ids_are_the_originals(folder: Path, sentencepiece_model: Path, conversations: int) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    image = tokenizer.convert_tokens_to_ids("<image>")
    rng = random.Random(0)
    for _ in range(conversations):
        prompt = random_conversation(rng)
        ids = [IMAGE_TOKEN_INDEX if token == image else token for token in tokenizer(prompt).input_ids]
        assert ids == original_token_ids(sentencepiece_model, prompt), prompt


def test_tiny_tokenizer_gives_the_original_ids(tiny_llava_path):
    assert_ids_are_the_originals(tiny_llava_path, tiny_llava_path / "tokenizer.model", 300)


def test_llama2_tokenizer_gives_the_original_ids(llama2_tokenizer_model, tmp_path):
    save_tokenizer(llama2_tokenizer_model, tmp_path)
    assert_ids_are_the_originals(tmp_path, llama2_tokenizer_model, 400)


def test_oracle_on_llama2_ids_known_from_the_original(llama2_tokenizer_model):
    """Llama-2 ids: 3148 1001 = " US" "ER", 29901 ":", 29871 "▁", 13 newline byte, 5618 "What". The image stands between two "▁"."""
    expected = [1, 3148, 1001, 29901, 29871, IMAGE_TOKEN_INDEX, 29871, 13, 5618, 2]
    assert original_token_ids(llama2_tokenizer_model, "USER: <image>\nWhat</s>") == expected


@pytest.mark.parametrize("text", ["12", "猫", "🙂", "\n", "a  b", " a", "The image shows a red circle."])
def test_oracle_round_trips_through_sentencepiece(tiny_llava_path, text):
    """Decoding is sentencepiece's own job: ids of the oracle spell the text, in one "▁"-prefixed sequence behind BOS."""
    model = tiny_llava_path / "tokenizer.model"
    bos, *ids = original_token_ids(model, text)
    sentencepiece = SentencePieceProcessor(model_file=str(model))
    assert bos == 1
    assert "".join(_pieces(sentencepiece, ids)) == "▁" + text.replace(" ", "▁")


def _pieces(sentencepiece: SentencePieceProcessor, ids: list[int]) -> list[str]:
    """Pieces with runs of byte tokens decoded."""
    pieces, pending = [], b""
    for token in ids:
        piece = sentencepiece.id_to_piece(token)
        if sentencepiece.is_byte(token):
            pending += bytes([int(piece[3:-1], 16)])
            continue
        pieces += [pending.decode(), piece]
        pending = b""
    return [*pieces, pending.decode()]


def test_tiny_tokenizer_is_awkward_like_llamas(tiny_llava_path):
    """Byte fallback for newline and emoji, digits one by one, whole English words, space runs merged last."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_llava_path)
    assert tokenizer.tokenize("\n") == ["▁", "<0x0A>"]
    assert tokenizer.tokenize("🦖")[1:] == ["<0xF0>", "<0x9F>", "<0xA6>", "<0x96>"]
    assert tokenizer.tokenize("123") == ["▁", "1", "2", "3"]
    assert tokenizer.tokenize("human picture") == ["▁human", "▁picture"]
    assert tokenizer.tokenize("human  picture") == ["▁human", "▁", "▁picture"]  # merged by id it would be "▁▁", "picture"
    assert len(tokenizer) == 2002


def test_checkpoint_loads_whole_and_sees_its_image(tiny_llava_path):
    model, info = AutoModelForImageTextToText.from_pretrained(tiny_llava_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    processor = AutoProcessor.from_pretrained(tiny_llava_path)
    inputs = [
        processor(images=Image.new("RGB", (70, 50), colour), text="USER: <image>\nWhat? ASSISTANT:", return_tensors="pt")
        for colour in ("red", "blue")
    ]
    assert (inputs[0]["input_ids"] == model.config.image_token_id).sum() == 16
    with torch.no_grad():
        red, blue = (model(**each).logits[0, -1].log_softmax(-1) for each in inputs)
    assert (red - blue).abs().max() > 0.1  # nats: far above the rounding of any dtype under test


def test_tiny_llava_varies_as_asked(tmp_path):
    folder = tiny_llava(tmp_path / "a", seed=1, image_size=28, hidden=32, layers=1, kv_heads=4)
    config = AutoModelForImageTextToText.from_pretrained(folder).config
    assert (config.vision_config.image_size, config.image_seq_length) == (28, 4)
    assert (config.text_config.hidden_size, config.text_config.num_hidden_layers, config.text_config.num_key_value_heads) == (32, 1, 4)
    same = tiny_llava(tmp_path / "b", seed=1, image_size=28, hidden=32, layers=1, kv_heads=4)
    other = tiny_llava(tmp_path / "c", seed=2, image_size=28, hidden=32, layers=1, kv_heads=4)
    weights = [(path / "model.safetensors").read_bytes() for path in (folder, same, other)]
    assert weights[0] == weights[1] != weights[2]


def test_rows_have_rlaifv_columns_and_share_images():
    rows = preference_rows(12, seed=3)
    assert rows == preference_rows(12, seed=3) != preference_rows(12, seed=4)
    columns = ["ds_name", "image", "question", "chosen", "rejected", "origin_dataset", "origin_split", "idx", "image_path"]
    assert all(list(row) == columns for row in rows)
    for row in rows:
        image = Image.open(io.BytesIO(row["image"]["bytes"]))
        assert image.format == "PNG" and len(image.convert("RGB").getcolors()) > 1
        assert row["chosen"] != row["rejected"] and row["chosen"] and row["rejected"]
    assert [row["image"] == other["image"] for row, other in pairwise(rows[:6])] == [True, True, False, True, True]
    assert [row["question"] == other["question"] for row, other in pairwise(rows[:3])] == [True, False]
    assert len({len(row["chosen"]) for row in rows}) > 3


def test_rows_meet_every_awkward_text():
    answers = {answer for row in preference_rows(200) for answer in (row["chosen"], row["rejected"])}
    assert set(AWKWARD) <= answers


def test_parquet_holds_the_rows(tiny_rows_path, tmp_path):
    assert pyarrow.parquet.read_table(tiny_rows_path).to_pylist() == preference_rows(24)
    assert pyarrow.parquet.read_table(write_parquet(tmp_path / "rows.parquet", 2, seed=9)).to_pylist() == preference_rows(2, seed=9)
