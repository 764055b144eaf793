"""Preference rows: from files of any supported form to `PreferencePair`, one row at a time, images decoded on demand.

    file, folder or hub id --load_preferences--> PreferenceDataset --[i]--> parse_row --> PreferencePair
                           --load_prompts------> PromptDataset -----[i]--> parse_prompt --> Prompt (image and question, no answers)

This module is the only place that knows what columns are called. Tables stay memory-mapped Arrow; a pair holds the encoded
bytes of its image and decodes them when `.image` is read. Row schema and input forms: data/README.md.
"""

import contextlib
import glob
import hashlib
import json
import math
import os
import re
import struct
import warnings
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from io import BytesIO
from pathlib import Path
from typing import Any, ClassVar

import datasets
import pyarrow.parquet as pq
import torch.utils.data
from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError
from PIL import Image, UnidentifiedImageError

SCORING_COMMAND = "python eval/muffin_inference_logp.py --model_name_or_path MODEL --data_path DATA --output_dir SCORED"

# muffin's name -> the names it has in files, first match wins: RLAIF-V's own, then TRL's.
REQUIRED_COLUMNS = {
    "image": ("image", "images", "image_path"),
    "question": ("question", "prompt"),
    "chosen": ("chosen",),
    "rejected": ("rejected",),
}
PROMPT_COLUMNS = ("image", "question")
METAINFO_COLUMNS = ("origin_dataset", "origin_split", "ds_name", "image_path")
ROW_COLUMNS = REQUIRED_COLUMNS | {name: (name,) for name in ("idx", *METAINFO_COLUMNS)}

