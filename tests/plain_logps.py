"""The oracle of scored files: log-probs by a stock transformers model and processor, one conversation at a time, from all logits."""

from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import nn
from transformers import AutoProcessor, LlavaProcessor

from muffin.pairs import load_preferences

SYSTEM = (
    "A chat between a curious human and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the human's questions."
)


def plain_logps(model: nn.Module, processor: LlavaProcessor, question: str, answer: str, image: Image.Image) -> list[float]:
    """Log-probs of the answer's tokens and its </s>: prompt llava_v1, image padded to a square with the processor's mean colour."""
    side = max(image.size)
    square = Image.new("RGB", (side, side), tuple(int(mean * 255) for mean in processor.image_processor.image_mean))
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    prompt = f"{SYSTEM} USER: <image>\n{question} ASSISTANT:"
    prompt_length = processor(images=square, text=prompt, return_tensors="pt").input_ids.shape[1]
    inputs = processor(images=square, text=f"{prompt} {answer}</s>", return_tensors="pt")
    with torch.no_grad():
        logits = model(**inputs).logits[0].double()
    logps = logits[:-1].log_softmax(dim=-1).gather(1, inputs.input_ids[0, 1:, None])[:, 0]
    return logps[prompt_length - 1 :].tolist()


def assert_scored_like(model: nn.Module, model_path: Path, folder: Path, rows: int) -> None:
    """The `rows` rows in `folder` hold what `model` gives: sums and averages to 1e-5 relative, tokens to 1e-4."""
    processor = AutoProcessor.from_pretrained(model_path)
    scored = load_preferences(folder)
    assert len(scored) == rows
    for position in range(rows):
        pair = scored[position]
        for name, answer in (("win", pair.chosen), ("rej", pair.rejected)):
            expected = plain_logps(model, processor, pair.question, answer, pair.image)
            stored = vars(pair.reference)
            assert stored[f"ref_{name}_per_token_logp"] == pytest.approx(expected, rel=1e-4, abs=1e-4)
            assert stored[f"ref_{name}_logp"] == pytest.approx(sum(expected), rel=1e-5)
            assert stored[f"ref_{name}_avg_logp"] == pytest.approx(sum(expected) / len(expected), rel=1e-5)
