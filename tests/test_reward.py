"""The DPO reward against plain forwards of one answer at a time, and best-of-N weights against all draws."""

from itertools import combinations

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForImageTextToText

from muffin import reward as reward_module
from muffin.logps import get_batch_logps
from muffin.pairs import load_preferences
from muffin.policies import EncodedResponses
from muffin.reward import AnswerReward, load_reward_model, selection_weights
from tests import tiny

ANSWERS = ["The image shows a red circle.", "The image shows a blue ring near a dog.", "Yes", "The image shows a red circle."]


def stock_model(path):
    return AutoModelForImageTextToText.from_pretrained(path, dtype=torch.float32).eval()


def plain_logps(model, adapter, encoded: EncodedResponses) -> list[torch.Tensor]:
    """Per-token log-probs of each answer by itself: no packing, no shared prefix, stock attention."""
    found = []
    for response in encoded.response_ids:
        ids = torch.cat([encoded.prompt_ids, response])[None]
        labels = ids.clone()
        labels[:, : len(encoded.prompt_ids)] = -100
        with torch.no_grad():
            logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), **adapter.cat_vision([encoded.vision])).logits
        found.append(get_batch_logps(logits, labels, return_per_token_logp=True)[0, -len(response) :])
    return found


def assert_rewards(rewards: list[AnswerReward], policy, reference, adapter, encoded, beta):
    expected = zip(plain_logps(policy, adapter, encoded), plain_logps(reference, adapter, encoded), strict=True)
    for reward, (policy_logps, reference_logps), ids in zip(rewards, expected, encoded.response_ids, strict=True):
        per_token = beta * (policy_logps - reference_logps)
        torch.testing.assert_close(reward.per_token, per_token, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(reward.policy_logps, policy_logps, atol=1e-4, rtol=1e-5)
        assert reward.token_ids.tolist() == ids.tolist()
        assert reward.sum == pytest.approx(float(per_token.sum()), abs=1e-4)
        assert reward.mean == pytest.approx(float(per_token.sum()) / len(ids), abs=1e-5)
        assert reward.policy_mean_logp == pytest.approx(float(policy_logps.mean()), abs=1e-4)


@pytest.fixture(scope="module")
def pair(tiny_rows_path):
    return load_preferences(tiny_rows_path)[0]


@pytest.fixture(scope="module")
def other_path(tmp_path_factory, tiny_llava_path):
    """The same architecture and tokenizer with other weights."""
    return tiny.tiny_llava(tmp_path_factory.mktemp("other"), seed=1, sentencepiece_model=tiny_llava_path / "tokenizer.model")


def test_a_policy_and_its_reference(tiny_llava_path, other_path, pair):
    model = load_reward_model(other_path, tiny_llava_path, beta=0.3, dtype="float32")
    rewards = model.reward(pair.image, pair.question, ANSWERS)
    encoded = model.adapter.encode(pair.image, pair.question, ANSWERS)
    assert_rewards(rewards, stock_model(other_path), stock_model(tiny_llava_path), model.adapter, encoded, beta=0.3)
    assert max(reward.sum for reward in rewards) - min(reward.sum for reward in rewards) > 0.1
    assert rewards[0].sum == rewards[3].sum  # equal answers


def test_the_reference_of_a_lora_adapter_is_its_base(tmp_path, tiny_llava_path, pair):
    torch.manual_seed(0)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=r".*language_model.*\.(q_proj|down_proj)", init_lora_weights=False)
    get_peft_model(stock_model(tiny_llava_path), config).save_pretrained(tmp_path)
    model = load_reward_model(tmp_path, dtype="float32")
    rewards = model.reward(pair.image, pair.question, ANSWERS)
    encoded = model.adapter.encode(pair.image, pair.question, ANSWERS)
    policy = PeftModel.from_pretrained(stock_model(tiny_llava_path), tmp_path).eval()
    assert_rewards(rewards, policy, stock_model(tiny_llava_path), model.adapter, encoded, beta=0.1)
    assert abs(rewards[0].sum) > 1e-3
    again = model.reward(pair.image, pair.question, ANSWERS)  # the adapter is on again after the reference's turn
    assert [reward.sum for reward in again] == [reward.sum for reward in rewards]


def test_a_policy_that_was_not_trained_has_no_reward(tiny_llava_path, pair):
    model = load_reward_model(tiny_llava_path, tiny_llava_path, dtype="float32")
    assert all(reward.sum == reward.mean == 0 for reward in model.reward(pair.image, pair.question, ANSWERS))


def test_prompts_are_scored_together_as_apart(tiny_llava_path, other_path, tiny_rows_path):
    model = load_reward_model(other_path, tiny_llava_path, dtype="float32")
    rows = [load_preferences(tiny_rows_path)[position] for position in (0, 2, 3)]
    answers = [ANSWERS, ANSWERS[:1], ANSWERS[1:3]]
    together = model.score([model.adapter.encode(row.image, row.question, texts) for row, texts in zip(rows, answers, strict=True)])
    assert [len(rewards) for rewards in together] == [4, 1, 2]
    for row, texts, rewards in zip(rows, answers, together, strict=True):
        for text, reward in zip(texts, rewards, strict=True):
            (alone,) = model.reward(row.image, row.question, [text])
            torch.testing.assert_close(reward.per_token, alone.per_token, atol=1e-5, rtol=1e-5)


