"""300 odd inputs through load_preferences, pre-flight and scoring: each works, or is refused with its row (or file) and a reason.

Cases come in files, since a column has one type; each says whether it must pass, must fail, or may do either ("any"). What passes is
scored, so that nothing gets through the check and fails later.
"""

import datetime
import io
import json
import random
import signal
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image, ImageDraw
from tqdm import tqdm

from muffin.pairs import REFERENCE_COLUMNS, load_preferences
from muffin.policies import Checkpoint, PolicyOptions, load_adapter, load_policy
from muffin.preflight import preflight
from muffin.provenance import Numerics, foreign_rows
from muffin.scoring import RowStream, Scorer, ScoringRun, score_missing, summarize
from muffin.shards import plan_shards

SEED = 0
LIMIT_S = 120
MODES = "1 L LA La P PA RGB RGBA RGBa RGBX CMYK YCbCr LAB HSV I F I;16 I;16L I;16B I;16N".split()
FORMATS = "PNG JPEG GIF BMP TIFF WEBP PPM TGA ICO PCX SGI JPEG2000 DDS IM MPO".split()
LOSSLESS_MODES = {"1", "L", "LA", "P", "RGB", "RGBA", "I;16"}  # those of PNG, which must load


@dataclass(frozen=True)
class Case:
    name: str
    row: dict[str, Any]
    verdict: str  # pass, fail or any


@dataclass
class Input:
    """A file: its name, its bytes, its cases in order. whole: the file may be refused altogether, by a message with its name."""

    name: str
    data: bytes
    cases: list[Case] = field(default_factory=list)
    whole: bool = False


def picture(rng: random.Random, mode: str = "RGB", size: tuple[int, int] | None = None) -> Image.Image:
    image = Image.new("RGB", size or (rng.randint(20, 60), rng.randint(20, 60)), (rng.randrange(256), 90, 200))
    ImageDraw.Draw(image).ellipse((3, 3, 15, 15), fill=(250, rng.randrange(256), 10))
    if mode in ("La", "RGBa"):
        return image.convert(mode[:-1] + "A").convert(mode)
    if mode == "PA":
        return image.convert("P").convert("PA")
    if mode.startswith("I;"):
        return Image.new(mode, image.size, 30_000)
    if mode == "LAB":
        return Image.new("LAB", image.size, (120, 10, 10))
    return image.convert(mode)


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def base_row(rng: random.Random, number: int) -> dict[str, Any]:
    return {
        "image": {"bytes": encoded(picture(rng)), "path": None},
        "question": "What is it?",
        "chosen": "A red ball.",
        "rejected": "A green dog.",
        "idx": f"row<{number}>",
    }


