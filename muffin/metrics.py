"""Preference metrics under TRL's keys, so that plots overlay."""

from torch import Tensor

from muffin.losses import dpo_gradient_weight


def preference_metrics(
    chosen_rewards: Tensor, rejected_rewards: Tensor, policy_chosen_logps: Tensor, policy_rejected_logps: Tensor
) -> dict[str, Tensor]:
    """Per-pair values (P,) of every metric; callers average them over what they report on.

    rewards/* are implicit rewards (beta times nats), logps/* policy log-probs in nats, rewards/accuracies 1 where chosen is rewarded more
    (a tie counts 0, as in TRL), rewards/gradient_weight the pair's DPO gradient scale (`muffin.losses.dpo_gradient_weight`).
    """
    return {
        "rewards/chosen": chosen_rewards,
        "rewards/rejected": rejected_rewards,
        "rewards/accuracies": (chosen_rewards > rejected_rewards).to(chosen_rewards.dtype),
        "rewards/margins": chosen_rewards - rejected_rewards,
        "rewards/gradient_weight": dpo_gradient_weight(chosen_rewards, rejected_rewards),
        "logps/chosen": policy_chosen_logps.detach(),
        "logps/rejected": policy_rejected_logps.detach(),
    }
