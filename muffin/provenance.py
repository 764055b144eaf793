"""Which policy, seen through which encoding and computed how, made a stored log-prob: reference ids, row keys, numerics.

A scored row carries `logps_key` = hash(reference id, image bytes, question, chosen, rejected). The reference id is the hash of a
description (weights, tokenizer, encoding settings, numerics, a probe), which `muffin_reference.json` beside the shards spells out:

    description  --reference_id-->  "5f0c..."  --logps_key(row)-->  "a93e..."   stored with the row, recomputed before training

Rows may be filtered, shuffled and concatenated: each proves itself.
"""

import hashlib
import json
import logging
import os
import platform
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from filelock import FileLock
from PIL import Image
from tqdm import tqdm

from muffin.attention import Implementation, choose_kernel
from muffin.pairs import PreferenceDataset, RowError
from muffin.policies import Checkpoint, PolicyOptions
from muffin.policies.base import PolicyAdapter

logger = logging.getLogger(__name__)

REFERENCE_FILE = "muffin_reference.json"
CACHE_DIR = Path("~/.cache/muffin")

# Written by libraries into configs on every save, without effect on log-probs.
_VOLATILE_CONFIG_KEYS = {
    *("_name_or_path", "_commit_hash", "transformers_version", "torch_dtype", "dtype", "architectures", "use_cache"),
    *("base_model_name_or_path", "peft_version", "inference_mode", "revision", "auto_mapping"),
}
# Original LLaVA checkpoints have pickled weights only (read with weights_only=True); safetensors are taken where there are both.
WEIGHT_FILES = ("*.safetensors", "pytorch_model*.bin")
_PACKAGES = ("torch", "transformers", "tokenizers", "peft", "pillow")

# One fixed row whose encoding shows any change that no setting names: not square, with digits, CJK, line breaks and an emoji.
_PROBE_QUESTION = "How many 12 红色?\nℹ️"
_PROBE_ANSWERS = ("12 red ones\n👍🏽", "红色  3")


@dataclass(frozen=True)
class Numerics:
    """How log-probs are computed.

    weights_dtype: "float32", "bfloat16" or "nf4", as held in memory (LoRA adapters are always float32).
    autocast_dtype: "bfloat16", or None for no autocast.
    bits: 4 for quantised weights, else None.
    attention: the kernel, see `muffin.attention.resolve_kernel`.
    """

    weights_dtype: str
    autocast_dtype: str | None
    bits: int | None
    attention: str

    @property
    def load_dtype(self) -> torch.dtype:
        """What `load_policy` loads the weights in; under nf4 the type of what stays unquantised."""
        return torch.float32 if self.weights_dtype == "float32" else torch.bfloat16

    def autocast(self, device_type: str) -> torch.autocast:
        """Context manager to run a forward in; without an autocast dtype it turns any outer autocast off."""
        dtype = None if self.autocast_dtype is None else torch.bfloat16
        return torch.autocast(device_type, dtype=dtype, enabled=dtype is not None)


def resolve_numerics(
    *,
    dtype: Literal["auto", "bfloat16", "float32"],
    bits: int | None,
    lora_enable: bool,
    device_type: str | None = None,
    attn_implementation: Implementation = "auto",
) -> Numerics:
    """The numerics a policy is trained in, and therefore its reference is scored in: both sides call this one function.

        dtype     how it trains   weights    autocast
        float32   full or LoRA    float32    none
        bfloat16  full            float32    bfloat16     (float32 master weights)
        bfloat16  LoRA            bfloat16   bfloat16     (base bfloat16, adapter float32)
        any       bits 4          nf4        bfloat16

    "auto" is bfloat16 where the hardware computes in it (CUDA with bf16, CPU with AVX512-BF16), else float32.
    device_type: "cuda" or "cpu"; None takes CUDA where there is one. Raises ValueError for unknown dtype or bits, and for an
    attn_implementation that cannot run.
    """
    device_type = device_type or ("cuda" if torch.cuda.is_available() else "cpu")
    if dtype not in ("auto", "bfloat16", "float32"):
        raise ValueError(f"--dtype is {dtype!r}, expected auto, bfloat16 or float32")
    if bits not in (None, 4):
        raise ValueError(f"--bits is {bits}, expected 4 or nothing")
    half = dtype == "bfloat16" or (dtype == "auto" and _computes_bfloat16(device_type))
    if bits == 4:
        weights, autocast = "nf4", "bfloat16"
    elif half:
        weights, autocast = "bfloat16" if lora_enable else "float32", "bfloat16"
    else:
        weights, autocast = "float32", None
    choice = choose_kernel(device_type, torch.float32 if autocast is None else torch.bfloat16, attn_implementation)
    logger.info("attention runs on %s: %s", choice.kernel, choice.reason)
    return Numerics(weights, autocast, bits, choice.kernel)


