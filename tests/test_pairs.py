"""Rows of every stored form become the pairs they should; rows and files that cannot be used are refused by name."""

import dataclasses
import io
import json
import pickle
import struct
import warnings
import zlib
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from muffin import pairs
from muffin.pairs import (
    PreferenceDataset,
    PreferencePair,
    Prompt,
    ReferenceLogps,
    RowError,
    decode_image,
    load_preferences,
    load_prompts,
    parse_column_map,
    parse_row,
)

SCORING_SCRIPT = "python eval/muffin_inference_logp.py"

# -1 - 2 = -3 over 2 tokens, -0.5 - 1 - 1.5 = -3 over 3 tokens
TYPED = {
    "ref_win_logp": -3.0,
    "ref_win_avg_logp": -1.5,
    "ref_win_per_token_logp": [-1.0, -2.0],
    "ref_rej_logp": -3.0,
    "ref_rej_avg_logp": -1.0,
    "ref_rej_per_token_logp": [-0.5, -1.0, -1.5],
}
PADDED = [-9.0, -4.5, [-7.1, -8.2, -4.0, -5.0, -0.3], -8.0, -2.0, [-7.1, -8.2, -2.0, -2.0, -2.0, -2.0]]


@pytest.fixture(autouse=True)
def arrow_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "arrow_cache")