def image_cases(rng: random.Random) -> Iterator[tuple[str, bytes | None, str]]:
    for mode in MODES:
        for kind in FORMATS:
            try:
                data = encoded(picture(rng, mode), kind)
            except (OSError, ValueError, KeyError):
                continue  # Pillow itself has no such file
            yield (
                f"{mode} {kind}",
                data,
                "pass" if kind == "PNG" and mode in LOSSLESS_MODES else "fail" if (mode, kind) == ("F", "TIFF") else "any",
            )
    for kind in ("PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF"):
        whole = encoded(picture(rng, size=(60, 60)), kind)
        for _ in range(2):
            yield f"first bytes of a {kind}", whole[: rng.randint(1, len(whole) // 2)], "fail"
        for _ in range(3):
            broken = bytearray(whole)
            for _ in range(rng.randint(1, 12)):
                broken[rng.randrange(len(broken))] = rng.randrange(256)
            yield f"flipped bytes in a {kind}", bytes(broken), "any"
    png = encoded(picture(rng))
    yield "PNG of no width", png[:16] + struct.pack(">I", 0) + png[20:], "fail"
    yield "PNG that claims 60000 x 60000", png[:16] + struct.pack(">II", 60_000, 60_000) + png[24:], "fail"
    yield "bomb of one colour", encoded(Image.new("1", (14_000, 14_000))), "fail"
    yield "one pixel", encoded(Image.new("RGB", (1, 1))), "pass"
    yield "1 x 300", encoded(Image.new("RGB", (1, 300))), "pass"
    yield "moving GIF", encoded(picture(rng), "GIF", save_all=True, append_images=[picture(rng)]), "pass"
    yield "SVG", b"<svg xmlns='http://www.w3.org/2000/svg'/>", "fail"
    yield "HTML", b"<html>404 Not Found</html>", "fail"
    yield "PDF", b"%PDF-1.4 %%EOF", "fail"
    yield "EPS", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n", "fail"
    yield "zeros", bytes(500), "fail"
    yield "noise", rng.randbytes(500), "fail"
    yield "no bytes", b"", "fail"
    yield "null", None, "fail"


TEXTS = (
    ("empty", "", "fail"),
    ("white space of every kind", " \t\r\n\u00a0\u2003\u3000\u2028", "fail"),
    ("null", None, "fail"),
    ("BOS", "a <s> b", "fail"),
    ("EOS", "a </s> b", "fail"),
    ("image token", "a <image> b", "fail"),
    ("pad", "a <pad> b", "fail"),
    ("NUL", "a\0b", "pass"),
    ("control characters", "".join(map(chr, range(1, 32))) + "x", "pass"),
    ("zero width", "\u200b\u200d\ufeff", "any"),
    ("right to left", "\u202eabc\u202c עברית", "pass"),
    ("combining marks", "e" + "\u0301" * 200, "pass"),
    ("emoji", "👩‍👩‍👧‍👦🏳️‍🌈", "pass"),
    ("plane 16", "\U0010fffd\U000e0001", "pass"),
    ("non-characters", "\uffff\ufdd0\U0001ffff", "pass"),
    ("replacement", "\ufffd\ufffd", "pass"),
    ("Turkish and ligatures", "İıſﬁ", "pass"),
    ("mathematics", "𝔘𝔫𝔦𝔠𝔬𝔡𝔢", "pass"),
    ("role markers", "USER: hi ASSISTANT: no", "any"),
    ("markup", "<b>&amp;</b>{{x}}%s\\n", "pass"),
)


def parquet(rows: list[dict[str, Any]], types: dict[str, pa.DataType] | None = None) -> bytes:
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    types = {"image": image, **{name: pa.string() for name in ("question", "chosen", "rejected", "idx")}} | (types or {})
    names = list(rows[0])
    table = pa.table({name: pa.array([row[name] for row in rows], type=types.get(name)) for name in names})
    file = io.BytesIO()
    pq.write_table(table, file)
    return file.getvalue()


def table_input(name: str, cases: list[Case], types: dict[str, pa.DataType] | None = None) -> Input:
    return Input(f"{name}.parquet", parquet([case.row for case in cases], types), cases)


def lines_input(name: str, cases: list[Case], whole: bool = False) -> Input:
    return Input(f"{name}.jsonl", "".join(json.dumps(case.row) + "\n" for case in cases).encode(), cases, whole)


def inputs(rng: random.Random) -> Iterator[Input]:
    number = 0

    def case(name: str, verdict: str, **changes: Any) -> Case:
        nonlocal number
        number += 1
        return Case(name, base_row(rng, number) | changes, verdict)

    yield table_input("images", [case(name, verdict, image={"bytes": data, "path": None}) for name, data, verdict in image_cases(rng)])
    yield table_input(
        "texts",
        [
            case(f"{column}: {name}", verdict, **{column: text})
            for column in ("question", "chosen", "rejected")
            for name, text, verdict in TEXTS
        ],
    )
    yield table_input(
        "long",
        [
            case("question of 1 MB", "fail", question="word " * 200_000),
            case("answer of 1 MB", "pass", chosen="word " * 200_000),
            case("one word of 100 kB", "pass", rejected="x" * 100_000),
            case("equal where they are cut", "fail", chosen="word " * 5000 + "a", rejected="word " * 5000 + "b"),
            case("equal answers", "fail", chosen="same", rejected="same"),
            case("no idx", "pass", idx=None),
            case("no idx and no answer", "fail", idx=None, chosen=None),
            case("idx that is no word", "pass", idx="\u202e\n\0 "),
        ],
    )
    yield from stored_values(case)
    yield from other_types(case)
    yield from json_lines(case)
    yield from broken_files(rng, case)


def stored_values(case) -> Iterator[Input]:
    good = {"ref_win_logp": -3.0, "ref_win_avg_logp": -1.5, "ref_win_per_token_logp": [-1.0, -2.0]}
    good |= {name.replace("win", "rej"): value for name, value in good.items()}
    cases = [case("good stored values", "pass", **good)]
    for name in REFERENCE_COLUMNS:
        for value in (float("nan"), float("inf"), -float("inf"), None):
            if name.endswith("per_token_logp"):
                cases.append(case(f"{name} {value}", "fail", **good | {name: [-1.0, value]}))
                cases.append(case(f"{name} of one {value}", "fail", **good | {name: None if value is None else [value]}))
            else:
                cases.append(case(f"{name} {value}", "fail", **good | {name: value}))
        cases.append(case(f"{name} far off", "fail", **good | {name: [1e308, 1e308] if name.endswith("per_token_logp") else 1e308}))
    yield table_input("stored", cases)
    deep = "[" * 100_000
    texts = ("NaN", "[NaN, 1, [1], 1, 1, [1]]", "{}", "[]", "null", "[1", deep, "1" * 10_000, "[null, 1, [1], 1, 1, [1]]", '"x"', "")
    cases = [case(f"logps {str(text)[:30]}", "fail", logps=text) for text in (*texts, None)]
    yield table_input("json_logps", [*cases, case("good logps", "pass", logps="[-3, -1.5, [0], -2, -1, [0]]")], {"logps": pa.string()})
    splits = (deep, "1" * 10_000, "NaN", '{"a": 1}', "plain", None, "\0")
    yield table_input(
        "splits", [case(f"origin_split {str(text)[:30]}", "pass", origin_split=text) for text in splits], {"origin_split": pa.string()}
    )


def other_types(case) -> Iterator[Input]:
    """Columns of types that they should not have."""
    now = datetime.datetime(2025, 1, 1)
    wrong = {
        "int": (pa.int64(), 7),
        "float": (pa.float64(), float("nan")),
        "bool": (pa.bool_(), True),
        "bytes": (pa.binary(), b"\xff\xfe"),
        "time": (pa.timestamp("us"), now),
        "list": (pa.list_(pa.string()), ["a", "b"]),
        "struct": (pa.struct([("a", pa.int64())]), {"a": 1}),
        "null": (pa.null(), None),
        "nested": (pa.list_(pa.list_(pa.struct([("role", pa.list_(pa.int64()))]))), [[{"role": [1]}]]),
        "messages": (
            pa.list_(pa.struct([("role", pa.string()), ("content", pa.list_(pa.list_(pa.string())))])),
            [{"role": "user", "content": [["a"]]}],
        ),
    }
    for kind, (type_, value) in wrong.items():
        for column in ("image", "question", "chosen", "idx"):
            verdict = "any" if column == "idx" else "fail"
            verdict = "pass" if column == "idx" and kind in ("int", "null") else verdict
            yield table_input(f"{column}_{kind}", [case(f"{column} is {kind}", verdict, **{column: value})], {column: type_})
    not_utf8 = pa.array([b"ok", b"caf\xe9"], pa.binary()).view(pa.string())
    cases = [case("UTF-8", "pass"), case("Latin-1", "fail")]
    table = pq.read_table(io.BytesIO(parquet([each.row for each in cases])))
    file = io.BytesIO()
    pq.write_table(table.set_column(table.column_names.index("chosen"), "chosen", not_utf8), file)
    yield Input("latin1.parquet", file.getvalue(), cases)


def json_lines(case) -> Iterator[Input]:
    """Rows whose images are files, and what JSON allows."""
    paths = (
        ("ok.png", "pass"),
        ("./sub/../ok.png", "pass"),
        ("../ok.png", "fail"),
        ("../../../../etc/hostname", "fail"),
        ("/etc/hostname", "fail"),
        ("sub/../../ok.png", "fail"),
        ("http://localhost/ok.png", "fail"),
        ("file:///etc/hostname", "fail"),
        ("data:image/png;base64,AAAA", "fail"),
        ("missing.png", "fail"),
        (".", "fail"),
        ("", "fail"),
        ("a\0b.png", "fail"),
        ("x" * 5000, "fail"),
        ("no_image.txt", "fail"),
        ("\u202egnp.ok", "fail"),
    )
    yield lines_input("paths", [case(f"path {path[:30]!r}", verdict, image=path) for path, verdict in paths])
    good = "ok.png"
    yield lines_input("surrogate", [case("lone surrogate", "any", image=good, chosen="a \ud800 b")], whole=True)
    yield lines_input("surrogate_path", [case("lone surrogate in a path", "fail", image="\udcff.png")], whole=True)
    yield lines_input("numbers", [case("numbers for texts", "fail", image=good, chosen=1, rejected=2.5)])
    yield lines_input("true", [case("true for a text", "fail", image=good, question=True)])
    yield lines_input("object", [case("object for a text", "fail", image=good, chosen={"text": "a"})])
    yield lines_input("bytes_as_text", [case("text for bytes", "fail", image={"bytes": "iVBORw0KGgo=", "path": None})])
    yield lines_input("bytes_as_list", [case("numbers for bytes", "fail", image={"bytes": [137, 80], "path": None})])
    yield lines_input("path_as_number", [case("number for a path", "fail", image={"bytes": None, "path": 3})])
    yield lines_input("path_as_list", [case("list for a path", "fail", image={"bytes": None, "path": ["ok.png"]})])
    yield lines_input("two_images", [case("two images", "fail", image=[good, good])])
    yield lines_input("no_images", [case("no image in a list", "fail", image=[])])
    part = {"type": {"a": 1}, "text": "x"}
    yield lines_input("odd_part", [case("part of an odd type", "fail", image=good, question=[{"role": "user", "content": [part]}])])
    yield lines_input("odd_role", [case("role of an odd type", "fail", image=good, question=[{"role": {"a": 1}, "content": "x"}])])
    yield lines_input("idx_object", [case("object for idx", "any", image=good, idx={"a": [1]})])
    yield lines_input("idx_float", [case("float for idx", "any", image=good, idx=1.5)])
    yield lines_input("mixed", [case("first", "pass", image=good), case("other type later", "fail", image=good, chosen=[1])], whole=True)
    missing = case("no rejected", "fail", image=good)
    del missing.row["rejected"]
    yield lines_input("missing", [case("all columns", "pass", image=good), missing], whole=False)


def broken_files(rng: random.Random, case) -> Iterator[Input]:
    """Files that must be refused as a whole, by name."""
    whole = parquet([case("row", "any").row for _ in range(3)])
    for number in range(6):
        yield Input(f"cut_{number}.parquet", whole[: rng.randint(0, len(whole) - 9)], whole=True)
    yield Input("noise.parquet", rng.randbytes(300), whole=True)
    yield Input("magic.parquet", b"PAR1" + rng.randbytes(100) + b"PAR1", whole=True)
    yield Input("footer.parquet", whole[:-30] + rng.randbytes(22) + whole[-8:], whole=True)
    yield Input("text.parquet", b"question,chosen\na,b\n", whole=True)
    line = json.dumps(case("row", "any", image="ok.png").row).encode()
    texts = {
        "empty": b"",
        "spaces": b"  \n\n ",
        "cut": line[:-20],
        "second_cut": line + b"\n" + line[:-9],
        "comma": line[:-1] + b",}",
        "single_quotes": line.replace(b'"', b"'"),
        "number": b"7\n",
        "text": b'"a"\n',
        "null": b"null\n",
        "null_later": line + b"\n null \n",
        "arrays": b"[1, 2]\n[3]\n",
        "deep": b'{"image": ' + b"[" * 5000 + b"]" * 5000 + b"}\n",
        "utf16": line.decode().encode("utf-16"),
        "binary": rng.randbytes(400),
        "no_columns": b'{"a": 1}\n',
    }
    latin1 = case("Latin-1", "fail", image="ok.png")
    yield Input("latin1.jsonl", json.dumps(latin1.row).encode().replace(b"red", b"r\xe9d"), [latin1])
    for name, data in texts.items():
        yield Input(f"{name}.jsonl", data, whole=True)


@pytest.fixture(scope="module")
def scorer(tiny_llava_path) -> Scorer:
    adapter = load_adapter(Checkpoint(tiny_llava_path), PolicyOptions(model_max_length=512))
    return Scorer(
        load_policy(Checkpoint(tiny_llava_path), adapter, dtype=torch.float32).eval(), adapter, Numerics("float32", None, None, "sdpa")
    )


@pytest.fixture
def impatient() -> Iterator[None]:
    """A hang is a failure."""

    def too_long(number, frame):
        raise AssertionError(f"no end after {LIMIT_S} s")

    previous = signal.signal(signal.SIGALRM, too_long)
    signal.alarm(LIMIT_S)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, previous)


def outcome(file: Path, scorer: Scorer, folder: Path) -> dict[int, str] | str:
    """Reasons by position of the rows left out, after the others were scored; a message when the file was refused."""
    try:
        dataset = load_preferences(file)
    except ValueError as error:
        return str(error)
    report = folder / "bad_rows.json"
    try:
        survivors = preflight(dataset, scorer.adapter, bad_rows="skip", report_path=report, num_workers=0)
    except ValueError as error:
        if not str(error).startswith("no row is left"):
            raise
        survivors = None
    bad = {row["position"]: f"{row['idx']}: {row['reason']}" for row in json.loads(report.read_text(encoding="utf-8"))["bad_rows"]}
    assert len(foreign_rows(dataset, "another")) == len(dataset)  # reads every row, whatever it holds
    if survivors is not None:
        rows = dataset.without_reference()
        run = ScoringRun(rows, dataset.table, folder, plan_shards(len(rows), 50), frozenset(bad), 2048)
        with tqdm(disable=True) as progress:
            assert (
                score_missing(run, scorer, RowStream(rows, scorer.adapter, "r", 0), progress) == len(survivors) == len(dataset) - len(bad)
            )
        assert summarize(run).rows == len(survivors)
    return bad


def test_every_odd_input_works_or_is_refused_by_row_and_reason(scorer, impatient, tmp_path):
    Image.new("RGB", (30, 30)).save(tmp_path / "ok.png")
    (tmp_path / "sub").mkdir()
    (tmp_path / "no_image.txt").write_text("no image")
    failures, count = [], 0
    for each in inputs(random.Random(SEED)):
        file, folder = tmp_path / each.name, tmp_path / f"{each.name}.out"
        file.write_bytes(each.data)
        folder.mkdir()
        count += max(1, len(each.cases))
        try:
            found = outcome(file, scorer, folder)
        except Exception as error:  # noqa: BLE001 - every defect is to be listed
            failures.append(f"{each.name}: {type(error).__name__}: {str(error)[:300]}")
            continue
        if isinstance(found, str):
            if not each.whole or each.name not in found:
                failures.append(f"{each.name}: refused as a whole: {found[:300]}")
            continue
        if not each.cases:
            failures.append(f"{each.name}: read as if it were good")
        for position, case in enumerate(each.cases):
            idx = case.row["idx"] if case.row.get("idx") is not None else position
            reason = found.get(position)
            if (reason is None and case.verdict == "fail") or (reason is not None and case.verdict == "pass"):
                failures.append(f"{each.name}: {case.name}: must {case.verdict}, but {reason}")
            elif reason is not None and isinstance(idx, str) and not (reason.startswith(f"{idx}: ") and len(reason) > len(idx) + 5):
                failures.append(f"{each.name}: {case.name}: {reason!r} does not name {idx!r} and a reason")
    print(f"{count} inputs")
    assert not failures, "\n".join(failures)
    assert count >= 300