def _computes_bfloat16(device_type: str) -> bool:
    if device_type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    cpuinfo = Path("/proc/cpuinfo")
    return device_type == "cpu" and cpuinfo.exists() and "avx512_bf16" in cpuinfo.read_text()


def hash_fields(fields: Iterable[str | bytes]) -> str:
    """128 bits of sha256 over fields, each preceded by its length, so that no two lists of fields collide by joining."""
    digest = hashlib.sha256()
    for field in fields:
        data = field.encode("utf-8", "surrogatepass") if isinstance(field, str) else field
        digest.update(len(data).to_bytes(8, "big"))
        digest.update(data)
    return digest.hexdigest()[:32]


def hash_files(files: Sequence[Path], cache_dir: Path | None = None) -> list[str]:
    """sha256 of each file, remembered in `cache_dir` (default ~/.cache/muffin) by path, size and modification time.

    Processes of one machine take turns: the first hashes, the others read what it found.
    """
    directory = (cache_dir or CACHE_DIR).expanduser()
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with FileLock(directory / "hashes.lock"):
            return _hash_files(files, directory / "hashes.json")
    except OSError as error:  # a read-only or full disk; an unreadable file among `files` fails again below
        logger.warning("%s cannot be used (%s); file hashes are not cached", directory, error)
        return [_sha256(file) for file in files]


