"""Tables of rewards from stored log-probs; numbers worked out here."""

import json
import math
import random

import datasets
import pandas as pd
import pytest
import torch

from muffin.inspection import (
    JudgedClaim,
    auroc,
    best_of_n_table,
    calibration_error,
    claim_table,
    claims_of,
    confusion,
    evaluation_curves,
    last_round,
    live_rewards,
    load_choices,
    load_moments,
    load_scoring_adapter,
    load_scorings,
    pair_orders,
    pair_rewards,
    pair_tokens,
    read_rows,
    reliability,
    share_below_zero,
    start_loss,
    token_rewards,
    token_texts,
    training_curves,
    training_options,
    worst_pairs,
)
from muffin.pairs import load_preferences
from muffin.reward import load_reward_model
from muffin.shapeworld.scenes import Scene, Thing
from tests.scored import scored_rows, six_values, write_rows
from tests.tiny import preference_rows, tiny_llava

SCENE = Scene("standard", 0, (Thing("red", "circle", "at the top", "large"), Thing("blue", "cross", "on the left", "small")), seed=1)
TRUE, COUNT, MANY = "At the top there is a red circle.", "The image shows two objects.", "The image shows three objects."
ELSEWHERE, INVENTED = "In the center there is a red circle.", "On the right there is a green square."


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


def test_live_rewards_are_those_of_two_scorings(tmp_path, tiny_llava_path, tiny_rows_path):
    """The stored values come from the plain form, one answer at a time; the live ones from packed rows."""
    trained = tiny_llava(tmp_path / "trained", seed=1)
    before = load_preferences(write_rows(tmp_path / "before", *scored_rows(tiny_llava_path, tiny_rows_path)))
    after = load_preferences(write_rows(tmp_path / "after", *scored_rows(trained, tiny_rows_path)))
    model = load_reward_model(trained, tiny_llava_path, beta=0.3, dtype="float32")
    pairs, tokens = live_rewards(model, load_preferences(tiny_rows_path))
    for found, expected in ((pairs, pair_rewards(before, after, beta=0.3)), (tokens, token_rewards(before, after, beta=0.3))):
        pd.testing.assert_frame_equal(found, expected, rtol=1e-4, atol=1e-4)
    assert pairs.reward_sum.abs().min() > 1e-3


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


def test_evaluations_go_under_the_names_of_training(tmp_path):
    history = [{"step": 1, "loss": 0.7}, {"step": 2, "eval_loss": 0.6, "eval_rewards/margins": 0.2, "epoch": 1.0}]
    (tmp_path / "trainer_state.json").write_text(json.dumps({"log_history": history}))
    found = evaluation_curves(tmp_path)
    assert found.loc[2].to_dict() == {"loss": 0.6, "rewards/margins": 0.2, "epoch": 1.0}
    assert len(training_curves(tmp_path)) == 1
    (tmp_path / "trainer_state.json").write_text(json.dumps({"log_history": history[:1]}))
    assert len(evaluation_curves(tmp_path)) == 0


def test_start_of_the_loss(tmp_path):
    assert training_options(tmp_path) == {}
    (tmp_path / "options.json").write_text(json.dumps({"DPOArguments": {"dpo_beta": 0.2, "loss_type": "ipo"}}))
    assert start_loss(training_options(tmp_path)) == pytest.approx(6.25)  # (0 - 1 / (2 * 0.2))^2
    assert start_loss({"dpo_beta": 0.1, "loss_type": "sigmoid", "dpo_label_smoothing": 0.1}) == pytest.approx(0.6931, abs=1e-4)
    assert start_loss({"dpo_beta": 0.1, "sft_weight": 1.0}) is None


def test_share_below_zero_and_the_worst(tmp_path):
    rows = [
        {"position": p, "side": side, "margin": m} for p, m in ((4, 0.5), (5, -0.1), (6, 0.0), (7, -2.0)) for side in ("chosen", "rejected")
    ]
    rewards = pd.DataFrame(rows)
    assert share_below_zero(rewards) == 50.0  # a margin of 0 is not below
    assert worst_pairs(rewards, 3).to_dict() == {7: -2.0, 5: -0.1, 6: 0.0}
    assert worst_pairs(rewards, 3).index.tolist() == [7, 5, 6]


