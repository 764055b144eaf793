"""Preference losses: pure functions of per-pair log-probs (P,), in nats. Callers name their arguments.

Rewards are implicit: r(x, y) = beta * (log pi(y | x) - log pi_ref(y | x)) up to a term of the prompt alone
(Rafailov et al. 2023, "Direct Preference Optimization", arXiv:2305.18290, eq. 5): DPO is the Bradley-Terry reward model with this reward.
"""

from difflib import SequenceMatcher

import torch
import torch.nn.functional as F
from torch import Tensor


def dpo_loss(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    reference_chosen_logps: Tensor,
    reference_rejected_logps: Tensor,
    beta: float,
    reference_free: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Direct Preference Optimization (arXiv:2305.18290, eq. 7): -log sigmoid(r_chosen - r_rejected).

    All log-probs (P,); beta > 0, usually 0.05 to 0.5. With reference_free the reference counts as uniform (its log-probs as 0).
    Returns (losses, chosen_rewards, rejected_rewards), each (P,); rewards are detached. Losses given averages instead of sums are the
    length-averaged form (`--dpo_use_average`).
    """
    chosen, rejected = _implicit_rewards(
        policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps, beta, reference_free
    )
    return reward_model_loss(chosen, rejected), chosen.detach(), rejected.detach()


def cdpo_loss(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    reference_chosen_logps: Tensor,
    reference_rejected_logps: Tensor,
    beta: float,
    label_smoothing: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Conservative DPO: labels are wrong with probability label_smoothing, in [0, 0.5)
    (Mitchell 2023, "A note on DPO with noisy preferences", eq. 3).

    Shapes and returns as `dpo_loss`; label_smoothing 0 is DPO.
    """
    chosen, rejected = _implicit_rewards(policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps, beta)
    losses = (1 - label_smoothing) * reward_model_loss(chosen, rejected) + label_smoothing * reward_model_loss(rejected, chosen)
    return losses, chosen.detach(), rejected.detach()


def ipo_loss(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    reference_chosen_logps: Tensor,
    reference_rejected_logps: Tensor,
    beta: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Identity preference optimization (Azar et al. 2023, arXiv:2310.12036, eq. 17): (h - 1 / (2 beta))^2, h the log-ratio difference.

    Shapes and returns as `dpo_loss`; beta is the paper's tau. Usually given averages, as in TRL.
    """
    chosen, rejected = _implicit_rewards(policy_chosen_logps, policy_rejected_logps, reference_chosen_logps, reference_rejected_logps, beta)
    losses = ((chosen - rejected) / beta - 1 / (2 * beta)) ** 2
    return losses, chosen.detach(), rejected.detach()


def sft_loss(policy_chosen_logps: Tensor) -> Tensor:
    """Negative log-likelihood of the chosen response (P,), the SFT term that `--sft_weight` adds (RLAIF-V's SFT_weight)."""
    return -policy_chosen_logps


def changed_segment_weights(chosen_ids: Tensor, rejected_ids: Tensor, weight: float) -> tuple[Tensor, Tensor]:
    """Token weights of dense DPO: `weight` in the segments where the two answers differ, 1 where they agree
    (Yu et al. 2023, "RLHF-V", arXiv:2312.00849, dense direct preference optimization; `weight` is its gamma, 5 there).

    chosen_ids (R_chosen,), rejected_ids (R_rejected,); returns float32 weights of the same shapes. Segments are difflib's over token ids:
    chosen [5 7 8 2] and rejected [5 9 2] at weight 3 give [1 3 3 1] and [1 3 1].
    """
    chosen, rejected = torch.full((len(chosen_ids),), float(weight)), torch.full((len(rejected_ids),), float(weight))
    matcher = SequenceMatcher(None, chosen_ids.tolist(), rejected_ids.tolist(), autojunk=False)
    for block in matcher.get_matching_blocks():
        chosen[block.a : block.a + block.size] = 1.0
        rejected[block.b : block.b + block.size] = 1.0
    return chosen, rejected


def bradley_terry_probability(r_w: Tensor, r_l: Tensor) -> Tensor:
    """P(winner beats loser) = exp(r_w) / (exp(r_w) + exp(r_l)) = sigmoid(r_w - r_l) (arXiv:2305.18290, eq. 1)."""
    return torch.sigmoid(r_w - r_l)


def reward_model_loss(r_w: Tensor, r_l: Tensor) -> Tensor:
    """Negative log-likelihood of a reward model, -log sigmoid(r_w - r_l) (arXiv:2305.18290, eq. 2)."""
    return -F.logsigmoid(r_w - r_l)


def dpo_gradient_weight(chosen_rewards: Tensor, rejected_rewards: Tensor) -> Tensor:
    """sigmoid(r_rejected - r_chosen): scales a pair's DPO gradient, larger the worse the pair is ordered (arXiv:2305.18290, section 4)."""
    return bradley_terry_probability(rejected_rewards, chosen_rewards)


def _implicit_rewards(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    reference_chosen_logps: Tensor,
    reference_rejected_logps: Tensor,
    beta: float,
    reference_free: bool = False,
) -> tuple[Tensor, Tensor]:
    if reference_free:
        return beta * policy_chosen_logps, beta * policy_rejected_logps
    return beta * (policy_chosen_logps - reference_chosen_logps), beta * (policy_rejected_logps - reference_rejected_logps)
