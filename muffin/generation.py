"""Answers of a policy: K per prompt, each a function of (policy, prompt, seed, row, k) and of nothing else.

    Prompt --adapter.encode--> prompts, left-padded --one prefill--> KV cache, repeated K times --token by token--> Answer

A token is drawn by the Gumbel-max trick (Maddison et al. 2014, arXiv:1411.0030, section 2): argmax(logits / T + Gumbel noise) is a sample
of softmax(logits / T). Every answer's noise comes from a generator of its own, so in float32 a draw does not depend on what else is in
the batch, on the order of prompts or on the number of processes (only rounding of the logits does; a flip needs two scores that agree
to 1e-6). bfloat16 logits differ between batches by enough to change some answers.

With several beams the answer is transformers' beam search; nothing is drawn.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import datasets
import torch
from torch import Tensor, nn
from transformers import DynamicCache, LogitsProcessor, LogitsProcessorList

from muffin.attention import decoder_config
from muffin.policies.base import EncodedResponses, PolicyAdapter, generation_inputs
from muffin.provenance import hash_fields

NOISE_VALUES = 1 << 16  # noise of a sequence is drawn for as many steps at a time as fit into this many values
FINISHED_SHARE = 0.25  # finished answers leave the batch once they are this share of it
NAN_LOGITS = "the model's logits are NaN; check its weights, or generate with --dtype float32"

# What an answer adds to the columns of its prompt. A prompt that cannot be encoded has one row, without answer and with the reason.
ANSWER_FEATURES = datasets.Features(
    {
        "prompt_row": datasets.Value("int64"),  # position of the prompt in the data that was generated from
        "answer_number": datasets.Value("int64"),
        "answer": datasets.Value("string"),
        "truncated": datasets.Value("bool"),
        "failure": datasets.Value("string"),
    }
)


@dataclass(frozen=True)
class Decoding:
    """How answers are drawn.

    num_answers: K answers per prompt. temperature: 0 takes the most probable token every time (greedy), which needs K = 1.
    max_new_tokens: limit on an answer, terminator included. seed: of all draws, together with each prompt's row number and k.
    num_beams: more than 1 searches for the most probable answer (per token), with temperature 0.
    """

    num_answers: int = 10
    temperature: float = 0.7
    max_new_tokens: int = 512
    seed: int = 0
    num_beams: int = 1

    def __post_init__(self) -> None:
        if self.num_answers < 1 or self.max_new_tokens < 1:
            raise ValueError(f"--num_answers {self.num_answers} and --max_new_tokens {self.max_new_tokens} must be at least 1")
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"--temperature {self.temperature} must be 0 (greedy) or a positive number")
        if self.temperature == 0 and self.num_answers > 1:
            raise ValueError(f"--temperature 0 gives --num_answers {self.num_answers} equal answers; use --num_answers 1")
        if self.num_beams < 1:
            raise ValueError(f"--num_beams {self.num_beams} must be at least 1; 1 searches no beams")
        if self.num_beams > 1 and self.temperature > 0:
            raise ValueError(f"--num_beams {self.num_beams} draws nothing; use it with --temperature 0, not {self.temperature}")


@dataclass(frozen=True)
class Answer:
    """An answer as text, without the white space around it; `truncated` when its limit came before the terminator."""

    text: str
    truncated: bool


def generate(
    model: nn.Module, adapter: PolicyAdapter, prompts: Sequence[EncodedResponses], rows: Sequence[int], decoding: Decoding
) -> list[list[Answer]]:
    """K answers for each of P prompts, as one batch of P x K sequences; images and prompts are computed once.

    rows: (P,) what names each prompt in the draws: its position in the data. Runs outside `packed_attention`, under the caller's autocast.
    Raises ValueError when the logits are not numbers.
    """
    limits = [min(decoding.max_new_tokens, adapter.model_max_length - len(prompt.prompt_ids)) for prompt in prompts]
    keys = [(decoding.seed, row, k) for row in rows for k in range(decoding.num_answers)]
    with torch.no_grad():
        if decoding.num_beams > 1:
            tokens = _search_beams(model, adapter, prompts, limits, decoding.num_beams)
        else:
            tokens = _decode(model, adapter, prompts, limits, keys, decoding)
    answers = []
    for sequence, ids in enumerate(tokens.tolist()):
        ids = ids[: limits[sequence // decoding.num_answers]]
        truncated = adapter.terminator_id not in ids
        ids = ids if truncated else ids[: ids.index(adapter.terminator_id)]
        answers.append(Answer(adapter.tokenizer.decode(ids, skip_special_tokens=True).strip(), truncated))
    return [answers[start : start + decoding.num_answers] for start in range(0, len(answers), decoding.num_answers)]


def _decode(
    model: nn.Module,
    adapter: PolicyAdapter,
    prompts: Sequence[EncodedResponses],
    limits: Sequence[int],
    keys: Sequence[tuple[int, int, int]],
    decoding: Decoding,
) -> Tensor:
    """(S, longest limit) token ids of S = P x K sequences, on the CPU; what follows a terminator or a limit means nothing."""
    device = next(model.parameters()).device
    inputs = {name: tensor.to(device) for name, tensor in generation_inputs(adapter, prompts).items()}
    cache = DynamicCache(config=decoder_config(model))
    fixed = {"past_key_values": cache, "use_cache": True, "logits_to_keep": 1}
    logits = model(**inputs, position_ids=_left_padded_positions(prompts).to(device), **fixed).logits[:, -1]

    repeat = torch.arange(len(prompts), device=device).repeat_interleave(decoding.num_answers)
    cache.reorder_cache(repeat)
    logits = logits[repeat]
    steps, width = max(limits), inputs["attention_mask"].shape[1]
    attention_mask = torch.nn.functional.pad(inputs["attention_mask"][repeat], (0, steps), value=1)
    next_positions = torch.tensor([int(prompt.position_ids.max()) + 1 for prompt in prompts], device=device)[repeat]
    last_steps = torch.tensor(limits, device=device)[repeat] - 1
    noise = _GumbelNoise(keys, logits.shape[-1], device) if decoding.temperature > 0 else None

    tokens = torch.full((len(keys), steps), adapter.terminator_id, device=device)
    sequences = torch.arange(len(keys), device=device)  # which sequence each row of the batch is
    unfinished = torch.ones_like(sequences, dtype=torch.bool)
    broken = torch.zeros((), dtype=torch.bool, device=device)
    for step in range(steps):
        scores = logits.float() if noise is None else logits.float() / decoding.temperature + noise.at(step)
        broken |= scores.isnan().any()
        drawn = scores.argmax(dim=-1)
        tokens[sequences, step] = drawn
        unfinished &= (drawn != adapter.terminator_id) & (step < last_steps)
        remaining = int(unfinished.sum())
        if remaining == 0:
            break
        if remaining <= (1 - FINISHED_SHARE) * len(sequences):
            keep = unfinished.nonzero()[:, 0]
            cache.reorder_cache(keep)
            sequences, drawn, unfinished = sequences[keep], drawn[keep], unfinished[keep]
            attention_mask, next_positions, last_steps = attention_mask[keep], next_positions[keep], last_steps[keep]
            if noise is not None:
                noise.keep(keep)
        positions = (next_positions + step)[:, None]
        logits = model(
            input_ids=drawn[:, None],
            attention_mask=attention_mask[:, : width + step + 1],
            position_ids=positions if prompts[0].position_ids.dim() == 1 else positions.expand(3, -1, -1),
            **fixed,
        ).logits[:, -1]
    if broken:
        raise ValueError(NAN_LOGITS)
    return tokens.cpu()


def _search_beams(
    model: nn.Module, adapter: PolicyAdapter, prompts: Sequence[EncodedResponses], limits: Sequence[int], num_beams: int
) -> Tensor:
    """(P, longest limit) token ids of each prompt's best beam, on the CPU, filled up with the terminator."""
    device = next(model.parameters()).device
    tokens = torch.full((len(prompts), max(limits)), adapter.terminator_id)
    for limit in sorted(set(limits)):  # the best beam under a limit is not the beginning of the best under a higher one
        rows = [row for row, own in enumerate(limits) if own == limit]
        inputs = {name: tensor.to(device) for name, tensor in generation_inputs(adapter, [prompts[row] for row in rows]).items()}
        # everything that bears on the result is named: a checkpoint's generation_config.json may say otherwise
        found = model.generate(
            **inputs,
            num_beams=num_beams,
            do_sample=False,
            max_new_tokens=limit,
            min_new_tokens=0,
            length_penalty=1.0,
            early_stopping=False,
            repetition_penalty=1.0,
            no_repeat_ngram_size=0,
            num_return_sequences=1,
            eos_token_id=adapter.terminator_id,
            pad_token_id=adapter.terminator_id,
            logits_processor=LogitsProcessorList([_RefuseNaN()]),
        )[:, inputs["input_ids"].shape[1] :].cpu()
        tokens[rows, : found.shape[1]] = found
    return tokens