def test_tokens_of_a_pair_have_their_text(tmp_path, tiny_llava_path, tiny_rows_path):
    rows, reference = scored_rows(tiny_llava_path, tiny_rows_path)
    folder = write_rows(tmp_path / "scored", rows[:2], reference)
    scored = load_preferences(folder)
    adapter = load_scoring_adapter(folder, tiny_llava_path)
    assert adapter.settings() == reference["encoding"]
    tokens = pair_tokens(adapter, scored[0], token_rewards(scored.select([0]), scored, beta=0.1))
    pair = scored[0]
    for side, answer in (("chosen", pair.chosen), ("rejected", pair.rejected)):
        found = tokens[tokens.side == side]
        assert "".join(found.text) == f"{answer}</s>" and found.token.tolist() == list(range(len(found)))
    shared = [tokens[(tokens.side == side) & tokens.shared].text.tolist() for side in ("chosen", "rejected")]
    assert shared[0] == shared[1]
    first = [tokens[(tokens.side == side) & ~tokens.shared].text.tolist()[0] for side in ("chosen", "rejected")]
    assert first[0] != first[1]
    with pytest.raises(ValueError, match="chosen of the row with idx .* stored log-probs and .* tokens here; give the --policy"):
        pair_tokens(adapter, pair, token_rewards(scored.select([0]), scored, beta=0.1).iloc[1:])
    (folder / "muffin_reference.json").unlink()
    with pytest.raises(ValueError, match="holds no muffin_reference.json"):
        load_scoring_adapter(folder, tiny_llava_path)


def test_parts_of_a_character_are_kept_for_its_last_token():
    class Bytes:
        def decode(self, ids, clean_up_tokenization_spaces):
            return bytes(ids).decode("utf-8", "replace")

    assert token_texts(Bytes(), list("a é".encode())) == ["a", " ", "", "é"]
    assert token_texts(Bytes(), list("é".encode()[:1])) == ["\ufffd"]  # cut in the middle: the mark is all there is
    assert token_texts(Bytes(), []) == []


def judged(claims: list[str], p_yes: list[float | None], **more) -> dict:
    return {"claims": claims, "p_yes": p_yes, "p_no": [None if yes is None else 1 - yes for yes in p_yes], **more}


def test_claims_with_their_truth():
    rows = [judged([TRUE, INVENTED, "Nice."], [0.9, 0.6, None]), judged([COUNT, MANY, ELSEWHERE], [0.5, 0.2, 0.7]), judged([], [])]
    plain = claim_table(rows)
    assert plain.accepted.tolist() == [True, True, False, False, False, True]  # a tie rejects, as does an unasked claim
    assert plain.answer.tolist() == [0, 0, 0, 1, 1, 1] and "truth" not in plain
    with pytest.raises(ValueError, match="no column `scene`"):
        confusion(plain)
    known = claim_table([row | {"scene": SCENE.to_json()} for row in rows])
    assert known.truth.tolist() == [True, False, False, True, False, False]
    kinds = ["object, true", "object, invented", "no statement", "count, true", "count, wrong", "object, elsewhere"]
    assert known.kind.tolist() == kinds
    table = confusion(known)
    assert table.loc["object, invented"].to_dict() == {"claims": 1, "accepted": 1, "rejected": 0, "right": 0.0}
    assert table.loc["count, true"].to_dict() == {"claims": 1, "accepted": 0, "rejected": 1, "right": 0.0}
    assert table.loc["count, wrong", "right"] == 100.0
    with pytest.raises(ValueError, match="no judged claim"):
        claim_table([judged([], [])])


def test_claims_of_a_side_and_of_what_was_never_judged():
    row = {"chosen_claims": ["a", "b"], "chosen_p_yes": [0.06, 0.0], "chosen_p_no": [0.02, 0.0]}
    assert claims_of(row, "chosen") == [JudgedClaim("a", pytest.approx(0.75)), JudgedClaim("b", 0.5)]
    assert [claim.accepted for claim in claims_of(row, "chosen")] == [True, False]
    assert claims_of(row, "rejected") == claims_of({"claims": None, "p_yes": None, "p_no": None}) == []


def test_auroc_is_the_share_of_pairs_in_order():
    rng = random.Random(0)
    for count in (2, 5, 40):
        scores = [rng.randrange(6) / 5 for _ in range(count)]  # with ties
        truths = [True, False] + [rng.random() < 0.4 for _ in range(count - 2)]
        pairs = [
            (s > t) + (s == t) / 2
            for s, true in zip(scores, truths, strict=True)
            if true
            for t, o in zip(scores, truths, strict=True)
            if not o
        ]
        assert auroc(scores, truths) == pytest.approx(sum(pairs) / len(pairs))
    assert math.isnan(auroc([0.1, 0.2], [True, True]))