def test_all_answers_share_one_row(tiny_llava_path, other_path, pair):
    model = load_reward_model(other_path, tiny_llava_path, dtype="float32")
    shapes = []
    model.policy.register_forward_pre_hook(lambda module, args, kwargs: shapes.append(kwargs["input_ids"].shape), with_kwargs=True)
    model.reward(pair.image, pair.question, ANSWERS)
    encoded = model.adapter.encode(pair.image, pair.question, ANSWERS)
    ((rows, tokens),) = shapes
    assert rows == 1
    assert tokens < 2 * len(encoded.prompt_ids) + sum(map(len, encoded.response_ids))  # the prompt is there once


def test_what_cannot_be_rewarded_is_named(tmp_path, tiny_llava_path, other_path, pair):
    with pytest.raises(ValueError, match="--reference_name_or_path"):
        load_reward_model(other_path)
    stranger = tiny.tiny_llava(tmp_path / "stranger", sentencepiece_model=tiny.train_sentencepiece(tmp_path / "own.model", pieces=1900))
    with pytest.raises(ValueError, match="another tokenizer than the policy"):
        load_reward_model(other_path, stranger)
    model = load_reward_model(other_path, tiny_llava_path, dtype="float32")
    with pytest.raises(ValueError, match="at least one answer"):
        model.reward(pair.image, pair.question, [])
    with pytest.raises(ValueError, match="control token"):
        model.reward(pair.image, pair.question, ["a </s> b"])
    with torch.no_grad():
        for parameter in model.policy.parameters():
            parameter.fill_(float("nan"))
    with pytest.raises(ValueError, match="not finite"):
        model.reward(pair.image, pair.question, ["A cat."])


def test_the_example_of_the_docstring_runs(tmp_path, monkeypatch, tiny_llava_path, pair, capsys):
    torch.manual_seed(0)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=r".*language_model.*\.q_proj", init_lora_weights=False)
    get_peft_model(stock_model(tiny_llava_path), config).save_pretrained(tmp_path / "my-lora")
    monkeypatch.chdir(tmp_path)
    lines = [line for line in reward_module.__doc__.splitlines() if line.startswith("    ")]
    names = {"image": pair.image.convert("RGBA")}  # of any mode
    exec("\n".join(line.removeprefix("    ") for line in lines), names)
    assert names["best"] is max(names["rewards"], key=lambda each: each.mean)
    printed = capsys.readouterr().out.splitlines()
    assert printed[-1] == f"sum {names['best'].sum:+.3f}, per token {names['best'].mean:+.3f}"
    assert printed[-2].startswith("'</s>'") and len(printed) == 1 + len(names["best"].per_token)
    plain = names["model"].reward(pair.image, "What is this?", ["A cat.", "A dog that sleeps."])
    assert [each.sum for each in plain] == [each.sum for each in names["rewards"]]


def test_reward_from_log_probs_by_hand():
    tokens = torch.tensor([-1.0, -2.0, -3.0])
    reward = AnswerReward(0.1 * (tokens - torch.tensor([-2.0, -2.0, -6.0])), tokens, torch.tensor([-2.0, -2.0, -6.0]), torch.arange(3))
    assert reward.sum == pytest.approx(0.1 * (1 + 0 + 3))
    assert reward.mean == pytest.approx(0.1 * 4 / 3)
    assert reward.policy_mean_logp == pytest.approx(-2)


def test_selection_weights_by_hand():
    assert selection_weights([3, 1, 2], 1) == pytest.approx([1 / 3] * 3)
    assert selection_weights([3, 1, 2], 2) == pytest.approx([2 / 3, 0, 1 / 3])  # draws {3,1} {3,2} {1,2}
    assert selection_weights([3, 1, 2], 3) == [1, 0, 0]
    assert selection_weights([0, 0, 0, 0], 3) == pytest.approx([1 / 4] * 4)
    assert selection_weights([5, 5, 1], 2) == pytest.approx([1 / 2, 1 / 2, 0])


@pytest.mark.parametrize("n", [1, 2, 3, 5, 6])
def test_selection_weights_are_the_average_over_all_draws(n):
    scores = [0.3, -1.0, 2.0, 0.3, 0.7, -5.0]
    wins = [0.0] * 6
    draws = list(combinations(range(6), n))
    for draw in draws:
        best = max(scores[k] for k in draw)
        winners = [k for k in draw if scores[k] == best]
        for k in winners:
            wins[k] += 1 / len(winners) / len(draws)
    assert selection_weights(scores, n) == pytest.approx(wins)


@pytest.mark.parametrize("n", [0, 4])
def test_more_draws_than_candidates_are_refused(n):
    with pytest.raises(ValueError, match=f"best of {n} needs"):
        selection_weights([1.0, 2.0, 3.0], n)