# What Pillow's plugins raise on damaged files.
_DAMAGED_IMAGE = (
    OSError,
    EOFError,
    ValueError,
    SyntaxError,
    RuntimeError,
    LookupError,
    ArithmeticError,
    TypeError,
    struct.error,
    zlib.error,
)
_READERS = {".parquet": "parquet", ".json": "json", ".jsonl": "json"}
_SHARD = re.compile(r"shard-(\d+)-of-(\d+)\.parquet")
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:(//|[\w/+.-]+[;,])")  # http://..., file://..., data:image/png;base64,...
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


class RowError(ValueError):
    """A row that cannot be used: its position in the data set, its own idx, and why."""

    def __init__(self, position: int, idx: int | str, reason: str) -> None:
        super().__init__(position, idx, reason)  # all three in args, so that it pickles out of a worker process
        self.position = position
        self.idx = idx
        self.reason = reason

    def __str__(self) -> str:
        return f"row {self.position} (idx {self.idx}): {self.reason}"


@dataclass(frozen=True)
class ReferenceLogps:
    """Log-probs of a row's answers under the reference policy, in nats; the field names are the names of the stored columns.

    ref_*_logp: sum over the response's tokens. ref_*_avg_logp: sum / number of tokens.
    ref_*_per_token_logp: one value per response token; None when the row stores RLAIF-V's form, whose lists cover the padded sequence.
    """

    ref_win_logp: float
    ref_win_avg_logp: float
    ref_win_per_token_logp: list[float] | None
    ref_rej_logp: float
    ref_rej_avg_logp: float
    ref_rej_per_token_logp: list[float] | None


REFERENCE_COLUMNS = tuple(f.name for f in fields(ReferenceLogps))


@dataclass(frozen=True)
class PreferencePair:
    """One row: a question about an image, the preferred answer and the other one.

    image_bytes: the encoded file (JPEG, PNG, ...); `image` decodes it anew on every access, so keep what you need.
    idx: the row's own name, its position where the data has none; may repeat.
    metainfo: origin_dataset, origin_split (parsed where it is JSON), ds_name, image_path, as far as present.
    reference: stored log-probs of the reference policy, None when not stored; each value is also an attribute of the pair.
    logps_key: what proves that `reference` belongs to this row and policy (muffin.provenance), None when absent.
    """

    question: str
    chosen: str
    rejected: str
    idx: int | str
    image_bytes: bytes = field(repr=False)
    metainfo: dict[str, Any] = field(default_factory=dict)
    reference: ReferenceLogps | None = None
    logps_key: str | None = None

    @property
    def image(self) -> Image.Image:
        """The decoded RGB image. Raises ValueError when it does not decode."""
        return decode_image(self.image_bytes)

    @property
    def ref_win_logp(self) -> float | None:
        """Reference log-prob of chosen, summed over its tokens, in nats; None when not stored."""
        return self.reference and self.reference.ref_win_logp

    @property
    def ref_win_avg_logp(self) -> float | None:
        """Reference log-prob of chosen per token, in nats; None when not stored."""
        return self.reference and self.reference.ref_win_avg_logp

    @property
    def ref_win_per_token_logp(self) -> list[float] | None:
        """(R_chosen,) values. Raises ValueError when stored in RLAIF-V's form, which does not say where the response is."""
        return self.reference and self._response_tokens_only(self.reference.ref_win_per_token_logp)

    @property
    def ref_rej_logp(self) -> float | None:
        """Reference log-prob of rejected, summed over its tokens, in nats; None when not stored."""
        return self.reference and self.reference.ref_rej_logp

    @property
    def ref_rej_avg_logp(self) -> float | None:
        """Reference log-prob of rejected per token, in nats; None when not stored."""
        return self.reference and self.reference.ref_rej_avg_logp

    @property
    def ref_rej_per_token_logp(self) -> list[float] | None:
        """(R_rejected,) values. Raises ValueError like `ref_win_per_token_logp`."""
        return self.reference and self._response_tokens_only(self.reference.ref_rej_per_token_logp)

    def _response_tokens_only(self, token_logps: list[float] | None) -> list[float]:
        if token_logps is None:
            raise ValueError(
                f"idx {self.idx}: per-token log-probs come from a `logps` column, where they cover the padded sequence and hold noise at "
                f"prompt and image positions; only sums and averages are usable. Store them per response token: {SCORING_COMMAND}"
            )
        return token_logps


@dataclass(frozen=True)
class Prompt:
    """A question about an image, without answers: what answers are generated for. The fields are those of `PreferencePair`."""

    question: str
    idx: int | str
    image_bytes: bytes = field(repr=False)
    metainfo: dict[str, Any] = field(default_factory=dict)

    @property
    def image(self) -> Image.Image:
        """The decoded RGB image. Raises ValueError when it does not decode."""
        return decode_image(self.image_bytes)


@dataclass(frozen=True)
class Demonstration(Prompt):
    """A prompt with the answer to learn (the column `chosen`); what supervised fine-tuning is fed."""

    chosen: str = ""


class PreferenceDataset(torch.utils.data.Dataset):
    """Rows of an opened table as `PreferencePair`s. Cheap to build, copy and pickle: rows are parsed when asked for.

    table: all columns, those that muffin does not know included; images are never decoded by it.
    column_map: muffin's column name -> the table's, for tables with own names.
    image_root: folder below which image paths are looked up; None when every image is stored as bytes.
    Raises ValueError when columns are missing.
    """

    def __init__(self, table: datasets.Dataset, column_map: Mapping[str, str] | None = None, image_root: str | Path | None = None) -> None:
        self.table = _keep_images_encoded(table)
        self.column_map = dict(column_map or {})
        self.image_root = None if image_root is None else Path(os.path.abspath(image_root))
        self._columns = resolve_columns(table.column_names, self.column_map)
        self._rows = self.table.select_columns(sorted(set(self._columns.values())))

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, position: int) -> PreferencePair:
        position = range(len(self))[position]
        return parse_row(_stored_row(self._rows, position, self._columns.get("idx")), position, self.column_map, self.image_root)

    @property
    def has_reference(self) -> bool:
        """Whether the rows store reference log-probs, in either form."""
        return not {"ref_win_logp", "logps"}.isdisjoint(self._columns)

    @property
    def fingerprint(self) -> str:
        """Changes with the rows, their order and how they are read; not with the contents of images that rows name by path."""
        read = json.dumps([self.table._fingerprint, self.column_map, str(self.image_root)], sort_keys=True)
        return hashlib.sha256(read.encode()).hexdigest()

    def select(self, positions: Sequence[int]) -> "PreferenceDataset":
        """The rows at `positions`, in that order; positions in the result count from 0."""
        return PreferenceDataset(self.table.select(positions), self.column_map, self.image_root)

    def without_reference(self) -> "PreferenceDataset":
        """The same rows without stored log-probs of either form and without their keys: what a new scoring starts from."""
        stored = [name for name in (*REFERENCE_COLUMNS, "logps", "logps_key") if name in self.table.column_names]
        return PreferenceDataset(self.table.remove_columns(stored), self.column_map, self.image_root)


