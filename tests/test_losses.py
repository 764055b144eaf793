"""Losses and their gradients with numbers worked out by hand."""

import math

import pytest
import torch

from muffin.losses import (
    bradley_terry_probability,
    cdpo_loss,
    dpo_gradient_weight,
    dpo_loss,
    ipo_loss,
    reward_model_loss,
    sft_loss,
)

# Log-ratios against the reference: chosen +2 and -1, rejected -1 and +3; with beta 0.5 rewards 1, -0.5 and -0.5, 1.5; margins 1.5, -2.
LOGPS = {
    "policy_chosen_logps": torch.tensor([-8.0, -11.0], dtype=torch.float64),
    "policy_rejected_logps": torch.tensor([-6.0, -2.0], dtype=torch.float64),
    "reference_chosen_logps": torch.tensor([-10.0, -10.0], dtype=torch.float64),
    "reference_rejected_logps": torch.tensor([-5.0, -5.0], dtype=torch.float64),
}


def negative_log_sigmoid(x: float) -> float:
    return math.log(1 + math.exp(-x))


def test_dpo_by_hand():
    losses, chosen, rejected = dpo_loss(**LOGPS, beta=0.5)
    assert chosen.tolist() == [1.0, -0.5]
    assert rejected.tolist() == [-0.5, 1.5]
    assert losses.tolist() == pytest.approx([negative_log_sigmoid(1.5), negative_log_sigmoid(-2.0)])


def test_dpo_at_the_reference_is_ln_2():
    at_reference = {name: LOGPS[name.replace("policy", "reference")] for name in LOGPS}
    losses, chosen, rejected = dpo_loss(**at_reference, beta=0.1)
    assert losses.tolist() == pytest.approx([math.log(2)] * 2)
    assert chosen.tolist() == rejected.tolist() == [0, 0]


def test_reference_free_dpo():
    losses, chosen, rejected = dpo_loss(**LOGPS, beta=0.5, reference_free=True)
    assert chosen.tolist() == [-4.0, -5.5]
    assert rejected.tolist() == [-3.0, -1.0]
    assert losses.tolist() == pytest.approx([negative_log_sigmoid(-1.0), negative_log_sigmoid(-4.5)])


def test_dpo_gradient_is_the_papers():
    """d loss / d log pi(chosen) = -beta * sigmoid(r_rejected - r_chosen), and its opposite for rejected (section 4)."""
    policy = {name: LOGPS[name].clone().requires_grad_() for name in ("policy_chosen_logps", "policy_rejected_logps")}
    losses, chosen, rejected = dpo_loss(**{**LOGPS, **policy}, beta=0.5)
    assert not chosen.requires_grad and not rejected.requires_grad
    losses.sum().backward()
    weight = [1 / (1 + math.exp(1.5)), 1 / (1 + math.exp(-2.0))]
    assert dpo_gradient_weight(chosen, rejected).tolist() == pytest.approx(weight)
    assert policy["policy_chosen_logps"].grad.tolist() == pytest.approx([-0.5 * w for w in weight])
    assert policy["policy_rejected_logps"].grad.tolist() == pytest.approx([0.5 * w for w in weight])


def test_cdpo_mixes_both_orders():
    losses, chosen, rejected = cdpo_loss(**LOGPS, beta=0.5, label_smoothing=0.1)
    assert chosen.tolist() == [1.0, -0.5] and rejected.tolist() == [-0.5, 1.5]
    expected = [0.9 * negative_log_sigmoid(m) + 0.1 * negative_log_sigmoid(-m) for m in (1.5, -2.0)]
    assert losses.tolist() == pytest.approx(expected)
    assert cdpo_loss(**LOGPS, beta=0.5, label_smoothing=0.0)[0].tolist() == dpo_loss(**LOGPS, beta=0.5)[0].tolist()


def test_ipo_by_hand():
    # log-ratio differences h = 3 and -4; 1 / (2 * 0.5) = 1
    losses, chosen, rejected = ipo_loss(**LOGPS, beta=0.5)
    assert losses.tolist() == pytest.approx([4.0, 25.0])
    assert chosen.tolist() == [1.0, -0.5] and rejected.tolist() == [-0.5, 1.5]


def test_bradley_terry_and_reward_model():
    winner, loser = torch.tensor([math.log(3.0), 2.0]), torch.tensor([0.0, 2.0])
    assert bradley_terry_probability(winner, loser).tolist() == pytest.approx([0.75, 0.5])
    assert reward_model_loss(winner, loser).tolist() == pytest.approx([-math.log(0.75), math.log(2)])
    assert sft_loss(torch.tensor([-3.0])).tolist() == [3.0]


def test_extreme_margins_stay_finite():
    far = torch.tensor([-1e4, 1e4])
    zero = torch.zeros(2)
    losses = dpo_loss(far, zero, zero, zero, beta=1.0)[0]
    assert losses.tolist() == pytest.approx([1e4, 0.0])
