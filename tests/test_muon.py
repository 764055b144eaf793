"""MuonAdamW against torch's two optimizers run apart, with schedule, checkpoint and resume."""

import torch
from torch import nn

from muffin.muon import MuonAdamW, hidden_matrices
from tests.tiny_decoders import decoder


def network() -> tuple[nn.Linear, nn.Linear]:
    torch.manual_seed(0)
    return nn.Linear(4, 3), nn.Linear(3, 2)


def gradients(step: int, parameters: list[nn.Parameter]) -> None:
    generator = torch.Generator().manual_seed(step)
    for parameter in parameters:
        parameter.grad = torch.randn(parameter.shape, generator=generator)


def test_equals_muon_and_adamw_apart_through_schedule_and_resume():
    layers, twins = network(), network()
    split = [([a.weight, b.weight], [a.bias, b.bias]) for a, b in (layers, twins)]
    (matrices, others), (twin_matrices, twin_others) = split

    def build() -> tuple[MuonAdamW, torch.optim.lr_scheduler.LambdaLR]:
        optimizer = MuonAdamW(matrices, others, muon_learning_rate=0.04, learning_rate=0.03)
        return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (step + 1))

    optimizer, schedule = build()
    muon = torch.optim.Muon(twin_matrices, lr=0.04, momentum=0.95, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW(twin_others, lr=0.03, betas=(0.9, 0.98), weight_decay=0.0)
    start = [parameter.clone() for parameter in (*matrices, *others)]
    for step in range(4):
        if step == 2:  # a checkpoint, and a fresh optimizer that goes on from it
            saved = optimizer.state_dict(), schedule.state_dict()
            optimizer, schedule = build()
            optimizer.load_state_dict(saved[0])
            schedule.load_state_dict(saved[1])
        gradients(step, [*matrices, *others])
        gradients(step, [*twin_matrices, *twin_others])
        muon.param_groups[0]["lr"], adamw.param_groups[0]["lr"] = 0.04 / (step + 1), 0.03 / (step + 1)
        optimizer.step()
        schedule.step()
        muon.step()
        adamw.step()
    for parameter, twin, before in zip((*matrices, *others), (*twin_matrices, *twin_others), start, strict=True):
        assert torch.equal(parameter, twin)
        assert not torch.equal(parameter, before)


def test_hidden_matrices_leaves_embeddings_and_head_out():
    model = decoder()
    model.model.vision_tower.requires_grad_(False)
    matrices, others = hidden_matrices(model)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    named = {names[id(parameter)] for parameter in matrices}
    assert len(named) == 2 * 7 + 2  # q k v o gate up down in each of two layers, and the projector's two
    assert not any("embed" in name or "lm_head" in name or "vision_tower" in name for name in named)
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert named | {names[id(parameter)] for parameter in others} == trainable