def test_reliability_by_hand():
    claims = pd.DataFrame({"p_yes": [0.0, 0.2, 0.9, 1.0, 0.5, math.nan], "truth": [False, True, True, True, False, True]})
    bins = reliability(claims, bins=2)
    assert bins[["low", "high", "claims"]].to_numpy().tolist() == [[0.0, 0.5, 2], [0.5, 1.0, 3]]  # 1.0 is in the last bin, 0.5 in the upper
    assert bins.predicted.tolist() == pytest.approx([0.1, 0.8]) and bins.true.tolist() == pytest.approx([1 / 2, 2 / 3])
    assert calibration_error(bins) == pytest.approx((2 * 0.4 + 3 * (0.8 - 2 / 3)) / 5)
    # Wilson with 1 of 2: 0.5 +- 1.96 sqrt(1/8 + 1.96^2 / 16) / (1 + 1.96^2 / 2)
    assert (bins.true_low[0], bins.true_high[0]) == pytest.approx((0.0945, 0.9055), abs=1e-4)
    assert reliability(claims, bins=10).claims.tolist() == [1, 1, 1, 2]  # empty bins are left out


def test_order_of_pairs_against_the_truth():
    pairs = [
        {"chosen": TRUE, "rejected": INVENTED},
        {"chosen": ELSEWHERE, "rejected": INVENTED},
        {"chosen": f"{MANY} {INVENTED}", "rejected": MANY},
    ]
    found = pair_orders([pair | {"scene": SCENE.to_json()} for pair in pairs])
    assert found.order.tolist() == ["right", "tie", "wrong"]
    assert found.chosen_wrong.tolist() == [0, 1, 2] and found.rejected_wrong.tolist() == [1, 1, 1]
    with pytest.raises(ValueError, match="no column `scene`"):
        pair_orders(pairs)


def test_moments_in_order_of_time(tmp_path):
    def at(value):
        return {"greedy": {"chair_s": value, "chair_s_interval": [value - 1, value + 2]}}

    stored = {"after": at(1.0), "after-10": at(2.0), "after-2": at(3.0), "before": at(4.0), "labeler": {}, "seconds": {"x": 1}}
    (tmp_path / "results.json").write_text(json.dumps(stored))
    moments = load_moments(tmp_path / "results.json")
    assert moments.moment.tolist() == ["before", "after-2", "after-10", "after"]
    assert moments.iloc[0].to_dict() == {"moment": "before", "decoding": "greedy", "chair_s": 4.0, "chair_s_low": 3.0, "chair_s_high": 6.0}
    with pytest.raises(ValueError, match="does not exist"):
        load_moments(tmp_path / "nothing.json")


def test_moments_leave_benchmarks_out(tmp_path):
    file = tmp_path / "results.json"
    before = {"greedy": {"words": 4.0, "words_interval": [3.0, 6.0]}, "benchmarks": {"chair": {"chair_s": 40.0}}}
    file.write_text(json.dumps({"before": before, "after": {"benchmarks": before["benchmarks"]}}))
    assert load_moments(file).decoding.tolist() == ["greedy"]
    file.write_text(json.dumps({"before": {}, "after": {}}))
    with pytest.raises(ValueError, match="holds no evaluation"):
        load_moments(file)


def test_choices_of_checkpoints(tmp_path):
    file = tmp_path / "results.json"
    measured = [
        {"name": "start", "hallucination": 9.0, "capability": 3.0},
        {"name": "checkpoint-2", "hallucination": 8.0, "capability": 3.0},
    ]
    choice = {"chosen": "checkpoint-2", "hallucination": "rejected_share", "capability": "accepted_claims", "measured": measured}
    file.write_text(json.dumps({"choice": {"round-1": choice, "round-2": {"chosen": "the end of the training"}}}))
    found = load_choices(file)
    assert found["round"].tolist() == ["round-1", "round-1"]
    assert found["chosen"].tolist() == [False, True]
    assert found["hallucination"].tolist() == [9.0, 8.0] and set(found["capability_name"]) == {"accepted_claims"}
    file.write_text(json.dumps({"choice": {"round-2": {"chosen": "the end of the training"}}}))
    with pytest.raises(ValueError, match="holds no choice of checkpoints"):
        load_choices(file)


def test_best_of_n_points():
    points = [{"value": float(n), "low": 0.0, "high": 9.0} for n in (5, 4)]
    table = best_of_n_table({"n": [1, 2], "curves": {"random": {"words": points}, "oracle": {"words": points}}})
    assert table.selector.tolist() == ["random", "random", "oracle", "oracle"]
    assert table[["n", "value"]].to_numpy().tolist() == [[1, 5.0], [2, 4.0]] * 2


def test_rows_without_images_and_the_last_round(tmp_path, tiny_rows_path):
    rows = read_rows(tiny_rows_path)
    assert len(rows) == 24 and "image" not in rows[0] and rows[0]["question"]
    for name in ("round-2", "round-10", "round-x"):
        (tmp_path / name).mkdir()
    assert last_round(tmp_path).name == "round-10"
    with pytest.raises(ValueError, match="holds no folder round-N"):
        last_round(tmp_path / "round-2")