class PromptDataset(torch.utils.data.Dataset):
    """Rows of an opened table as `Prompt`s; answers that the table may hold are not looked at. Arguments as for `PreferenceDataset`."""

    required_columns: ClassVar[tuple[str, ...]] = PROMPT_COLUMNS

    def __init__(self, table: datasets.Dataset, column_map: Mapping[str, str] | None = None, image_root: str | Path | None = None) -> None:
        self.table = _keep_images_encoded(table)
        self.column_map = dict(column_map or {})
        self.image_root = None if image_root is None else Path(os.path.abspath(image_root))
        self._columns = _resolve(table.column_names, self.column_map, self.required_columns)
        self._rows = self.table.select_columns(sorted(set(self._columns.values())))

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, position: int) -> Prompt:
        position = range(len(self))[position]
        return parse_prompt(_stored_row(self._rows, position, self._columns.get("idx")), position, self.column_map, self.image_root)


class DemonstrationDataset(PromptDataset):
    """Rows of an opened table as `Demonstration`s; rejected answers are not looked at. Arguments as for `PreferenceDataset`."""

    required_columns: ClassVar[tuple[str, ...]] = (*PROMPT_COLUMNS, "chosen")

    def __getitem__(self, position: int) -> Demonstration:
        position = range(len(self))[position]
        return parse_demonstration(_stored_row(self._rows, position, self._columns.get("idx")), position, self.column_map, self.image_root)


def load_preferences(
    path: str | Path,
    *,
    column_map: Mapping[str, str] | None = None,
    max_rows: int | None = None,
    image_root: str | Path | None = None,
) -> PreferenceDataset:
    """Open preference data, memory-mapped: only the first opening of a file reads it all, into the Arrow cache of `datasets`.

    path: a Parquet, JSON or JSON-lines file; a folder of Parquet files or of `Dataset.save_to_disk`; else the id of a `datasets`
        hub data set, of which the train split is taken.
    column_map: muffin's column name -> the file's, see `parse_column_map`.
    max_rows: keep the first rows only.
    image_root: where image paths start; default: the file's folder. Paths that lead out of it are refused.
    Raises ValueError when there is nothing readable at `path`, when scoring shards or columns are missing.
    """
    table, folder = _open_rows(path, max_rows)
    with _naming(path):
        return PreferenceDataset(table, column_map, image_root or folder)


def load_prompts(
    path: str | Path,
    *,
    column_map: Mapping[str, str] | None = None,
    max_rows: int | None = None,
    image_root: str | Path | None = None,
) -> PromptDataset:
    """Open data that needs to hold images and questions only. Arguments and errors as for `load_preferences`."""
    table, folder = _open_rows(path, max_rows)
    with _naming(path):
        return PromptDataset(table, column_map, image_root or folder)


def load_demonstrations(
    path: str | Path,
    *,
    column_map: Mapping[str, str] | None = None,
    max_rows: int | None = None,
    image_root: str | Path | None = None,
) -> DemonstrationDataset:
    """Open data for supervised fine-tuning: image, question and chosen. Arguments and errors as for `load_preferences`."""
    table, folder = _open_rows(path, max_rows)
    with _naming(path):
        return DemonstrationDataset(table, column_map, image_root or folder)


@contextlib.contextmanager
def _naming(path: str | Path) -> Iterator[None]:
    """What is wrong with a table is said of its file."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _open_rows(path: str | Path, max_rows: int | None) -> tuple[datasets.Dataset, Path | None]:
    if max_rows is not None and max_rows < 1:
        raise ValueError(f"--max_rows {max_rows}: want at least 1 row")
    table, folder = _open_table(str(path))
    return (table if max_rows is None else table.select(range(min(max_rows, len(table)))), folder)


def parse_column_map(text: str) -> dict[str, str]:
    """ "question=prompt,chosen=good" -> {"question": "prompt", "chosen": "good"}: muffin's name = the file's name.

    Raises ValueError for anything else, naming the part.
    """
    column_map: dict[str, str] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        name, _, column = (side.strip() for side in part.partition("="))
        if not name or not column:
            raise ValueError(f"--column_map: found {part!r}, want muffin's name = the file's name, as in question=prompt,chosen=good")
        if name in column_map:
            raise ValueError(f"--column_map: {name} is mapped twice, to {column_map[name]!r} and {column!r}; keep one")
        column_map[name] = column
    _refuse_unknown_names(column_map)
    return column_map


def normal_columns(table: datasets.Dataset, column_map: Mapping[str, str]) -> datasets.Dataset:
    """The same rows with mapped columns under muffin's names. Raises ValueError when the table has both of a pair of names."""
    for name, column in column_map.items():
        if name != column and name in table.column_names:
            raise ValueError(f"--column_map {name}={column}: the data has both columns, and the output needs {name}; rename or remove one")
    return table.rename_columns({column: name for name, column in column_map.items() if name != column})


