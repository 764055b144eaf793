"""Metric keys and values by hand."""

import math

import pytest
import torch

from muffin.metrics import preference_metrics


def test_per_pair_values():
    metrics = preference_metrics(
        chosen_rewards=torch.tensor([1.0, -0.5, 2.0]),
        rejected_rewards=torch.tensor([-0.5, 1.5, 2.0]),
        policy_chosen_logps=torch.tensor([-8.0, -11.0, -3.0], requires_grad=True),
        policy_rejected_logps=torch.tensor([-6.0, -2.0, -4.0], requires_grad=True),
    )
    assert {name: values.tolist() for name, values in metrics.items() if name != "rewards/gradient_weight"} == {
        "rewards/chosen": [1.0, -0.5, 2.0],
        "rewards/rejected": [-0.5, 1.5, 2.0],
        "rewards/accuracies": [1.0, 0.0, 0.0],
        "rewards/margins": [1.5, -2.0, 0.0],
        "logps/chosen": [-8.0, -11.0, -3.0],
        "logps/rejected": [-6.0, -2.0, -4.0],
    }
    expected = [1 / (1 + math.exp(1.5)), 1 / (1 + math.exp(-2.0)), 0.5]
    assert metrics["rewards/gradient_weight"].tolist() == pytest.approx(expected)
    assert not any(values.requires_grad for values in metrics.values())
