"""PairBatch holds what the loss needs, reduced alike for policy and reference; row orders are pure and keep prompts together."""

import pickle
from collections import Counter
from dataclasses import replace
from functools import partial

import pytest
import torch

from muffin.batches import PairCollator, ShuffledPrompts, ShuffledRows, averaged, prompt_groups, summed, token_weighted
from muffin.pairs import PreferencePair, ReferenceLogps, load_preferences
from muffin.policies import Checkpoint, PolicyOptions, load_adapter
from tests.tiny import write_parquet

CHOSEN, REJECTED = torch.tensor([5, 7, 8, 2]), torch.tensor([5, 9, 2])
REFERENCE = ReferenceLogps(-10.0, -2.5, [-1.0, -2.0, -3.0, -4.0], -6.0, -2.0, [-0.5, -1.5, -4.0])
PAIR = PreferencePair("q", "a", "b", idx=3, image_bytes=b"", reference=REFERENCE)

# (weights of the seven tokens, reference of chosen, reference of rejected); 7 8 and 9 are what differs.
REDUCED = {
    "sum": (summed, [1, 1, 1, 1, 1, 1, 1], -10.0, -6.0),
    "average": (averaged, [0.25, 0.25, 0.25, 0.25, 1 / 3, 1 / 3, 1 / 3], -2.5, -2.0),
    "changed tokens count 3": (partial(token_weighted, weight=3.0, average=False), [1, 3, 3, 1, 1, 3, 1], -1 - 6 - 9 - 4, -0.5 - 4.5 - 4),
    "their average": (partial(token_weighted, weight=3.0, average=True), [1 / 8, 3 / 8, 3 / 8, 1 / 8, 0.2, 0.6, 0.2], -20 / 8, -9 / 5),
}


@pytest.mark.parametrize("case", REDUCED)
def test_reductions(case):
    reduction, weights, chosen, rejected = REDUCED[case]
    reduced = reduction(PAIR, CHOSEN, REJECTED)
    torch.testing.assert_close(reduced.token_weights, torch.tensor(weights, dtype=torch.float32))
    assert (reduced.reference_chosen, reduced.reference_rejected) == pytest.approx((chosen, rejected), rel=1e-7)


def test_token_weights_need_per_token_values():
    padded = replace(PAIR, reference=replace(REFERENCE, ref_win_per_token_logp=None, ref_rej_per_token_logp=None))
    with pytest.raises(ValueError, match=r"eval/muffin_inference_logp\.py"):
        token_weighted(padded, CHOSEN, REJECTED, weight=3.0, average=False)


@pytest.fixture(scope="module")
def adapter(tiny_llava_path):
    return load_adapter(Checkpoint(tiny_llava_path), PolicyOptions())


@pytest.fixture(scope="module")
def pairs(tiny_rows_path) -> list[PreferencePair]:
    dataset = load_preferences(tiny_rows_path)
    return [dataset[position] for position in range(4)]


def with_reference(pair: PreferencePair, adapter, short: int = 0) -> PreferencePair:
    chosen, rejected = adapter.encode(pair.image, pair.question, (pair.chosen, pair.rejected)).response_ids
    lists = [[-1.0] * (len(chosen) - short), [-2.0] * len(rejected)]
    return replace(pair, reference=ReferenceLogps(sum(lists[0]), -1.0, lists[0], sum(lists[1]), -2.0, lists[1]))


def test_collator_makes_a_batch(adapter, pairs):
    collator = pickle.loads(pickle.dumps(PairCollator(adapter, summed, accept_foreign_logps=False)))  # as spawned workers get it
    batch = collator([with_reference(pair, adapter) for pair in pairs])
    lengths = batch.packed.lengths.tolist()
    assert len(batch) == 4 and len(lengths) == 8
    assert batch.idx == ("0", "1", "2", "3")
    assert batch.reference_chosen_logps.tolist() == [-length for length in lengths[::2]]
    assert batch.reference_rejected_logps.tolist() == [-2.0 * length for length in lengths[1::2]]
    assert len(batch.token_weights) == sum(lengths)
    assert len(batch.packed.vision["pixel_values"]) == 2  # rows 0, 1, 2 share an image
    moved = batch.to("meta")
    assert moved.packed.input_ids.is_meta and moved.reference_chosen_logps.is_meta and moved.idx == batch.idx


def test_collator_compares_token_counts(adapter, pairs):
    cut = with_reference(pairs[0], adapter, short=1)
    count = len(cut.reference.ref_win_per_token_logp)
    with pytest.raises(ValueError, match=f"idx 0: {count} log-probs are stored for the {count + 1} tokens of its chosen answer"):
        PairCollator(adapter, summed, accept_foreign_logps=False)([cut])
    assert len(PairCollator(adapter, summed, accept_foreign_logps=True)([cut])) == 1


def test_row_order_is_a_function_of_seed_and_epoch():
    rows = ShuffledRows(100, seed=1)
    torch.manual_seed(0)
    first = list(rows)
    torch.manual_seed(5)
    assert list(rows) == first and sorted(first) == list(range(100)) and first != sorted(first)
    rows.set_epoch(1)
    assert list(rows) != first
    assert list(ShuffledRows(100, seed=2)) != first
    rows.set_epoch(0)
    assert list(rows) == first


# sizes of groups -> how many may be cut beyond what their size asks for, in batches of 4
CUTS = {(1,) * 9: 0, (2,) * 6 + (1,) * 5: 1, (2,) * 8: 0, (7, 1, 1, 1, 2, 2): 0, (5,) * 4: 0, (3,) * 4: 2, (4, 4, 9): 0}


@pytest.mark.parametrize("sizes", CUTS, ids=str)
def test_prompts_stay_in_one_batch(sizes):
    starts = [sum(sizes[:number]) for number in range(len(sizes))]
    groups = [list(range(start, start + size)) for start, size in zip(starts, sizes, strict=True)]
    group_of = {position: number for number, group in enumerate(groups) for position in group}
    sampler = ShuffledPrompts(groups, batch_size=4, seed=0)
    orders = set()
    for epoch in range(20):
        sampler.set_epoch(epoch)
        order = list(sampler)
        orders.add(tuple(order))
        assert sorted(order) == list(range(sum(sizes))) and len(sampler) == sum(sizes)
        batches = [order[start : start + 4] for start in range(0, len(order), 4)]
        spread = Counter(group for batch in batches for group in {group_of[position] for position in batch})
        assert sum(spread[number] > -(-size // 4) for number, size in enumerate(sizes)) <= CUTS[sizes]
    assert len(orders) > 10


def test_prompt_groups(tmp_path):
    dataset = load_preferences(write_parquet(tmp_path / "rows.parquet", 6))
    assert prompt_groups(dataset) == [[0, 1], [2], [3, 4], [5]]  # of three rows, two ask the same of one image
