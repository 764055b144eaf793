"""A policy and its reference as a reward model: beta * log(pi(answer) / pi_ref(answer)), DPO's implicit reward (arXiv:2305.18290, eq. 5).

    from muffin.reward import load_reward_model

    model = load_reward_model("my-lora")  # a LoRA adapter: its reference is its base; a whole model needs its reference named
    rewards = model.reward(image, "What is this?", ["A cat.", "A dog that sleeps."])
    best = max(rewards, key=lambda reward: reward.mean)
    for token, value in zip(model.tokens(best), best.per_token.tolist()):
        print(f"{token!r:<12} {value:+.3f}")
    print(f"sum {best.sum:+.3f}, per token {best.mean:+.3f}")

Any model of a supported family does (hub id or folder), and any PIL image. eval/best_of_n.py does the same for a file of candidates.
All answers to a prompt are scored in one shared-prefix row: the image and the question are computed once per model. Rewards compare
answers to one prompt; between prompts they differ by a constant that depends on the prompt. Only encoded tokens count: an answer that
does not fit into model_max_length is judged by its beginning.
"""

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from peft import PeftModel
from PIL import Image
from torch import Tensor, nn

from muffin.logps import ResponseLogps, response_logps
from muffin.packing import PackedBatch, pack
from muffin.policies import EncodedResponses, PolicyAdapter, PolicyOptions, load_adapter, load_policy, resolve_checkpoint
from muffin.provenance import Numerics, resolve_numerics


@dataclass(frozen=True)
class AnswerReward:
    """Reward of one answer of R tokens, terminator included. All tensors (R,), on the CPU.

    per_token: beta * (policy_logps - reference_logps); policy_logps, reference_logps: log-probs in nats; token_ids: what they are of.
    """

    per_token: Tensor
    policy_logps: Tensor
    reference_logps: Tensor
    token_ids: Tensor

    @property
    def sum(self) -> float:
        """Over all tokens, in beta * nats."""
        return float(self.per_token.double().sum())

    @property
    def mean(self) -> float:
        """sum / R, the length-normalised reward."""
        return self.sum / len(self.per_token)

    @property
    def policy_mean_logp(self) -> float:
        """Log-prob per token under the policy alone, in nats."""
        return float(self.policy_logps.double().mean())


@dataclass(frozen=True)
class RewardModel:
    """Policy and reference in eval mode on one device, with one encoding.

    reference_scope: context in which `reference` is the reference; a LoRA policy with its adapter switched off is its own.
    """

    policy: nn.Module
    reference: nn.Module
    adapter: PolicyAdapter
    numerics: Numerics
    beta: float = 0.1
    reference_scope: Callable[[], AbstractContextManager] = nullcontext

    def reward(self, image: Image.Image, question: str, answers: Sequence[str]) -> list[AnswerReward]:
        """Rewards of K answers to a question about an image, in their order.

        Raises ValueError for no answers, for a prompt that leaves no room for one, and for texts that hold control tokens.
        """
        if not answers:
            raise ValueError("reward needs at least one answer, got none")
        return self.score([self.adapter.encode(image.convert("RGB"), question, answers)])[0]

    def tokens(self, reward: AnswerReward) -> list[str]:
        """The text of every token that `reward.per_token` has a value for; the last is the terminator, unless the answer was cut."""
        return [self.adapter.tokenizer.decode(token) for token in reward.token_ids.tolist()]

    def score(self, encoded: Sequence[EncodedResponses]) -> list[list[AnswerReward]]:
        """Rewards of the responses of several prompts, one forward per model. Raises ValueError for log-probs that are not finite."""
        device = next(self.policy.parameters()).device
        batch = pack(encoded, self.adapter).to(device)
        with torch.no_grad(), self.numerics.autocast(device.type):
            policy = self._token_logps(self.policy, batch)
            with self.reference_scope():
                reference = self._token_logps(self.reference, batch)
        responses = [(number, ids) for number, item in enumerate(encoded) for ids in item.response_ids]
        rewards: list[list[AnswerReward]] = [[] for _ in encoded]
        for (number, ids), policy_logps, reference_logps in zip(responses, policy, reference, strict=True):
            per_token = self.beta * (policy_logps - reference_logps)
            if not per_token.isfinite().all():
                raise ValueError("log-probs of policy or reference are not finite; check the weights, or score with --dtype float32")
            rewards[number].append(AnswerReward(per_token, policy_logps, reference_logps, ids))
        return rewards

    @staticmethod
    def _token_logps(model: nn.Module, batch: PackedBatch) -> list[Tensor]:
        logps = response_logps(model, batch)
        return ResponseLogps(logps.token_logps.cpu(), logps.lengths.cpu()).split()


