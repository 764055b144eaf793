"""Tables of rewards from stored log-probs; numbers worked out here."""

import json

import datasets
import pytest
import torch

from muffin.inspection import load_scorings, pair_rewards, token_rewards, training_curves
from muffin.pairs import load_preferences
from tests.scored import scored_rows, six_values, write_rows
from tests.tiny import preference_rows


def scoring(folder, chosen, rejected, rows):
    """Every row with the same log-probs per token."""
    folder.mkdir()
    values = six_values(torch.tensor(chosen), torch.tensor(rejected))
    datasets.Dataset.from_list([row | values for row in rows]).to_parquet(folder / "rows.parquet")
    return load_preferences(folder)


def test_rewards_are_beta_times_the_difference_whatever_the_order_of_rows(tmp_path):
    rows = preference_rows(3)
    before = scoring(tmp_path / "before", [-1.0, -2.0], [-3.0, -1.0, -0.5], rows)
    after = scoring(tmp_path / "after", [-0.5, -2.5], [-4.0, -1.0, -1.0], rows[::-1])
    pairs = pair_rewards(before, after, beta=0.2)
    assert pairs.position.tolist() == [0, 0, 1, 1, 2, 2] and pairs.side.tolist() == ["chosen", "rejected"] * 3
    assert pairs.tokens.tolist() == [2, 3] * 3
    # chosen: -3 -> -3, so 0; rejected: -4.5 -> -6, so 0.2 * -1.5 = -0.3, over three tokens -0.1; margin 0.3
    assert pairs.reward_sum.tolist() == pytest.approx([0.0, -0.3] * 3)
    assert pairs.reward_mean.tolist() == pytest.approx([0.0, -0.1] * 3)
    assert pairs.margin.tolist() == pytest.approx([0.3] * 6)
    tokens = token_rewards(before, after, beta=0.2)
    assert tokens[tokens.position == 1].reward.tolist() == pytest.approx([0.1, -0.1, -0.2, 0.0, -0.1])
    assert tokens.token.tolist() == [0, 1, 0, 1, 2] * 3


def test_scorings_differ_in_nothing_but_the_policy(tmp_path, tiny_llava_path, tiny_rows_path):
    rows, reference = scored_rows(tiny_llava_path, tiny_rows_path)
    before = write_rows(tmp_path / "before", rows, reference)
    trained = write_rows(tmp_path / "trained", rows, reference | {"weights": "other"})
    assert [len(each) for each in load_scorings(before, trained)] == [24, 24]
    half = write_rows(tmp_path / "half", rows, reference | {"numerics": reference["numerics"] | {"autocast_dtype": "bfloat16"}})
    with pytest.raises(ValueError, match=r"in more than the policy.*\n  - numerics: .*'autocast_dtype': None.* in .*before, .*bfloat16"):
        load_scorings(before, half)
    (trained / "muffin_reference.json").unlink()
    with pytest.raises(ValueError, match="trained holds no muffin_reference.json"):
        load_scorings(before, trained)


def test_only_shared_rows_count_and_none_is_an_error(tmp_path):
    rows = preference_rows(3)
    before = scoring(tmp_path / "before", [-1.0], [-2.0], rows[:2])
    after = scoring(tmp_path / "after", [-1.0], [-2.5], rows[1:])
    assert pair_rewards(before, after, beta=1.0).position.tolist() == [1, 1]
    with pytest.raises(ValueError, match="share no row"):
        pair_rewards(before, scoring(tmp_path / "other", [-1.0], [-2.0], rows[2:]), beta=1.0)


def test_other_tokens_and_contradicting_scores_are_refused(tmp_path):
    rows = preference_rows(1)
    before = scoring(tmp_path / "before", [-1.0], [-2.0], rows)
    with pytest.raises(ValueError, match="rejected of the row .* has 1 tokens before and 2 after"):
        token_rewards(before, scoring(tmp_path / "longer", [-1.0], [-2.0, -1.0], rows), beta=1.0)
    twice = tmp_path / "twice"
    scoring(twice, [-1.0], [-2.0], rows)
    other = six_values(torch.tensor([-3.0]), torch.tensor([-2.0]))
    datasets.Dataset.from_list([rows[0] | other]).to_parquet(twice / "more.parquet")
    with pytest.raises(ValueError, match="scored twice with different log-probs"):
        pair_rewards(before, load_preferences(twice), beta=1.0)


def test_rows_without_log_probs_are_refused(tmp_path):
    datasets.Dataset.from_list(preference_rows(1)).to_parquet(tmp_path / "rows.parquet")
    plain = load_preferences(tmp_path / "rows.parquet")
    with pytest.raises(ValueError, match="no stored log-probs per token"):
        pair_rewards(plain, plain, beta=1.0)


def test_training_curves_are_the_logged_steps(tmp_path):
    history = [{"step": 1, "loss": 0.6931, "rewards/margins": 0.0}, {"step": 2, "loss": 0.5}, {"step": 2, "train_runtime": 3.0}]
    (tmp_path / "trainer_state.json").write_text(json.dumps({"log_history": history}))
    assert training_curves(tmp_path).loss.to_dict() == {1: 0.6931, 2: 0.5}
    with pytest.raises(ValueError, match="no trainer_state.json"):
        training_curves(tmp_path / "nowhere")
