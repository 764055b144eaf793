"""Generated answers against transformers' own greedy search, and draws against the probabilities they are drawn from."""

import io
import random
from collections import Counter
from copy import copy
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from torch import nn

from muffin import generation
from muffin.attention import packed_attention
from muffin.generation import Answer, Decoding, generate
from muffin.policies import Checkpoint, EncodedResponses, PolicyOptions, generation_inputs, load_adapter, load_policy
from tests import tiny, tiny_decoders

QUESTIONS = ("Describe.", "What is red?", "Describe the picture.\nWhat shapes are there?", "How many 12?", "Is there a dog")


class EagerToStop(nn.Module):
    """A policy whose terminator is as probable as its best word, give or take: answers end at very different lengths."""

    def __init__(self, model: nn.Module, terminator_id: int, bonus: float) -> None:
        super().__init__()
        self.model = model
        self.terminator_id = terminator_id
        self.bonus = bonus
        self.batch_sizes: list[int] = []

    def forward(self, **inputs):
        output = self.model(**inputs)
        output.logits[..., self.terminator_id] += self.bonus
        self.batch_sizes.append(len(output.logits))
        return output


@pytest.fixture(scope="module")
def adapter(tiny_llava_path):
    return load_adapter(Checkpoint(tiny_llava_path), PolicyOptions())


@pytest.fixture(scope="module")
def model(tiny_llava_path, adapter) -> nn.Module:
    return load_policy(Checkpoint(tiny_llava_path), adapter, dtype=torch.float32).eval()


@pytest.fixture
def eager(model, adapter) -> EagerToStop:
    return EagerToStop(model, adapter.terminator_id, 4.0)


@pytest.fixture(scope="module")
def prompts(adapter) -> list[EncodedResponses]:
    rng = random.Random(0)
    images = [Image.open(io.BytesIO(tiny.draw_image(rng)[0])).convert("RGB") for _ in QUESTIONS]
    encoded = [adapter.encode(image, question, ()) for image, question in zip(images, QUESTIONS, strict=True)]
    assert len({len(item.prompt_ids) for item in encoded}) > 3, "prompts of several lengths, so that padding matters"
    return encoded


# --- greedy


@pytest.mark.parametrize("bonus", [0.0, 1.5])
def test_greedy_is_transformers_greedy(model, adapter, prompts, bonus):
    def processor(ids, scores):
        scores[:, adapter.terminator_id] += bonus
        return scores

    with torch.no_grad():
        out = model.generate(
            **generation_inputs(adapter, prompts),
            do_sample=False,
            max_new_tokens=24,
            eos_token_id=adapter.terminator_id,
            logits_processor=[processor],
        )
    expected = []
    for ids in out[:, max(len(item.prompt_ids) for item in prompts) :].tolist():
        stopped = adapter.terminator_id in ids
        ids = ids[: ids.index(adapter.terminator_id)] if stopped else ids
        expected.append([Answer(adapter.tokenizer.decode(ids, skip_special_tokens=True).strip(), not stopped)])
    found = generate(EagerToStop(model, adapter.terminator_id, bonus), adapter, prompts, range(5), Decoding(1, 0.0, 24))
    assert found == expected
    assert {answer.truncated for (answer,) in found} == ({True} if bonus == 0 else {True, False})


# --- beams


@torch.no_grad()
def plain_beams(model, adapter, prompt: EncodedResponses, num_beams: int, steps: int, bonus: float) -> Answer:
    """The best answer by its definition: whole forwards, no cache; ended beams are put aside, scored by their mean log-prob."""
    beams, ended = [((), 0.0)], []
    for step in range(1, steps + 1):
        longer = []
        for ids, score in beams:
            inputs = generation_inputs(adapter, [replace(prompt, prompt_ids=torch.cat([prompt.prompt_ids, torch.tensor(ids).long()]))])
            logits = model(**inputs).logits[0, -1]
            logits[adapter.terminator_id] += bonus
            values, words = logits.log_softmax(-1).topk(2 * num_beams)
            longer += [((*ids, word), score + value) for value, word in zip(values.tolist(), words.tolist(), strict=True)]
        longer = sorted(longer, key=lambda beam: -beam[1])[: 2 * num_beams]
        ended += [(score / step, ids) for ids, score in longer[:num_beams] if ids[-1] == adapter.terminator_id]
        ended = sorted(ended, reverse=True)[:num_beams]
        beams = [beam for beam in longer if beam[0][-1] != adapter.terminator_id][:num_beams]
        if len(ended) == num_beams and beams[0][1] / step <= ended[-1][0]:
            break
    else:
        ended += [(score / steps, ids) for ids, score in beams]
    ids = max(ended)[1]
    truncated = ids[-1] != adapter.terminator_id
    return Answer(adapter.tokenizer.decode(ids if truncated else ids[:-1], skip_special_tokens=True).strip(), truncated)


@pytest.fixture
def own_model(tiny_llava_path, adapter) -> nn.Module:
    """One to be changed."""
    return load_policy(Checkpoint(tiny_llava_path), adapter, dtype=torch.float32).eval()