def encode(image: Image.Image, format: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def picture(colour=(10, 20, 30), size=(4, 3)) -> bytes:
    return encode(Image.new("RGB", size, colour))


def row(**changes: Any) -> dict[str, Any]:
    return {
        "image": {"bytes": picture(), "path": "a.png"},
        "question": "What is it?",
        "chosen": "A cat.",
        "rejected": "A dog.",
        "idx": 7,
        "image_path": "a.png",
        "origin_dataset": "RLAIF-V",
        "origin_split": '{"model": "llava", "type": "detail"}',
        "ds_name": "photos",
    } | changes


def without(name: str) -> dict[str, Any]:
    return {key: value for key, value in row().items() if key != name}


def write_parquet(path: Path, rows: list[dict[str, Any]]) -> Path:
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def reason_of(bad_row: dict[str, Any], **options: Any) -> str:
    with pytest.raises(RowError) as caught:
        parse_row(bad_row, 4, **options)
    assert caught.value.position == 4
    return caught.value.reason


# --- a row


def test_row_of_rlaifv():
    pair = parse_row(row(), 4)
    assert (pair.question, pair.chosen, pair.rejected, pair.idx) == ("What is it?", "A cat.", "A dog.", 7)
    assert pair.image_bytes == picture()
    assert pair.image.mode == "RGB" and pair.image.size == (4, 3) and pair.image.getpixel((0, 0)) == (10, 20, 30)
    assert pair.metainfo == {
        "origin_dataset": "RLAIF-V",
        "origin_split": {"model": "llava", "type": "detail"},
        "ds_name": "photos",
        "image_path": "a.png",
    }
    assert pair.reference is None and pair.logps_key is None
    assert all(value is None for value in stored_values(pair))


def stored_values(pair: PreferencePair) -> list[Any]:
    return [
        pair.ref_win_logp,
        pair.ref_win_avg_logp,
        pair.ref_win_per_token_logp,
        pair.ref_rej_logp,
        pair.ref_rej_avg_logp,
        pair.ref_rej_per_token_logp,
    ]


def test_texts_keep_their_white_space():
    pair = parse_row(row(question=" why?\n", chosen="\nbecause ", rejected="because"), 0)
    assert (pair.question, pair.chosen, pair.rejected) == (" why?\n", "\nbecause ", "because")


def test_optional_columns():
    pair = parse_row({name: row()[name] for name in ("image", "question", "chosen", "rejected")}, 4)
    assert pair.idx == 4 and pair.metainfo == {}
    assert parse_row(row(idx=None), 4).idx == 4
    assert parse_row(row(idx="b-12"), 4).idx == "b-12"
    assert parse_row(row(origin_split="train"), 4).metainfo["origin_split"] == "train"
    assert "origin_split" not in parse_row(row(origin_split=None), 4).metainfo


@pytest.mark.parametrize("name", ["question", "chosen", "rejected"])
@pytest.mark.parametrize(
    ("value", "reason"),
    [(None, "is null"), ("", "is empty"), (" \n\t", "is empty"), (3, "is int, want text"), (b"x", "is bytes, want text")],
)
def test_bad_texts(name, value, reason):
    assert reason_of(row(**{name: value})) == f"{name} {reason}"


def test_equal_answers():
    assert reason_of(row(rejected="A cat.")) == "chosen and rejected are the same text"


@pytest.mark.parametrize(
    ("image", "reason"),
    [
        (None, "image is null"),
        ({"bytes": None, "path": None}, "image has neither bytes nor a path"),
        ({"bytes": b"", "path": "a.png"}, "image is empty (0 bytes)"),
        (5, "image is int"),
        ([], "images holds 0 images, want 1"),
        ([{"bytes": b"1"}, {"bytes": b"2"}], "images holds 2 images, want 1"),
        ({"bytes": None, "path": "a.png"}, "no image root is given"),
    ],
)
def test_bad_images(image, reason):
    assert reason in reason_of(row(image=image))


def test_row_error_names_row_and_pickles():
    error = pickle.loads(pickle.dumps(RowError(3, "b-12", "question is null")))
    assert (error.position, error.idx, error.reason) == (3, "b-12", "question is null")
    assert str(error) == "row 3 (idx b-12): question is null"
    assert isinstance(error, ValueError)


def test_pair_is_readable():
    text = repr(parse_row(row(), 0))
    assert "A cat." in text and "PNG" not in text
    assert dataclasses.replace(parse_row(row(logps=json.dumps(PADDED)), 0), image_bytes=b"x").ref_win_logp == -9.0


# --- stored log-probs


def test_typed_columns():
    pair = parse_row(row(**TYPED, logps_key="k"), 0)
    assert pair.reference == ReferenceLogps(**TYPED)
    assert stored_values(pair) == [-3.0, -1.5, [-1.0, -2.0], -3.0, -1.0, [-0.5, -1.0, -1.5]]
    assert pair.logps_key == "k"


@pytest.mark.parametrize("stored", [PADDED, {"logps": PADDED}])
def test_rlaifv_logps(stored):
    pair = parse_row(row(logps=json.dumps(stored)), 0)
    assert (pair.ref_win_logp, pair.ref_win_avg_logp, pair.ref_rej_logp, pair.ref_rej_avg_logp) == (-9.0, -4.5, -8.0, -2.0)
    for name in ("ref_win_per_token_logp", "ref_rej_per_token_logp"):
        with pytest.raises(ValueError, match=f"idx 7: .*padded sequence.*{SCORING_SCRIPT}"):
            getattr(pair, name)


def test_typed_columns_win():
    assert stored_values(parse_row(row(logps=json.dumps(PADDED), **TYPED), 0)) == list(TYPED.values())
    assert parse_row(row(logps="not even JSON", **TYPED), 0).ref_win_logp == -3.0


@pytest.mark.parametrize(
    ("stored", "reason"),
    [
        (None, "hold NoneType"),
        ("nonsense", "not JSON"),
        ("5", "hold int"),
        (json.dumps(PADDED[:5]), "hold 5 values"),
        (json.dumps({"logps": [*PADDED, 1.0]}), "hold 7 values"),
        (json.dumps({"other": PADDED}), "hold NoneType"),
        (json.dumps([PADDED[0], PADDED[1], -1.0, *PADDED[3:]]), r"want \[sum, average, \[per token\]\]"),
        (json.dumps([float("nan"), *PADDED[1:]]), "sum nan"),
        (json.dumps([*PADDED[:4], float("-inf"), PADDED[5]]), "ref_rej.*average -inf"),
        (json.dumps(["-9.0", *PADDED[1:]]), "want finite numbers"),
        (json.dumps([True, *PADDED[1:]]), "want finite numbers"),
    ],
)
def test_malformed_rlaifv_logps(stored, reason):
    with pytest.raises(RowError, match=f"row 2 .idx 7.: stored .*{reason}.*{SCORING_SCRIPT}"):
        parse_row(row(logps=stored), 2)


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("ref_win_logp", None, "sum None"),
        ("ref_win_logp", float("nan"), "sum nan"),
        ("ref_rej_avg_logp", float("inf"), "average inf"),
        ("ref_rej_per_token_logp", None, "no finite number per token"),
        ("ref_rej_per_token_logp", [], "no finite number per token"),
        ("ref_rej_per_token_logp", [-0.5, float("nan"), -1.5], "no finite number per token"),
        ("ref_win_per_token_logp", [-1.0, -1.0, -1.0], "3 tokens of sum -3.0000, but sum -3.0000 and average -1.5000"),
        ("ref_win_per_token_logp", [-1.0, -2.1], "2 tokens of sum -3.1000"),
        ("ref_win_logp", -3.1, "but sum -3.1000"),
    ],
)
def test_malformed_typed_columns(name, value, reason):
    with pytest.raises(RowError, match=f"stored {name[:7]} log-probs hold .*{reason}.*{SCORING_SCRIPT}"):
        parse_row(row(**TYPED | {name: value}), 2)