def load_reward_model(
    policy: str | Path,
    reference: str | Path | None = None,
    *,
    beta: float = 0.1,
    dtype: Literal["auto", "bfloat16", "float32"] = "auto",
    options: PolicyOptions | None = None,
    device: torch.device | str = "cpu",
) -> RewardModel:
    """Load a trained policy and what it was trained from.

    policy, reference: folders or hub ids of models, or folders of LoRA adapters. Without `reference` the policy must be a LoRA adapter;
        its base is loaded once and serves as both, with weights as in training (a merged bfloat16 adapter would lose most of itself).
    options: how both see a prompt; default: as the policy was saved.
    Raises ValueError when there is no reference, or when it reads texts differently.
    """
    device = torch.device(device)
    checkpoint = resolve_checkpoint(policy)
    adapter = load_adapter(checkpoint, options or PolicyOptions())
    numerics = resolve_numerics(dtype=dtype, bits=None, lora_enable=True, device_type=device.type)  # no float32 master weights
    if reference is None and checkpoint.lora is None:
        raise ValueError(
            f"{policy} is a whole model and does not tell what it was trained from; "
            "give its reference (--reference_name_or_path), the model before that training"
        )
    if checkpoint.lora is None:
        model = load_policy(checkpoint, adapter, dtype=numerics.load_dtype)
    else:
        base = adapter.load_model(checkpoint.base, dtype=numerics.load_dtype)
        model = PeftModel.from_pretrained(base, checkpoint.lora)
    model = model.requires_grad_(False).to(device).eval()
    if reference is None:
        return RewardModel(model, model, adapter, numerics, beta, model.disable_adapter)
    other = resolve_checkpoint(reference)
    _refuse_other_texts(adapter, load_adapter(other, options or PolicyOptions()), str(reference))
    before = load_policy(other, adapter, dtype=numerics.load_dtype).requires_grad_(False).to(device).eval()
    return RewardModel(model, before, adapter, numerics, beta)


def _refuse_other_texts(adapter: PolicyAdapter, other: PolicyAdapter, reference: str) -> None:
    """Both models get the policy's token ids, so the reference must give them the same meaning."""
    if type(adapter) is not type(other) or adapter.tokenizer.get_vocab() != other.tokenizer.get_vocab():
        raise ValueError(
            f"the reference {reference} is of another family or has another tokenizer than the policy; "
            "give the model that the policy was trained from"
        )


def selection_weights(scores: Sequence[float], n: int) -> list[float]:
    """How often each of K candidates is the best of n drawn without replacement: weights that sum to 1, exact, nothing is sampled.

    The candidate of rank i (0 is best) is the best of C(K - 1 - i, n - 1) of the C(K, n) draws. Equal scores share their weight, so
    constant scores give the random baseline: selection_weights([3, 1, 2], 2) = [2/3, 0, 1/3].
    """
    if not 1 <= n <= len(scores):
        raise ValueError(f"best of {n} needs at least {n} candidates and n of at least 1, got {len(scores)} candidates")
    order = sorted(range(len(scores)), key=lambda k: -scores[k])
    draws = math.comb(len(scores), n)
    weights = [0.0] * len(scores)
    start = 0
    while start < len(order):
        stop = start
        while stop < len(order) and scores[order[stop]] == scores[order[start]]:
            stop += 1
        share = sum(math.comb(len(scores) - 1 - rank, n - 1) for rank in range(start, stop)) / draws / (stop - start)
        for k in order[start:stop]:
            weights[k] = share
        start = stop
    return weights