@pytest.mark.parametrize("bonus", [0.0, 2.0])
def test_beams_find_the_best_answer_of_a_plain_search(own_model, adapter, prompts, bonus):
    """In one batch, whatever the checkpoint's own generation config says."""
    own_model.generation_config.update(repetition_penalty=3.0, length_penalty=-5.0, no_repeat_ngram_size=1)
    expected = [[plain_beams(own_model, adapter, prompt, 3, 7, bonus)] for prompt in prompts]
    own_model.lm_head.register_forward_hook(lambda module, args, logits: add_at(logits, adapter.terminator_id, bonus))
    found = generate(own_model, adapter, prompts, range(5), Decoding(1, 0.0, 7, num_beams=3))
    assert found == expected and found == generate(own_model, adapter, prompts, range(5), Decoding(1, 0.0, 7, seed=9, num_beams=3))
    assert found != generate(own_model, adapter, prompts, range(5), Decoding(1, 0.0, 7)), "greedy is another search"
    assert {answer.truncated for (answer,) in found} == ({True} if bonus == 0 else {True, False})


def add_at(logits: torch.Tensor, word: int, bonus: float) -> torch.Tensor:
    logits = logits.clone()
    logits[..., word] += bonus
    return logits


def test_beams_end_at_each_prompts_own_limit(model, adapter, prompts):
    longest = max(len(prompt.prompt_ids) for prompt in prompts)
    cramped = copy(adapter)
    cramped.model_max_length = longest + 3
    found = generate(model, cramped, prompts, range(5), Decoding(1, 0.0, 6, num_beams=2))
    limits = [min(6, longest + 3 - len(prompt.prompt_ids)) for prompt in prompts]
    assert len(set(limits)) > 1
    assert found == [[plain_beams(model, adapter, prompt, 2, limit, 0.0)] for prompt, limit in zip(prompts, limits, strict=True)]


def test_nan_stops_beams(own_model, adapter, prompts):
    own_model.lm_head.register_forward_hook(lambda module, args, logits: logits * float("nan"))
    with pytest.raises(ValueError, match="logits are NaN"):
        generate(own_model, adapter, prompts, range(5), Decoding(1, 0.0, 4, num_beams=2))


# --- sampling: the same draws however the work is cut


def test_draws_do_not_depend_on_the_batch(eager, adapter, prompts):
    decoding = Decoding(num_answers=6, temperature=0.9, max_new_tokens=40, seed=3)
    rows = [10, 11, 12, 13, 14]
    together = generate(eager, adapter, prompts, rows, decoding)
    lengths = [len(adapter.tokenizer(answer.text).input_ids) for answers in together for answer in answers]
    assert min(lengths) < 6 and max(lengths) > 30
    assert {answer.truncated for answers in together for answer in answers} == {True, False}
    assert len({answer.text for answers in together for answer in answers}) > 20

    alone = [generate(eager, adapter, [prompt], [row], decoding)[0] for prompt, row in zip(prompts, rows, strict=True)]
    assert alone == together
    backwards = generate(eager, adapter, prompts[::-1], rows[::-1], decoding)
    assert backwards[::-1] == together
    fewer = generate(eager, adapter, prompts, rows, Decoding(2, 0.9, 40, 3))
    assert fewer == [answers[:2] for answers in together]
    shorter = generate(eager, adapter, prompts, rows, Decoding(6, 0.9, 10, 3))
    cut = [answer for answers in shorter for answer in answers]
    whole = [answer for answers in together for answer in answers]
    assert all(one == other for one, other in zip(cut, whole, strict=True) if not one.truncated)
    assert sum(not answer.truncated for answer in cut) >= 2


def test_draws_depend_on_seed_row_and_number(model, adapter, prompts):
    prompt = prompts[0]
    texts = {
        (seed, row, number): answer.text
        for seed in range(3)
        for row, answers in enumerate(generate(model, adapter, [prompt] * 3, range(3), Decoding(3, 1.0, 8, seed)))
        for number, answer in enumerate(answers)
    }
    assert len(set(texts.values())) == 27


def test_finished_answers_leave_the_batch(eager, adapter, prompts):
    generate(eager, adapter, prompts, range(5), Decoding(8, 1.0, 60))
    assert eager.batch_sizes[:2] == [5, 40], "prefill once per prompt, then K answers each"
    assert eager.batch_sizes[-1] < 20 and sorted(eager.batch_sizes[1:], reverse=True) == eager.batch_sizes[1:]


def test_noise_blocks_are_one_stream(model, adapter, prompts, monkeypatch):
    whole = generate(model, adapter, prompts[:2], [0, 1], Decoding(2, 1.0, 12))
    monkeypatch.setattr(generation, "NOISE_VALUES", 3 * model.config.text_config.vocab_size)
    assert generate(model, adapter, prompts[:2], [0, 1], Decoding(2, 1.0, 12)) == whole


# --- sampling: the right distribution