def test_float32_rounding_is_no_fault():
    tokens = torch.linspace(-7, -0.001, 900)
    stored = {"ref_win_logp": float(tokens.sum()), "ref_win_avg_logp": float(tokens.mean()), "ref_win_per_token_logp": tokens.tolist()}
    assert parse_row(row(**TYPED | stored), 0).ref_win_per_token_logp == tokens.tolist()


def test_incomplete_typed_columns(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", [row(ref_win_logp=-1.0, ref_rej_logp=-2.0)])
    with pytest.raises(ValueError, match=f"lack .*ref_win_avg_logp.*drop the columns .*ref_rej_logp.*{SCORING_SCRIPT}"):
        load_preferences(path)


def test_has_reference(tmp_path):
    plain = load_preferences(write_parquet(tmp_path / "a.parquet", [row()]))
    rlaifv = load_preferences(write_parquet(tmp_path / "b.parquet", [row(logps=json.dumps(PADDED))]))
    typed = load_preferences(write_parquet(tmp_path / "c.parquet", [row(logps="x", logps_key="k", note="mine", **TYPED)]))
    assert [data.has_reference for data in (plain, rlaifv, typed)] == [False, True, True]
    bare = typed.without_reference()
    assert not bare.has_reference and bare[0].logps_key is None
    assert bare.table.column_names == [*row(), "note"]


# --- columns


def test_missing_columns_are_listed(tmp_path):
    rows = [{"image": row()["image"], "query": "q", "chosen": "a", "worse": "b"}]
    path = write_parquet(tmp_path / "a.parquet", rows)
    with pytest.raises(ValueError) as caught:
        load_preferences(path)
    message = str(caught.value)
    assert "wanted question (question or prompt), rejected (rejected)" in message
    assert "found chosen, image, query, worse" in message
    assert "--column_map" in message
    pair = load_preferences(path, column_map=parse_column_map("question=query, rejected=worse"))[0]
    assert (pair.question, pair.chosen, pair.rejected) == ("q", "a", "b")


@pytest.mark.parametrize("name", ["image", "question", "chosen", "rejected"])
def test_each_required_column(name):
    bad = without(name)
    bad.pop("image_path")
    with pytest.raises(ValueError, match=f"wanted {name}"):
        parse_row(bad, 0)


def test_column_map_wins_over_muffins_own_names():
    pair = parse_row(row(good="mapped"), 0, {"chosen": "good"})
    assert pair.chosen == "mapped"
    with pytest.raises(ValueError, match=r"wanted idx \(number\)"):
        parse_row(row(), 0, {"idx": "number"})


def test_parse_column_map():
    assert parse_column_map("question=prompt,chosen=good") == {"question": "prompt", "chosen": "good"}
    assert parse_column_map(" question = the prompt ,") == {"question": "the prompt"}
    assert parse_column_map("") == {}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("question", "found 'question', want"),
        ("question=", "found 'question=', want"),
        ("=prompt", "found '=prompt', want"),
        ("prompt=question", r"\['prompt'\] are not names of muffin; want some of .*'question'"),
        ("question=a,question=b", "question is mapped twice, to 'a' and 'b'"),
    ],
)
def test_bad_column_maps(text, message):
    with pytest.raises(ValueError, match=f"--column_map: {message}"):
        parse_column_map(text)


