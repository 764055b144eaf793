"""Log-probabilities of responses: the plain form (`get_batch_logps`) and the form every recipe uses (`response_logps`).

All values are natural logarithms (nats). A response's tokens are its answer's tokens and its terminator, nothing of the prompt.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from muffin.attention import inside_packed_attention, packed_attention
from muffin.packing import PackedBatch

# Rows of logits that are turned into float32 at a time: bounds the working copy at chunk x V.
LOGIT_ROWS_PER_CHUNK = 64


def get_batch_logps(
    logits: Tensor, labels: Tensor, return_per_token_logp: bool = False, return_all: bool = False
) -> Tensor | tuple[Tensor, ...]:
    """Log-probs of labelled tokens from full logits: the plain form and the oracle of the fast one.

    logits: (S, T, V); labels: (S, T), -100 where a token does not count. Labels are shifted once here: logits at t predict labels at t + 1.
    Returns (sums (S,), averages (S,)); with return_per_token_logp the (S, T - 1) per-token log-probs, 0 where not labelled; with return_all
    (per_token, sums, averages). Raises ValueError when shapes differ or a row has no labelled token.
    """
    if logits.shape[:-1] != labels.shape:
        raise ValueError(f"logits {tuple(logits.shape)} and labels {tuple(labels.shape)} differ in batch or length")
    targets = labels[:, 1:]
    mask = targets != -100
    if not mask.any(dim=1).all():
        raise ValueError(f"rows {(~mask.any(dim=1)).nonzero().flatten().tolist()} have no labelled token after the first")
    log_probs = _upcast(logits[:, :-1]).log_softmax(dim=-1)
    per_token = log_probs.gather(2, targets.masked_fill(~mask, 0)[..., None])[..., 0] * mask
    if return_per_token_logp:
        return per_token
    sums = per_token.sum(dim=1)
    averages = sums / mask.sum(dim=1)
    return (per_token, sums, averages) if return_all else (sums, averages)


@dataclass(frozen=True)
class ResponseLogps:
    """Log-probs of S responses in nats.

    token_logps: (sum of lengths,) response after response; lengths: (S,) tokens per response, terminator included.
    """

    token_logps: Tensor
    lengths: Tensor

    def split(self) -> list[Tensor]:
        """Per-token log-probs of each response: S tensors (R_s,)."""
        return list(self.token_logps.split(self.lengths.tolist()))

    @property
    def sums(self) -> Tensor:
        """(S,) log pi(response | image, prompt). Summed over a padded table, so that the order of addition never varies."""
        return self._table().sum(dim=1)

    @property
    def averages(self) -> Tensor:
        """(S,) sums divided by the number of tokens."""
        return self.sums / self.lengths

    def weighted_sums(self, token_weights: Tensor) -> Tensor:
        """(S,) sums of token_logps * token_weights (sum of lengths,)."""
        return ResponseLogps(self.token_logps * token_weights, self.lengths).sums

    def _table(self) -> Tensor:
        return torch.nn.utils.rnn.pad_sequence(self.split(), batch_first=True)


def response_logps(model: nn.Module, batch: PackedBatch) -> ResponseLogps:
    """Log-probs of every response in a batch, through the model's public forward (wrappers' and adapters' hooks fire).

    Vision is encoded once per distinct image, the prompt once per prompt, `lm_head` only at rows that predict a response token.
    Float32 out, or float64 for a float64 model. Differentiable. With gradient checkpointing call it, and backward, inside
    `packed_attention(model)`. Raises ValueError otherwise, because recomputation would silently use another attention.
    """
    inputs = {
        "input_ids": batch.input_ids,
        "position_ids": batch.position_ids,
        "attention_mask": batch.attention_mask,
        "logits_to_keep": batch.logit_rows,
        "use_cache": False,
        **batch.vision,
    }
    if batch.layout is None:
        logits = model(**inputs).logits
    else:
        if torch.is_grad_enabled() and not inside_packed_attention(model) and _checkpoints_gradients(model):
            raise ValueError(
                "gradient checkpointing recomputes attention; run response_logps and backward in `with packed_attention(model):`"
            )
        with packed_attention(model) as calls:
            before = calls.count
            logits = model(**inputs, packed_layout=batch.layout).logits
        if calls.count == before:
            raise RuntimeError(
                f"{type(model).__name__} never called packed attention: its decoder does not use transformers' AttentionInterface"
            )
    prediction_logps = _SelectedLogps.apply(logits.reshape(-1, logits.shape[-1]), batch.prediction_rows, batch.prediction_targets)
    return ResponseLogps(prediction_logps[batch.token_predictions], batch.lengths)


def _checkpoints_gradients(model: nn.Module) -> bool:
    return model.training and any(vars(module).get("gradient_checkpointing", False) for module in model.modules())


def _upcast(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()


class _SelectedLogps(torch.autograd.Function):
    """log softmax(logits[row])[target] for M (row, target) predictions over N logit rows.

    Works in float32 chunks of rows; what backward keeps is the logits as the model made them (no float32 copy) and one number per row.
    """

    @staticmethod
    def forward(ctx, logits: Tensor, rows: Tensor, targets: Tensor) -> Tensor:
        # logits (N, V), rows (M,), targets (M,) -> (M,)
        normalizers = torch.cat([_upcast(chunk).logsumexp(dim=-1) for chunk in logits.split(LOGIT_ROWS_PER_CHUNK)])
        ctx.save_for_backward(logits, rows, targets, normalizers)
        return _upcast(logits[rows, targets]) - normalizers[rows]

    @staticmethod
    def backward(ctx, grad: Tensor):
        logits, rows, targets, normalizers = ctx.saved_tensors
        grad_logits = torch.empty_like(logits)
        row_grads = normalizers.new_zeros(len(logits)).index_add_(0, rows, grad)
        for start in range(0, len(logits), LOGIT_ROWS_PER_CHUNK):
            chunk = slice(start, start + LOGIT_ROWS_PER_CHUNK)
            probabilities = (_upcast(logits[chunk]) - normalizers[chunk, None]).exp_()
            inside = (rows >= start) & (rows < start + LOGIT_ROWS_PER_CHUNK)
            gradient = probabilities.mul_(-row_grads[chunk, None])
            gradient.index_put_((rows[inside] - start, targets[inside]), grad[inside], accumulate=True)
            grad_logits[chunk] = gradient
        return grad_logits, None, None