@pytest.fixture(scope="module")
def toy():
    """A model of 100 words with sharp probabilities, and what `generate` needs to know about it: the text of an answer is its ids."""
    model = tiny_decoders.decoder(dtype=torch.float32, initializer_range=0.4)
    adapter = SimpleNamespace(
        cat_vision=lambda items: {"pixel_values": torch.cat([item["pixel_values"].float() for item in items])},
        terminator_id=2,
        model_max_length=64,
        tokenizer=SimpleNamespace(decode=lambda ids, skip_special_tokens: " ".join(map(str, ids))),
    )
    return model, adapter


def chi_square(counts: Counter, probabilities: torch.Tensor, draws: int) -> tuple[float, int]:
    """Statistic and degrees of freedom, cells of fewer than five expected draws put together."""
    cells = [(counts[word], draws * float(p)) for word, p in enumerate(probabilities)]
    large = [cell for cell in cells if cell[1] >= 5]
    rest = tuple(map(sum, zip(*[cell for cell in cells if cell[1] < 5], strict=True)))
    cells = [*large, rest] if rest[1] >= 1 else large
    return sum((found - expected) ** 2 / expected for found, expected in cells), len(cells) - 1


@pytest.mark.parametrize("temperature", [0.7, 1.5])
def test_words_are_drawn_with_their_probabilities(toy, temperature):
    """First words against softmax(logits / T) of a plain forward, second words against it after the most frequent first one."""
    model, adapter = toy
    prompt = tiny_decoders.prompt([])
    draws = 6000
    (answers,) = generate(model, adapter, [prompt], [0], Decoding(draws, temperature, 2))
    words = [[*map(int, answer.text.split()), 2, 2][:2] for answer in answers]

    def probabilities(ids: list[int]) -> torch.Tensor:
        input_ids = torch.cat([prompt.prompt_ids, torch.tensor(ids, dtype=torch.long)])[None]
        with torch.no_grad():
            logits = model(input_ids=input_ids, pixel_values=prompt.vision["pixel_values"].float()).logits[0, -1]
        return (logits / temperature).softmax(-1)

    first = Counter(word for word, _ in words)
    (frequent, times), *_ = [item for item in first.most_common(2) if item[0] != 2]
    second = Counter(word for before, word in words if before == frequent)
    for counts, expected, number in ((first, probabilities([]), draws), (second, probabilities([frequent]), times)):
        statistic, freedom = chi_square(counts, expected, number)
        assert freedom > 5
        assert abs(statistic - freedom) < 4 * (2 * freedom) ** 0.5, "mean of the chi-square distribution +- 4 standard deviations"
        wrong, freedom = chi_square(counts, expected**1.2 / (expected**1.2).sum(), number)
        assert wrong - freedom > 4 * (2 * freedom) ** 0.5, "the test would see a temperature that is off by a fifth"


# --- limits and errors


def test_limits(model, adapter, prompts):
    """An answer ends where prompt + answer reach model_max_length, each prompt's at its own place."""
    longest = max(len(prompt.prompt_ids) for prompt in prompts)
    cramped = SimpleNamespace(
        **{name: getattr(adapter, name) for name in ("cat_vision", "terminator_id")},
        model_max_length=longest + 3,
        tokenizer=SimpleNamespace(decode=lambda ids, skip_special_tokens: str(len(ids))),
    )
    policy = EagerToStop(model, adapter.terminator_id, -100.0)
    found = generate(policy, cramped, prompts, range(5), Decoding(2, 1.0, 20))
    assert policy.batch_sizes[-1] < 10, "and is not computed further"
    assert [[int(answer.text) for answer in answers] for answers in found] == [
        [min(20, longest + 3 - len(prompt.prompt_ids))] * 2 for prompt in prompts
    ]
    assert all(answer.truncated for answers in found for answer in answers)


def test_nan_stops(eager, adapter, prompts):
    eager.bonus = float("nan")
    with pytest.raises(ValueError, match="logits are NaN"):
        generate(eager, adapter, prompts, range(5), Decoding(2, 1.0, 4))


def test_packed_attention_is_refused(model, adapter, prompts):
    with packed_attention(model), pytest.raises(ValueError, match="generate outside packed_attention"):
        generate(model, adapter, prompts, range(5), Decoding(2, 1.0, 4))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"temperature": 0.0}, "--temperature 0 gives --num_answers 10 equal answers"),
        ({"temperature": -1.0}, "--temperature -1.0 must be 0"),
        ({"num_answers": 0}, "--num_answers 0"),
        ({"max_new_tokens": 0}, "--max_new_tokens 0"),
        ({"num_beams": 0}, "--num_beams 0"),
        ({"num_beams": 3}, "--num_beams 3 draws nothing; use it with --temperature 0, not 0.7"),
    ],
)
def test_contradictory_decoding_is_refused(values, message):
    with pytest.raises(ValueError, match=message):
        Decoding(**values)


def test_bfloat16_autocast(model, adapter, prompts):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = generate(model, adapter, prompts, range(5), Decoding(2, 0.7, 6))
    assert [len(answers) for answers in found] == [2] * 5 and found[0][0].text