class _RefuseNaN(LogitsProcessor):
    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if scores.isnan().any():
            raise ValueError(NAN_LOGITS)
        return scores


def _left_padded_positions(prompts: Sequence[EncodedResponses]) -> Tensor:
    """(P, W) position ids, or (3, P, W) for M-RoPE, aligned with `generation_inputs`; padding is 0."""
    width = max(len(prompt.prompt_ids) for prompt in prompts)
    padded = [torch.nn.functional.pad(prompt.position_ids, (width - prompt.position_ids.shape[-1], 0)) for prompt in prompts]
    return torch.stack(padded, dim=-2)


class _GumbelNoise:
    """Standard Gumbel noise for S sequences, each from a generator of its own, seeded by its key (seed, row, k)."""

    def __init__(self, keys: Sequence[tuple[int, int, int]], vocabulary: int, device: torch.device) -> None:
        self._generators = [torch.Generator(device).manual_seed(int(hash_fields(map(str, key))[:16], 16)) for key in keys]
        self._block = torch.empty(len(keys), max(1, NOISE_VALUES // vocabulary), vocabulary, device=device)

    def at(self, step: int) -> Tensor:
        """(S, V) noise of a step; steps are asked for in order."""
        steps = self._block.shape[1]
        if step % steps == 0:
            for generator, values in zip(self._generators, self._block, strict=True):
                torch.rand(values.shape, generator=generator, out=values)
            self._block.log_().neg_().log_().neg_()
        return self._block[:, step % steps]

    def keep(self, rows: Tensor) -> None:
        """Go on with some of the sequences."""
        self._generators = [self._generators[row] for row in rows.tolist()]
        self._block = self._block[rows]