def resolve_columns(found: Iterable[str], column_map: Mapping[str, str] | None = None) -> dict[str, str]:
    """Where to read what: muffin's name -> column, out of the `found` columns; names that are optional and absent are left out.

    Typed log-prob columns win over RLAIF-V's `logps`. Raises ValueError for missing columns and for an incomplete set of log-probs.
    """
    found = set(found)
    columns = _resolve(found, column_map, REQUIRED_COLUMNS)
    typed = [name for name in REFERENCE_COLUMNS if name in found]
    if typed and len(typed) < len(REFERENCE_COLUMNS):
        missing = [name for name in REFERENCE_COLUMNS if name not in found]
        raise ValueError(f"stored log-probs lack {missing}; drop the columns {typed} and store all six again: {SCORING_COMMAND}")
    if not typed and "logps" in found:
        typed = ["logps"]
    return columns | {name: name for name in (*typed, "logps_key") if name in found}


def _resolve(found: Iterable[str], column_map: Mapping[str, str] | None, required: Iterable[str]) -> dict[str, str]:
    found, column_map = set(found), dict(column_map or {})
    _refuse_unknown_names(column_map)
    wanted = ROW_COLUMNS | {name: (column,) for name, column in column_map.items()}
    columns = {name: column for name, candidates in wanted.items() for column in reversed(candidates) if column in found}
    missing = [f"{name} ({' or '.join(wanted[name])})" for name in dict.fromkeys((*required, *column_map)) if name not in columns]
    if missing:
        raise ValueError(
            f"columns are missing: wanted {', '.join(missing)}, found {', '.join(sorted(found))}; "
            "for columns of other names give --column_map MUFFIN_NAME=FILE_NAME,..."
        )
    return columns


def parse_row(
    row: Mapping[str, Any], position: int, column_map: Mapping[str, str] | None = None, image_root: Path | None = None
) -> PreferencePair:
    """One row of a table as a pair; texts are kept as they are, to the last space.

    Raises RowError when the row is unusable (its image is not decoded here) and ValueError when columns are missing.
    """
    value = {name: row[column] for name, column in resolve_columns(row, column_map).items()}
    idx = _idx(value.get("idx"), position)
    try:
        question = _text("question", value["question"], role="user")
        chosen = _text("chosen", value["chosen"], role="assistant")
        rejected = _text("rejected", value["rejected"], role="assistant")
        if chosen == rejected:
            raise ValueError("chosen and rejected are the same text")
        return PreferencePair(
            question=question,
            chosen=chosen,
            rejected=rejected,
            idx=idx,
            image_bytes=_image_bytes(value["image"], image_root),
            metainfo=_metainfo(value),
            reference=_reference(value),
            logps_key=value.get("logps_key"),
        )
    except ValueError as error:
        raise RowError(position, idx, str(error)) from error


def parse_prompt(
    row: Mapping[str, Any], position: int, column_map: Mapping[str, str] | None = None, image_root: Path | None = None
) -> Prompt:
    """One row of a table as a prompt. Raises RowError when the row is unusable and ValueError when columns are missing."""
    value = {name: row[column] for name, column in _resolve(row, column_map, PROMPT_COLUMNS).items()}
    idx = _idx(value.get("idx"), position)
    try:
        return Prompt(
            question=_text("question", value["question"], role="user"),
            idx=idx,
            image_bytes=_image_bytes(value["image"], image_root),
            metainfo=_metainfo(value),
        )
    except ValueError as error:
        raise RowError(position, idx, str(error)) from error


def parse_demonstration(
    row: Mapping[str, Any], position: int, column_map: Mapping[str, str] | None = None, image_root: Path | None = None
) -> Demonstration:
    """One row of a table as a prompt with its chosen answer. Errors as for `parse_prompt`."""
    prompt = parse_prompt(row, position, column_map, image_root)
    column = _resolve(row, column_map, DemonstrationDataset.required_columns)["chosen"]
    try:
        return Demonstration(**vars(prompt), chosen=_text("chosen", row[column], role="assistant"))
    except ValueError as error:
        raise RowError(position, prompt.idx, str(error)) from error


