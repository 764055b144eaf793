"""Muon for hidden matrices and AdamW for the rest, as one optimizer: what a policy trained from scratch learns fastest with."""

from collections.abc import Iterable

import torch
from torch import nn


class MuonAdamW(torch.optim.Optimizer):
    """torch.optim.Muon on 2-D weights of hidden layers (Jordan et al. 2024, "Muon: an optimizer for hidden layers"), AdamW on the others.

    Two parameter groups, in this order, each with its own learning rate; state and schedule live here, as Trainer and checkpoints expect.
    Muon's updates are scaled to AdamW's root mean square ("match_rms_adamw"), so usual rates are near each other (here 4e-3 and 3e-3).
    """

    def __init__(
        self,
        matrices: Iterable[nn.Parameter],
        others: Iterable[nn.Parameter],
        *,
        muon_learning_rate: float,
        learning_rate: float,
        betas: tuple[float, float] = (0.9, 0.98),
        weight_decay: float = 0.0,
    ) -> None:
        groups = [{"params": list(matrices), "lr": muon_learning_rate}, {"params": list(others), "lr": learning_rate}]
        super().__init__(groups, {"weight_decay": weight_decay})
        self._muon = torch.optim.Muon(
            self.param_groups[0]["params"], lr=muon_learning_rate, momentum=0.95, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw"
        )
        self._adamw = torch.optim.AdamW(self.param_groups[1]["params"], lr=learning_rate, betas=betas, weight_decay=weight_decay)
        for group, inner in zip(self.param_groups, (self._muon, self._adamw), strict=True):
            group.update({name: value for name, value in inner.param_groups[0].items() if name != "params"})
        self._share()

    def _share(self) -> None:
        """Let the inner optimizers work on this one's groups and state."""
        for group, inner in zip(self.param_groups, (self._muon, self._adamw), strict=True):
            inner.param_groups = [group]
            inner.state = self.state

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)  # load_state_dict puts new groups and state in place
        if "_muon" in vars(self):
            self._share()

    def step(self, closure=None):
        loss = None if closure is None else closure()
        self._muon.step()
        self._adamw.step()
        return loss


def hidden_matrices(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Trainable parameters of `model`, split into (2-D weights inside the network, everything else).

    Embeddings and the output head are not hidden layers: their rows are looked up, not multiplied through.
    """
    lookups = [module for module in model.modules() if isinstance(module, nn.Embedding)] + [model.get_output_embeddings()]
    outside = {id(parameter) for module in lookups for parameter in module.parameters()}
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    matrices = [parameter for parameter in trainable if parameter.dim() == 2 and id(parameter) not in outside]
    inside = {id(parameter) for parameter in matrices}
    return matrices, [parameter for parameter in trainable if id(parameter) not in inside]
