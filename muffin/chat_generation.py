"""Answers of a policy behind a server, for speed: K requests per prompt, each with a seed of its own.

Whether equal seeds give equal answers is up to the server; batching usually makes them differ in the last digits. `muffin.generation` does
without, and is the reproducible way.
"""

from collections.abc import Sequence
from typing import Any

from muffin.chat import Line, choice_of, image_message, image_url
from muffin.generation import Answer, Decoding
from muffin.judge import StoringJudge
from muffin.pairs import PromptDataset
from muffin.provenance import hash_fields


def ask_for_answers(
    judge: StoringJudge, prompts: PromptDataset, rows: Sequence[int], decoding: Decoding
) -> dict[int, list[Answer | str] | str]:
    """Row -> its K answers, each an answer or why there is none; or one reason, for a prompt that cannot be used."""
    found: dict[int, list[Answer | str] | str] = {}
    bodies: dict[tuple[int, int], dict[str, Any]] = {}
    for row in rows:
        try:
            prompt = prompts[row]
            message = image_message(image_url(prompt.image_bytes, prompt.image), prompt.question)
        except ValueError as error:
            found[row] = str(error)
            continue
        settings = {"model": judge.name, "temperature": decoding.temperature, "max_tokens": decoding.max_new_tokens}
        for k in range(decoding.num_answers):
            bodies[row, k] = {**settings, "messages": [message], "seed": request_seed(decoding.seed, row, k)}
    lines = dict(zip(bodies, judge.complete(list(bodies.values())), strict=True))
    for row in sorted({row for row, _ in bodies}):
        found[row] = [answer_of(lines[row, k]) for k in range(decoding.num_answers)]
    return found


def request_seed(seed: int, row: int, k: int) -> int:
    """31 bits that differ between answers: what servers take as a seed."""
    return int(hash_fields(map(str, (seed, row, k)))[:8], 16) & 0x7FFFFFFF


def answer_of(line: Line) -> Answer | str:
    """The answer that a stored reply holds, or why there is none."""
    try:
        choice = choice_of(line)
    except ValueError as error:
        return str(error)
    return Answer(choice["message"]["content"].strip(), truncated=choice.get("finish_reason") == "length")