def decode_image(data: bytes) -> Image.Image:
    """Decode an image file to RGB as RLAIF-V does: alpha is dropped, EXIF rotation is not applied.

    Integer images of 16 bits keep their upper 8 (Pillow's own conversion would clip them to white).
    Raises ValueError when `data` is no complete image, or has more pixels than Pillow's decompression-bomb limit.
    """
    if not data:
        raise ValueError("image is empty (0 bytes)")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(BytesIO(data)) as image:
                if image.mode.startswith("I"):  # I;16, I;16B, and I for 16-bit PGM
                    image = image.convert("I").point(lambda value: value / 256).convert("L")
                elif image.mode == "F":
                    raise ValueError("32-bit float pixels have no agreed range; store it with 8 or 16 bits")
                return image.convert("RGB")
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise ValueError(f"image is too large, shrink it: {error}") from error
    except UnidentifiedImageError as error:  # its own message holds a memory address
        raise ValueError(f"image does not decode ({len(data)} bytes): not of a format that Pillow reads") from error
    except _DAMAGED_IMAGE as error:
        raise ValueError(f"image does not decode ({len(data)} bytes): {error}") from error


def _refuse_unknown_names(column_map: Mapping[str, str]) -> None:
    unknown = sorted(set(column_map) - set(ROW_COLUMNS))
    if unknown:
        raise ValueError(f"--column_map: {unknown} are not names of muffin; want some of {sorted(ROW_COLUMNS)} on the left of =")


def _stored_row(rows: datasets.Dataset, position: int, idx_column: str | None) -> dict[str, Any]:
    try:
        return rows[position]
    except UnicodeDecodeError as error:  # Arrow does not check the bytes of its texts
        idx = position
        if idx_column is not None:
            with contextlib.suppress(UnicodeDecodeError):
                idx = _idx(rows.select_columns(idx_column)[position][idx_column], position)
        raise RowError(position, idx, f"a text is not UTF-8: {error}") from error


def _keep_images_encoded(table: datasets.Dataset) -> datasets.Dataset:
    """The same table with `Image(decode=False)` columns. Not `cast_column`: for a list of images that rewrites the whole table."""
    info = table.info.copy()
    info.features = datasets.Features({name: _encoded(feature) for name, feature in table.features.items()})
    return datasets.Dataset(table.data, info, table.split, indices_table=table._indices, fingerprint=table._fingerprint)


def _encoded(feature: Any) -> Any:
    if isinstance(feature, datasets.Image):
        return datasets.Image(decode=False)
    if isinstance(feature, datasets.List):
        return datasets.List(_encoded(feature.feature), length=feature.length)
    return feature


def _open_table(path: str) -> tuple[datasets.Dataset, Path | None]:
    """The table at `path` and the folder that its image paths are relative to."""
    local = Path(path)
    if local.is_dir():
        if (local / "state.json").is_file():
            return datasets.load_from_disk(path), local
        files = sorted(file for file in local.glob("*.parquet") if not file.name.startswith("."))
        if not files:
            below = next((file.parent for file in sorted(local.rglob("*.parquet"))), None)
            hint = f"; there are some in {below}, name that folder" if below else ""
            raise ValueError(f"{path}: found no *.parquet file in this folder; want one or more, or a folder of Dataset.save_to_disk{hint}")
        _refuse_missing_shards(local, [file.name for file in files])
        _refuse_other_columns(files)
        return _read_files("parquet", files, path), local
    if local.is_file():
        if local.suffix not in _READERS:
            raise ValueError(f"{path}: found a file ending in {local.suffix!r}, want one of {', '.join(_READERS)}")
        if _READERS[local.suffix] == "json":
            _refuse_null_lines(local)
        return _read_files(_READERS[local.suffix], [local], path), local.parent
    if not _HUB_ID.fullmatch(path) or local.suffix in _READERS:
        raise ValueError(f"{path}: no such file or folder, and not the id of a hub data set (owner/name)")
    try:
        return datasets.load_dataset(path, split="train"), None
    except (DatasetNotFoundError, ConnectionError) as error:
        raise ValueError(f"{path}: no such file or folder here, and as a hub data set it cannot be had: {error}") from error