def test_unknown_names_in_a_column_map_are_refused():
    with pytest.raises(ValueError, match="not names of muffin"):
        parse_row(row(), 0, {"answer": "chosen"})


# --- TRL's rows


def message(role: str, content: Any) -> list[dict[str, Any]]:
    return [{"role": role, "content": content}]


def trl_row(prompt: Any, chosen: Any = "yes", rejected: Any = "no") -> dict[str, Any]:
    return {"images": [{"bytes": picture(), "path": None}], "prompt": prompt, "chosen": chosen, "rejected": rejected}


TEXT_PARTS = [{"type": "image", "text": None}, {"type": "text", "text": "What is it?"}]


@pytest.mark.parametrize("prompt", ["What is it?", message("user", "What is it?"), message("user", TEXT_PARTS)])
@pytest.mark.parametrize(
    ("chosen", "rejected"),
    [
        ("yes", "no"),
        (message("assistant", "yes"), message("assistant", "no")),
        (message("assistant", [{"type": "text", "text": "yes"}]), message("assistant", [{"type": "text", "text": "no"}])),
    ],
)
def test_trl_rows(tmp_path, prompt, chosen, rejected):
    pair = load_preferences(write_parquet(tmp_path / "a.parquet", [trl_row(prompt, chosen, rejected)]))[0]
    assert (pair.question, pair.chosen, pair.rejected) == ("What is it?", "yes", "no")
    assert pair.image_bytes == picture()


def test_trl_rows_of_a_jsonl_file_may_mix_forms_of_content(tmp_path):
    (tmp_path / "a.png").write_bytes(picture())
    rows = [trl_row(message("user", "What is it?")), trl_row(message("user", TEXT_PARTS))]
    data = load_preferences(write_jsonl(tmp_path / "a.jsonl", [row | {"images": ["a.png"]} for row in rows]))
    assert [(pair.question, pair.image_bytes) for pair in data] == [("What is it?", picture())] * 2


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"prompt": []}, "question is a list of []"),
        (
            {"prompt": message("system", "Be brief.") + message("user", "q")},
            r"question is a list of ['system', 'user'], want one message of the user",
        ),
        ({"prompt": message("assistant", "q")}, "question is a list of ['assistant']"),
        ({"chosen": message("user", "a")}, "chosen is a list of ['user'], want one message of the assistant"),
        ({"chosen": message("assistant", [{"type": "image"}])}, "chosen has parts ['image'], want text only"),
        (
            {"prompt": message("user", [{"type": "image"}, *TEXT_PARTS])},
            "parts ['image', 'image', 'text'], want text and at most one image",
        ),
        ({"prompt": message("user", [{"type": "video"}])}, "parts ['video']"),
        ({"prompt": message("user", [{"type": "text", "text": None}])}, "question has a text part without text"),
        ({"prompt": message("user", None)}, "question is null"),
        ({"prompt": message("user", [])}, "question is empty"),
        ({"prompt": ["q"]}, "question is a list of ['str']"),
        ({"images": []}, "images holds 0 images"),
    ],
)
def test_bad_trl_rows(changes, reason):
    assert reason in reason_of(trl_row("q") | changes)


def test_lists_of_decoded_images_stay_encoded(tmp_path):
    features = datasets.Features(
        {"images": datasets.List(datasets.Image())} | {name: datasets.Value("string") for name in ("prompt", "chosen", "rejected")}
    )
    table = datasets.Dataset.from_list([trl_row("q")] * 3, features=features)
    assert isinstance(table[0]["images"][0], Image.Image)
    table.to_parquet(tmp_path / "a.parquet")
    for data in (PreferenceDataset(table), load_preferences(tmp_path / "a.parquet")):
        assert data[2].image_bytes == picture()
        assert data.table[0]["images"][0]["bytes"] == picture()
    assert not list(tmp_path.rglob("cache-*.arrow")), "the table was rewritten to change how its images are read"


