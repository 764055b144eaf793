"""Preference files with reference log-probs, scored by the plain form: one response at a time, full logits, stock attention."""

import json
from pathlib import Path
from typing import Any

import datasets
import torch
from torch import Tensor, nn

from muffin.logps import get_batch_logps
from muffin.pairs import PreferencePair, load_preferences
from muffin.policies import Checkpoint, PolicyAdapter, PolicyOptions, encode_pair, load_adapter, load_policy
from muffin.provenance import REFERENCE_FILE, describe_reference, logps_key, reference_id, resolve_numerics

FP32 = resolve_numerics(dtype="float32", bits=None, lora_enable=False, device_type="cpu")


def plain_token_logps(model: nn.Module, adapter: PolicyAdapter, pair: PreferencePair) -> tuple[Tensor, Tensor]:
    """Log-probs of the tokens of chosen (R_chosen,) and rejected (R_rejected,), with gradients where the model has them."""
    encoded = encode_pair(adapter, pair)
    answers = []
    for response in encoded.response_ids:
        ids = torch.cat([encoded.prompt_ids, response])[None]
        labels = ids.clone()
        labels[:, : len(encoded.prompt_ids)] = -100
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), **adapter.cat_vision([encoded.vision])).logits
        answers.append(get_batch_logps(logits, labels, return_per_token_logp=True)[0, -len(response) :])
    return answers[0], answers[1]


def six_values(chosen: Tensor, rejected: Tensor) -> dict[str, Any]:
    columns = {}
    for answer, tokens in (("win", chosen), ("rej", rejected)):
        total = float(tokens.double().sum())
        columns |= {
            f"ref_{answer}_logp": total,
            f"ref_{answer}_avg_logp": total / len(tokens),
            f"ref_{answer}_per_token_logp": tokens.tolist(),
        }
    return columns


def scored_rows(model_path: Path, rows_path: Path, options: PolicyOptions | None = None) -> tuple[list[dict], dict[str, Any]]:
    """The rows of a file with the six columns and keys of the policy at `model_path` in float32, and the reference's description."""
    checkpoint = Checkpoint(model_path)
    adapter = load_adapter(checkpoint, options or PolicyOptions())
    reference = describe_reference(checkpoint, adapter, FP32)
    model = load_policy(checkpoint, adapter, dtype=torch.float32).eval()
    dataset = load_preferences(rows_path)
    rows = []
    for position in range(len(dataset)):
        pair = dataset[position]
        with torch.no_grad():
            values = six_values(*plain_token_logps(model, adapter, pair))
        key = logps_key(reference_id(reference), pair.image_bytes, pair.question, pair.chosen, pair.rejected)
        rows.append({**dataset.table[position], **values, "logps_key": key})
    return rows, reference


def write_rows(folder: Path, rows: list[dict], reference: dict[str, Any]) -> Path:
    """What scoring leaves: a Parquet file and muffin_reference.json in `folder`; returns `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    datasets.Dataset.from_list(rows).to_parquet(folder / "rows.parquet")
    (folder / REFERENCE_FILE).write_text(json.dumps({"reference_id": reference_id(reference), "reference": reference}))
    return folder