def _refuse_null_lines(file: Path) -> None:
    """pyarrow's JSON reader takes the process down (a segmentation fault) when a block of lines begins with null."""
    with open(file, "rb") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip() == b"null":
                raise ValueError(f"{file}: line {number} is null, want an object with the row's columns; remove the line")


def _read_files(reader: str, files: list[Path], path: str) -> datasets.Dataset:
    try:
        return datasets.load_dataset(reader, data_files=[glob.escape(str(file)) for file in files], split="train")
    except StopIteration as error:  # what the JSON reader says of an empty file
        raise ValueError(f"{path} cannot be read as {reader}: it holds no rows") from error
    except (DatasetGenerationError, ValueError, OSError, RecursionError) as error:  # ValueError: pyarrow's ArrowInvalid
        raise ValueError(f"{path} cannot be read as {reader}: {error.__cause__ or error}") from error


def _refuse_other_columns(files: Sequence[Path]) -> None:
    """All files must have the columns of the first; `datasets` would fill those that are missing with null. Reads footers only."""
    wanted: set[str] | None = None
    for file in files:
        try:
            names = set(pq.read_schema(file).names)
        except (ValueError, OSError) as error:  # ValueError: pyarrow's ArrowInvalid
            raise ValueError(f"{file} cannot be read as parquet: {error}") from error
        wanted = names if wanted is None else wanted
        if names != wanted:
            missing, more = sorted(wanted - names), sorted(names - wanted)
            raise ValueError(
                f"{file} has other columns than {files[0].name}: {', '.join(missing) or 'none'} missing, {', '.join(more) or 'none'} more; "
                "keep files of one form in a folder"
            )


def _refuse_missing_shards(folder: Path, names: list[str]) -> None:
    shards = [match for match in map(_SHARD.fullmatch, names) if match]
    if len({match[2] for match in shards}) > 1:
        raise ValueError(f"{folder} mixes shards of different scorings: {[match[0] for match in shards]}; keep those of one in a folder")
    if shards:
        total = shards[0][2]
        present = {int(match[1]) for match in shards}
        missing = [f"shard-{number:0{len(total)}}-of-{total}.parquet" for number in range(int(total)) if number not in present]
        if missing:
            shown = ", ".join(missing[:10]) + (f" and {len(missing) - 10} more" if len(missing) > 10 else "")
            raise ValueError(f"{folder}: scoring is not complete, missing {shown}; run its command again to finish it: {SCORING_COMMAND}")


def _idx(value: Any, position: int) -> int | str:
    """The row's own name; its position where it has none. pandas turns numbers with gaps into floats."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return position
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if not isinstance(value, int | str):
        raise RowError(position, position, f"idx is {type(value).__name__}, want a whole number or text")
    return value


def _text(name: str, value: Any, role: str) -> str:
    """A text column: plain, or TRL's list of one message by `role`."""
    if isinstance(value, list):
        value = _message_text(name, value, role)
    if value is None:
        raise ValueError(f"{name} is null")
    if not isinstance(value, str):
        raise ValueError(f"{name} is {type(value).__name__}, want text")
    if not value.strip():
        raise ValueError(f"{name} is empty")
    return value


def _message_text(name: str, messages: list[Any], role: str) -> Any:
    roles = [message["role"] if isinstance(message, dict) and "role" in message else type(message).__name__ for message in messages]
    if roles != [role]:
        raise ValueError(f"{name} is a list of {roles}, want one message of the {role}")
    content = messages[0].get("content")
    if not isinstance(content, list):
        return content
    kinds = [part.get("type") if isinstance(part, dict) else type(part).__name__ for part in content]
    if any(kind not in ("text", "image") for kind in kinds) or kinds.count("image") > (role == "user"):
        raise ValueError(f"{name} has parts {kinds}, want text{' and at most one image' if role == 'user' else ' only'}")
    texts = [part.get("text") for part in content if part["type"] == "text"]
    if not all(isinstance(text, str) for text in texts):
        raise ValueError(f"{name} has a text part without text")
    return "".join(texts)