# --- images


def test_truncated_jpeg():
    whole = encode(Image.effect_noise((64, 64), 90).convert("RGB"), "JPEG")
    assert decode_image(whole).size == (64, 64)
    for cut in (1, 20, len(whole) // 2, len(whole) - 100):
        with pytest.raises(ValueError, match=rf"does not decode \({cut} bytes\)"):
            decode_image(whole[:cut])


def test_broken_png_chunk():
    data = bytearray(picture())
    data[30] ^= 255  # inside the header's checksum
    with pytest.raises(ValueError, match="does not decode"):
        decode_image(bytes(data))


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds next to no pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.parametrize("data", [b"", b"not an image", png_header(0, 5), png_header(5, 0)])
def test_no_image(data):
    with pytest.raises(ValueError, match="image (is empty|does not decode)"):
        decode_image(data)


@pytest.mark.parametrize("side", [10_000, 20_000])  # 100 MP is a warning to Pillow, 400 MP an error
def test_decompression_bomb(side):
    with pytest.raises(ValueError, match=rf"too large.*{side * side} pixels.*limit of \d+ pixels"):
        decode_image(png_header(side, side))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        decode_image(picture())
    assert not caught


def test_large_and_tiny_images():
    assert decode_image(encode(Image.new("1", (8000, 8000)))).size == (8000, 8000)
    assert decode_image(picture((1, 2, 3), (1, 1))).getpixel((0, 0)) == (1, 2, 3)


def test_modes():
    alpha = Image.new("RGBA", (2, 2), (200, 100, 50, 0))
    assert decode_image(encode(alpha)).getpixel((0, 0)) == (200, 100, 50)  # alpha dropped, not blended
    assert decode_image(encode(Image.new("L", (2, 2), 77))).getpixel((0, 0)) == (77, 77, 77)
    assert decode_image(encode(Image.new("LA", (2, 2), (77, 9)))).getpixel((0, 0)) == (77, 77, 77)
    assert decode_image(encode(Image.new("1", (2, 2), 1))).getpixel((0, 0)) == (255, 255, 255)
    assert decode_image(encode(Image.new("CMYK", (2, 2), (0, 255, 255, 0)), "TIFF")).getpixel((0, 0)) == (255, 0, 0)
    assert decode_image(encode(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG")).getpixel((0, 0))[0] > 200
    palette = Image.new("P", (2, 2), 1)
    palette.putpalette([0, 0, 0, 9, 8, 7])
    assert decode_image(encode(palette)).getpixel((0, 0)) == (9, 8, 7)
    assert decode_image(encode(palette, transparency=1)).getpixel((0, 0)) == (9, 8, 7)


@pytest.mark.parametrize("format", ["PNG", "TIFF", "PPM"])
def test_16_bits_keep_their_upper_8(format):
    image = Image.frombytes("I;16", (3, 1), struct.pack("<3H", 0, 0x8040, 0xFFFF))
    assert [decode_image(encode(image, format)).getpixel((x, 0)) for x in range(3)] == [(0, 0, 0), (128, 128, 128), (255, 255, 255)]


def test_float_pixels_are_refused():
    with pytest.raises(ValueError, match="float pixels"):
        decode_image(encode(Image.new("F", (2, 2), 0.5), "TIFF"))


def test_exif_rotation_is_not_applied():
    exif = Image.Exif()
    exif[0x0112] = 6  # "rotate by 90 degrees to view"
    data = encode(Image.new("RGB", (40, 20)), "JPEG", exif=exif)
    assert Image.open(io.BytesIO(data)).getexif()[0x0112] == 6
    assert decode_image(data).size == (40, 20)


# --- files


def rows_of(n: int, **changes: Any) -> list[dict[str, Any]]:
    return [row(idx=number, chosen=f"cat {number}", **changes) for number in range(n)]


def test_parquet_file_and_extra_columns(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", rows_of(3, score=0.5, note=None))
    data = load_preferences(path)
    assert len(data) == 3 and [pair.idx for pair in data] == [0, 1, 2]
    assert data.table.column_names == [*row(), "score", "note"]
    assert data.table[1]["score"] == 0.5
    assert data[-1].idx == 2
    with pytest.raises(IndexError):
        data[3]


def test_max_rows(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", rows_of(5))
    assert [pair.idx for pair in load_preferences(path, max_rows=2)] == [0, 1]
    assert len(load_preferences(path, max_rows=50)) == 5
    with pytest.raises(ValueError, match="--max_rows 0"):
        load_preferences(path, max_rows=0)


def test_select_keeps_the_mapping(tmp_path):
    (tmp_path / "a.png").write_bytes(picture())
    rows = [{"image": "a.png", "q": f"question {n}", "chosen": "a", "rejected": "b"} for n in range(4)]
    data = load_preferences(write_jsonl(tmp_path / "a.jsonl", rows), column_map={"question": "q"}).select([3, 1])
    assert [pair.question for pair in data] == ["question 3", "question 1"]
    assert [pair.question for pair in data.select([1])] == ["question 1"]
    assert data[0].image_bytes == picture()


def test_folder_of_parquet_files(tmp_path):
    write_parquet(tmp_path / "b.parquet", [row(idx=2)])
    write_parquet(tmp_path / "a.parquet", [row(idx=0), row(idx=1)])
    (tmp_path / ".shard-00000-of-00001.parquet").write_bytes(b"half written")
    (tmp_path / "muffin_reference.json").write_text("{}")
    assert [pair.idx for pair in load_preferences(tmp_path)] == [0, 1, 2]


def test_files_of_a_folder_that_do_not_belong_together_are_named(tmp_path):
    whole = write_parquet(tmp_path / "a.parquet", [row(idx=0)]).read_bytes()
    for name, reason in (("rejected", "rejected missing, none more"), ("more", "none missing, more more")):
        write_parquet(tmp_path / "b.parquet", [without(name) if name == "rejected" else row(more=1)])
        with pytest.raises(ValueError, match=f"b.parquet has other columns than a.parquet: {reason}"):
            load_preferences(tmp_path)
    (tmp_path / "b.parquet").write_bytes(whole[:-20])
    with pytest.raises(ValueError, match="b.parquet cannot be read as parquet"):
        load_preferences(tmp_path)
    inner = tmp_path / "inner" / "data"
    inner.mkdir(parents=True)
    write_parquet(inner / "a.parquet", [row(idx=0)])
    with pytest.raises(ValueError, match=f"there are some in {inner}, name that folder"):
        load_preferences(tmp_path / "inner")


def test_names_that_look_like_patterns(tmp_path):
    (tmp_path / "run[1]*").mkdir()
    assert len(load_preferences(write_parquet(tmp_path / "run[1]*" / "a?.parquet", rows_of(2)))) == 2


def test_changed_file_is_read_again(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", rows_of(2))
    assert len(load_preferences(path)) == 2
    assert len(load_preferences(write_parquet(path, rows_of(3)))) == 3


def test_folder_saved_to_disk(tmp_path):
    PreferenceDataset(datasets.Dataset.from_list(rows_of(2))).table.save_to_disk(tmp_path / "saved")
    assert [pair.idx for pair in load_preferences(tmp_path / "saved")] == [0, 1]


def test_missing_shards_are_named(tmp_path):
    for number in (0, 2):
        write_parquet(tmp_path / f"shard-{number:05d}-of-00004.parquet", [row(idx=number)])
    with pytest.raises(ValueError, match=f"missing shard-00001-of-00004.parquet, shard-00003-of-00004.parquet; .*{SCORING_SCRIPT}"):
        load_preferences(tmp_path)
    for number in (1, 3):
        write_parquet(tmp_path / f"shard-{number:05d}-of-00004.parquet", [row(idx=number)])
    assert [pair.idx for pair in load_preferences(tmp_path)] == [0, 1, 2, 3]
    write_parquet(tmp_path / "shard-00000-of-00001.parquet", [row()])
    with pytest.raises(ValueError, match="mixes shards of different scorings"):
        load_preferences(tmp_path)


@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
def test_json_with_image_paths(tmp_path, suffix):
    (tmp_path / "data").mkdir()
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.png").write_bytes(picture())
    path = tmp_path / "data" / f"rows{suffix}"
    rows = [row(image="images/a.png"), row(image="./images/b/../a.png"), row(image=str(tmp_path / "images" / "a.png"))]
    path.write_text(json.dumps(rows) if suffix == ".json" else "".join(json.dumps(row) + "\n" for row in rows))
    assert [pair.image_bytes for pair in load_preferences(path, image_root=tmp_path)] == [picture()] * 3
    with pytest.raises(RowError, match="image file cannot be read: .*No such file"):
        load_preferences(path)[0]


def test_image_path_column_stands_in_for_image(tmp_path):
    (tmp_path / "a.png").write_bytes(picture())
    pair = load_preferences(write_jsonl(tmp_path / "a.jsonl", [without("image")]))[0]
    assert pair.image_bytes == picture() and pair.metainfo["image_path"] == "a.png"


@pytest.mark.parametrize("path", ["../secret.png", "sub/../../secret.png", "{absolute}", "../data_else/secret.png"])
def test_image_paths_do_not_leave_the_root(tmp_path, path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data_else").mkdir()
    for secret in (tmp_path / "secret.png", tmp_path / "data_else" / "secret.png"):
        secret.write_bytes(picture())
    path = path.format(absolute=tmp_path / "secret.png")
    data = load_preferences(write_jsonl(tmp_path / "data" / "a.jsonl", [row(image=path)]))
    with pytest.raises(RowError, match="row 0 .idx 7.: image path .* leads out of the image root"):
        data[0]


def test_image_root_may_hold_links(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "disk" / "a.png").write_bytes(picture())
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "images").symlink_to(tmp_path / "disk")
    assert load_preferences(write_jsonl(tmp_path / "data" / "a.jsonl", [row(image="images/a.png")]))[0].image_bytes == picture()


def test_unreadable_paths(tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    (tmp_path / "a.csv").write_text("x")
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 and nothing else")
    (tmp_path / "bad.jsonl").write_text('{"question": "a"}\n{"question"')
    for path, message in [
        ("empty", "no [*].parquet file"),
        ("a.csv", "ending in '.csv', want one of .parquet, .json, .jsonl"),
        ("bad.parquet", "cannot be read as parquet: .*magic bytes"),
        ("bad.jsonl", "cannot be read as json: .*JSON parse error"),
        ("gone.parquet", "no such file or folder"),
    ]:
        with pytest.raises(ValueError, match=message):
            load_preferences(tmp_path / path)
    with pytest.raises(ValueError, match="no such file or folder"):
        load_preferences("data/gone.parquet")

    def unreachable(path: str, split: str) -> None:
        raise ConnectionError(f"Couldn't reach {path}")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(ValueError, match="openbmb/RLAIF-V-Dataset: no such file or folder here, and as a hub data set .*Couldn't reach"):
        load_preferences("openbmb/RLAIF-V-Dataset")


def test_hub_id_takes_the_train_split(monkeypatch):
    asked = []

    def hub(path: str, split: str) -> datasets.Dataset:
        asked.append((path, split))
        return datasets.Dataset.from_list(rows_of(3))

    monkeypatch.setattr(datasets, "load_dataset", hub)
    assert [pair.idx for pair in load_preferences("openbmb/RLAIF-V-Dataset", max_rows=2)] == [0, 1]
    assert asked == [("openbmb/RLAIF-V-Dataset", "train")]


# --- size and processes


def identity(pair: PreferencePair) -> PreferencePair:
    return pair


def test_pickles_and_travels_to_workers(tmp_path):
    data = load_preferences(write_parquet(tmp_path / "a.parquet", rows_of(6, **TYPED)))
    copy = pickle.loads(pickle.dumps(data.select([4, 2])))
    assert [pair.idx for pair in copy] == [4, 2]
    assert copy[0] == data[4]
    loaded = list(DataLoader(data, batch_size=None, num_workers=2, collate_fn=identity))
    assert loaded == list(data)
    assert len(pickle.dumps(data)) < 20_000  # the mapped file's name, not its rows


def test_opening_reads_no_row(tmp_path, monkeypatch):
    features = datasets.Features(
        {name: datasets.Value("string") for name in ("question", "chosen", "rejected")} | {"image": datasets.Image()}
    )
    datasets.Dataset.from_list(
        [{"question": f"q {n}", "chosen": "a", "rejected": "b", "image": {"bytes": picture(), "path": None}} for n in range(2000)],
        features=features,
    ).to_parquet(tmp_path / "a.parquet")

    def forbidden(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("called while opening")

    before = pa.total_allocated_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(pairs, "decode_image", forbidden)
        patch.setattr(pairs, "parse_row", forbidden)
        patch.setattr(Image, "open", forbidden)
        data = load_preferences(tmp_path / "a.parquet")
        selected = data.select(range(5, 1500))
    assert len(data) == 2000 and len(selected) == 1495
    assert data.table.cache_files and pa.total_allocated_bytes() - before < 1_000_000  # mapped
    with monkeypatch.context() as patch:
        patch.setattr(Image, "open", forbidden)
        pair = selected[0]
    assert pair.question == "q 5" and pair.image.size == (4, 3)


def test_fingerprint(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", rows_of(4))
    data = load_preferences(path)
    assert load_preferences(path).fingerprint == data.fingerprint
    others = [
        data.select([0, 1]),
        data.select([1, 0]),
        load_preferences(path, column_map={"idx": "image_path"}),
        load_preferences(path, image_root=tmp_path / "x"),
        load_preferences(write_parquet(tmp_path / "b.parquet", rows_of(5))),
    ]
    assert len({data.fingerprint, *(other.fingerprint for other in others)}) == 6


def test_real_rows(samples):
    data = load_preferences(samples / "rlaifv_photos" / "photos_30.parquet")
    assert [pair.idx for pair in data] == [str(number) for number in range(30)]
    assert not data.has_reference
    first = data[0]
    assert first.question == "Describe the key features of the image in great detail."
    assert first.chosen.startswith("The image depicts an anthropomorphized") and first.rejected.startswith("As an AI, I don't")
    assert first.metainfo["origin_split"] == {"model": "none", "type": "placeholder answers"}
    assert all(pair.image.mode == "RGB" and min(pair.image.size) > 100 for pair in data)


# --- prompts: rows without answers


def test_prompts_need_no_answers(tmp_path):
    rows = [
        {"image": {"bytes": picture(), "path": None}, "question": "What?", "idx": "a", "ds_name": "d", "mine": 1},
        {"image": {"bytes": picture(), "path": None}, "question": " ", "idx": "b", "ds_name": "d", "mine": 2},
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    prompts = load_prompts(tmp_path / "rows.parquet")
    assert prompts[0] == Prompt("What?", "a", picture(), {"ds_name": "d"}) and prompts[0].image.mode == "RGB"
    assert len(prompts) == 2 and len(load_prompts(tmp_path / "rows.parquet", max_rows=1)) == 1
    assert prompts.table.column_names == ["image", "question", "idx", "ds_name", "mine"]
    with pytest.raises(RowError, match=r"^row 1 \(idx b\): question is empty"):
        prompts[1]
    with pytest.raises(ValueError, match=r"columns are missing: wanted chosen \(chosen\), rejected \(rejected\)"):
        load_preferences(tmp_path / "rows.parquet")


def test_prompts_of_pairs_are_those_of_the_pairs(tmp_path):
    """Answers and stored log-probs may be there, whatever is in them; paths and own names work as for pairs."""
    (tmp_path / "shown.png").write_bytes(picture())
    (tmp_path / "rows.jsonl").write_text(json.dumps({"picture": "shown.png", "ask": "What?", "chosen": None, "ref_win_logp": 0}) + "\n")
    names = {"image": "picture", "question": "ask"}
    assert load_prompts(tmp_path / "rows.jsonl", column_map=names)[0] == Prompt("What?", 0, picture())
    with pytest.raises(ValueError, match=r"wanted image \(image or images or image_path\), question \(question or prompt\)"):
        load_prompts(tmp_path / "rows.jsonl")