def _hash_files(files: Sequence[Path], cache: Path) -> list[str]:
    try:
        known = json.loads(cache.read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        known = {}
    stamps = {}
    for file in files:
        stat = file.stat()
        stamps[str(file.resolve())] = [stat.st_size, stat.st_mtime_ns]
    missing = [path for path, stamp in stamps.items() if path not in known or known[path]["stamp"] != stamp]
    if missing:
        if (gigabytes := sum(stamps[path][0] for path in missing) / 1e9) > 1:  # seconds to minutes
            logger.info("hashing %d files, %.1f GB", len(missing), gigabytes)
        with ThreadPoolExecutor(4) as pool:
            for path, digest in zip(missing, pool.map(_sha256, map(Path, missing)), strict=True):
                known[path] = {"stamp": stamps[path], "sha256": digest}
        known = {path: entry for path, entry in known.items() if Path(path).exists()}
        write_atomically(cache, json.dumps(known, indent=1).encode())
    return [known[str(file.resolve())]["sha256"] for file in files]


def _sha256(file: Path) -> str:
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def write_atomically(path: Path, data: bytes) -> None:
    """Write through a temporary file in the same folder: after a crash `path` holds the old content or the new, never a part."""
    partial = path.with_name(f".{path.name}.{platform.node()}-{os.getpid()}")
    with open(partial, "wb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(partial, path)


def weights_id(checkpoint: Checkpoint, cache_dir: Path | None = None) -> str:
    """Hash of names and contents of the checkpoint's weight files and of its config, LoRA files added.

    The config counts because it changes the function the weights compute (lora_alpha, rope_theta); what libraries stamp into it does not.
    Raises ValueError when there are no weight files.
    """
    index = checkpoint.base / "model.safetensors.index.json"
    if index.exists():
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    else:
        found = [file.name for kind in WEIGHT_FILES for file in checkpoint.base.glob(kind) if not file.name.startswith("adapter_")]
        names = sorted(name for name in found if name.endswith(Path(found[0]).suffix))
    files = [checkpoint.base / name for name in names]
    if not files:
        raise ValueError(f"{checkpoint.base} holds no weights ({' or '.join(WEIGHT_FILES)}); convert the checkpoint with `save_pretrained`")
    configs = [checkpoint.base / "config.json"]
    if checkpoint.lora is not None:
        files.append(checkpoint.lora / "adapter_model.safetensors")
        configs.append(checkpoint.lora / "adapter_config.json")
    fields = []
    for file, digest in zip(files, hash_files(files, cache_dir), strict=True):
        fields += [file.name, digest]
    for config in configs:
        fields += [config.name, _canonical(_without_volatile(json.loads(config.read_text())))]
    return hash_fields(fields)


def _without_volatile(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_volatile(item) for key, item in value.items() if key not in _VOLATILE_CONFIG_KEYS}
    return value


def _canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def describe_reference(checkpoint: Checkpoint, adapter: PolicyAdapter, numerics: Numerics, cache_dir: Path | None = None) -> dict[str, Any]:
    """Everything a reference log-prob depends on besides its row, as JSON values; `environment` is recorded but not part of the id."""
    return {
        "weights": weights_id(checkpoint, cache_dir),
        "tokenizer": _tokenizer_hash(adapter),
        "encoding": json.loads(_canonical(adapter.settings())),
        "numerics": asdict(numerics),
        "probe": _probe_hash(adapter),
        "environment": {
            "model": str(checkpoint.folder),
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
            **{package: version(package) for package in _PACKAGES},
        },
    }


def _tokenizer_hash(adapter: PolicyAdapter) -> str:
    state = json.loads(adapter.tokenizer.backend_tokenizer.to_str())
    state.pop("truncation", None)  # left behind by the last call, not part of the tokenizer
    state.pop("padding", None)
    return hash_fields([json.dumps(state, sort_keys=True)])


def _probe_hash(adapter: PolicyAdapter) -> str:
    rows, columns = np.mgrid[0:61, 0:97]
    image = Image.fromarray(np.stack([rows * 4, columns * 2, (rows * columns) % 251], axis=-1).astype(np.uint8))
    encoded = adapter.encode(image, _PROBE_QUESTION, _PROBE_ANSWERS)
    ids = [tensor.tolist() for tensor in (encoded.prompt_ids, *encoded.response_ids, encoded.position_ids)]
    return hash_fields([_canonical(ids), encoded.vision_key])


def reference_id(description: dict[str, Any]) -> str:
    """Hash of a description without its environment: 32 hex digits."""
    return hash_fields([_canonical({key: value for key, value in description.items() if key != "environment"})])


def logps_key(reference_id: str, image_bytes: bytes, question: str, chosen: str, rejected: str) -> str:
    """Proof that stored log-probs belong to this row and this reference: 32 hex digits."""
    return hash_fields([reference_id, image_bytes, question, chosen, rejected])


def foreign_rows(dataset: PreferenceDataset, reference_id: str) -> list[int]:
    """Positions of rows whose stored log-probs another reference made, or other content, or that carry no key. Decodes no image."""
    foreign = []
    for position in tqdm(range(len(dataset)), desc="checking keys", unit="row", mininterval=1.0, delay=2.0):
        try:
            pair = dataset[position]
        except RowError:
            foreign.append(position)
            continue
        if pair.logps_key != logps_key(reference_id, pair.image_bytes, pair.question, pair.chosen, pair.rejected):
            foreign.append(position)
    return foreign


def read_reference(data_path: str | Path) -> dict[str, Any] | None:
    """The description in the `muffin_reference.json` in or beside `data_path`, None when there is none."""
    path = Path(data_path)
    file = (path if path.is_dir() else path.parent) / REFERENCE_FILE
    return json.loads(file.read_text())["reference"] if file.exists() else None


def explain_difference(stored: dict[str, Any], current: dict[str, Any]) -> list[str]:
    """One line per differing field: stored value, current value, and what mends it. Empty when the reference ids are equal."""
    lines = []
    if stored["weights"] != current["weights"]:
        models = f"{stored['environment']['model']} then, {current['environment']['model']} now"
        lines.append(_difference("weights", stored["weights"], current["weights"], f"--model_name_or_path ({models})"))
    if stored["tokenizer"] != current["tokenizer"]:
        lines.append(_difference("tokenizer", stored["tokenizer"], current["tokenizer"], "the tokenizer files in --model_name_or_path"))
    lines += [
        _difference(name, then, now, f"--{name} {then}" if name in _ENCODING_FLAGS else "--model_name_or_path")
        for name, then, now in differing(stored["encoding"], current["encoding"])
    ]
    if stored["probe"] != current["probe"] and not lines:
        versions = ", ".join(f"{name} {then} -> {now}" for name, then, now in environment_differences(stored, current)) or "none"
        mend = f"the versions of the packages (changed: {versions}), or score again"
        lines.append(_difference("probe (ids and pixels of a fixed row)", stored["probe"], current["probe"], mend))
    for name, then, now in differing(stored["numerics"], current["numerics"]):
        mend = _attention_flag(then) if name == "attention" else _numerics_flags(stored["numerics"])
        lines.append(_difference(name, then, now, mend))
    return lines


_ENCODING_FLAGS = frozenset(each.name for each in fields(PolicyOptions))


def environment_differences(stored: dict[str, Any], current: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    """(name, stored, current) of packages, device and model path that differ: worth a warning, no reason to refuse."""
    return differing(stored["environment"], current["environment"])


def differing(stored: dict[str, Any], current: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    """(name, stored, current) of the entries that differ; None stands for absent."""
    names = [*stored, *(name for name in current if name not in stored)]
    return [(name, stored.get(name), current.get(name)) for name in names if stored.get(name) != current.get(name)]


def _difference(name: str, stored: Any, current: Any, mend: str) -> str:
    return f"{name}: stored log-probs were made with {stored}, this run has {current}; mended by {mend}"


def _numerics_flags(stored: dict[str, Any]) -> str:
    """The flags that lead `resolve_numerics` to the stored numerics."""
    if stored["bits"] is not None:
        return f"--bits {stored['bits']}"
    if stored["autocast_dtype"] is None:
        return "--dtype float32"
    return f"--dtype bfloat16 --lora_enable {stored['weights_dtype'] == 'bfloat16'}"


def _attention_flag(stored: str) -> str:
    """The flag that leads `resolve_numerics` to the stored kernel, where that can run."""
    if stored == "torch_varlen":
        return "--attn_implementation auto where flash-attn is not installed, or score again"
    return f"--attn_implementation {stored}"