def _image_bytes(value: Any, image_root: Path | None) -> bytes:
    """The encoded file of an image column: {bytes, path}, bytes, a path, or TRL's list of one of these."""
    if isinstance(value, list):
        if len(value) != 1:
            raise ValueError(f"images holds {len(value)} images, want 1")
        value = value[0]
    if value is None:
        raise ValueError("image is null")
    if isinstance(value, bytes):
        value = {"bytes": value}
    elif isinstance(value, str):
        value = {"path": value}
    elif not isinstance(value, dict):
        raise ValueError(f"image is {type(value).__name__}, want {{bytes, path}}, bytes or a path")
    data, path = value.get("bytes"), value.get("path")
    if not isinstance(data, bytes | None) or not isinstance(path, str | None):
        raise ValueError(f"image holds bytes of type {type(data).__name__} and a path of type {type(path).__name__}, want bytes or a text")
    if data is not None:
        if not data:
            raise ValueError("image is empty (0 bytes)")
        return data
    if not path:
        raise ValueError("image has neither bytes nor a path")
    if _URL.match(path):
        raise ValueError(f"image path {path[:100]!r} is a URL, want a file below the image root; download it first")
    if image_root is None:
        raise ValueError(f"image is stored as path {path!r} only and no image root is given to look it up in")
    file = Path(os.path.normpath(image_root / path))  # links inside the root are the user's own and may lead anywhere
    if not file.is_relative_to(image_root):
        raise ValueError(f"image path {path!r} leads out of the image root {image_root}")
    try:
        return file.read_bytes()
    except OSError as error:
        raise ValueError(f"image file cannot be read: {error}") from error


def _metainfo(value: Mapping[str, Any]) -> dict[str, Any]:
    metainfo = {name: value[name] for name in METAINFO_COLUMNS if value.get(name) is not None}
    if isinstance(metainfo.get("origin_split"), str):
        with contextlib.suppress(ValueError, RecursionError):  # plain text, such as "train", or what Python's reader has no room for
            metainfo["origin_split"] = json.loads(metainfo["origin_split"])
    return metainfo


def _reference(value: Mapping[str, Any]) -> ReferenceLogps | None:
    """Stored log-probs, from the typed columns or from `logps`. Raises ValueError when they cannot be log-probs of this row."""
    if "ref_win_logp" in value:
        logps = {name: value[name] for name in REFERENCE_COLUMNS}
    elif "logps" in value:
        logps = dict(zip(REFERENCE_COLUMNS, _rlaifv_logps(value["logps"]), strict=True))
    else:
        return None
    for answer in ("win", "rej"):
        total, average, tokens = (logps[f"ref_{answer}_{kind}"] for kind in ("logp", "avg_logp", "per_token_logp"))
        try:
            if not _is_finite(total) or not _is_finite(average):
                raise ValueError(f"sum {total} and average {average}, want finite numbers")
            if "logps" not in value:
                _check_token_logps(tokens, total, average)
        except ValueError as error:
            raise ValueError(f"stored ref_{answer} log-probs hold {error}; store them again: {SCORING_COMMAND}") from error
    return ReferenceLogps(**logps)


def _rlaifv_logps(stored: Any) -> list[Any]:
    """The six values of JSON text `[six]` or `{"logps": [six]}`, None for the per-token lists: those cover the padded sequence."""
    try:
        values = json.loads(stored) if isinstance(stored, str) else stored
    except (ValueError, RecursionError) as error:
        raise ValueError(f"stored logps are not JSON: {error}; store them again: {SCORING_COMMAND}") from error
    values = values.get("logps") if isinstance(values, dict) else values
    if not isinstance(values, list) or [isinstance(value, list) for value in values] != [False, False, True] * 2:
        found = f"{len(values)} values" if isinstance(values, list) else type(values).__name__
        raise ValueError(
            f"stored logps hold {found}, want [sum, average, [per token]] of chosen, then of rejected; store them again: {SCORING_COMMAND}"
        )
    return [None if isinstance(value, list) else value for value in values]


def _check_token_logps(tokens: Any, total: float, average: float) -> None:
    """List, sum and average must tell one story: 0.1 % is far above rounding and far below one token more or less."""
    try:
        token_sum = math.fsum(tokens) if isinstance(tokens, list) and tokens else math.nan
    except (TypeError, ValueError, OverflowError):  # null or text in the list, inf beside -inf
        token_sum = math.nan
    if not math.isfinite(token_sum):
        raise ValueError("no finite number per token")
    tolerance = 1e-3 * max(1.0, abs(total))
    if abs(token_sum - total) > tolerance or abs(average * len(tokens) - total) > tolerance:
        raise ValueError(f"{len(tokens)} tokens of sum {token_sum:.4f}, but sum {total:.4f} and average {average:.4f}")


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
