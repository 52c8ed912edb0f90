# Copyright 2026 The diffusers-diffdoctor authors. Licensed under the Apache License, Version 2.0.
"""Muon for the small transformers of the miniature, in float32: PyTorch's own runs in bfloat16, which is slow on CPUs."""

import torch
from torch import nn


NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # steep at zero; singular values end within about 0.7 and 1.2


def orthogonalize(matrix: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """The nearest matrix with equal singular values, roughly: a quintic Newton-Schulz iteration on `matrix` (M, N)."""
    a, b, c = NEWTON_SCHULZ
    wide = matrix.shape[0] <= matrix.shape[1]
    x = matrix if wide else matrix.T
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(steps):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x if wide else x.T


class Muon(torch.optim.Optimizer):
    """Muon for the matrices inside a network, AdamW for its other parameters.

    Matrices move by their orthogonalized momentum, scaled to AdamW's root mean square (arXiv 2502.16982), so that one
    learning rate and one weight decay serve both.

    Args:
        module: its two-dimensional weights with at least 16 rows and columns, embeddings aside, are the matrices.
        lr: learning rate of all parameters.
        weight_decay: decoupled, of all parameters.
        momentum: Nesterov momentum of the matrices.
        betas: AdamW's.
    """

    def __init__(
        self,
        module: nn.Module,
        lr: float,
        weight_decay: float = 0.01,
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.99),
    ):
        embeddings = {id(m.weight) for m in module.modules() if isinstance(m, nn.Embedding)}
        parameters = [p for p in module.parameters() if p.requires_grad]
        matrices = [p for p in parameters if p.ndim == 2 and min(p.shape) >= 16 and id(p) not in embeddings]
        chosen = {id(p) for p in matrices}
        others = [p for p in parameters if id(p) not in chosen]
        groups = [{"params": matrices, "muon": True}, {"params": others, "muon": False}]
        defaults = {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "betas": betas}
        super().__init__([group for group in groups if group["params"]], defaults)

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            update = self._muon if group["muon"] else self._adam
            for p in group["params"]:
                if p.grad is not None:
                    p.mul_(1 - group["lr"] * group["weight_decay"])
                    p.sub_(update(p.grad, self.state[p], group), alpha=group["lr"])

    def _muon(self, grad, state, group):
        if not state:
            state["momentum"] = torch.zeros_like(grad)
        average = state["momentum"]
        average.lerp_(grad, 1 - group["momentum"])
        return orthogonalize(grad.lerp(average, group["momentum"])) * (0.2 * max(grad.shape) ** 0.5)

    def _adam(self, grad, state, group):
        if not state:
            state.update(step=0, first=torch.zeros_like(grad), second=torch.zeros_like(grad))
        state["step"] += 1
        beta1, beta2 = group["betas"]
        state["first"].lerp_(grad, 1 - beta1)
        state["second"].lerp_(grad * grad, 1 - beta2)
        corrected = (state["second"] / (1 - beta2 ** state["step"])).sqrt_().add_(1e-8)
        return state["first"] / (1 - beta1 ** state["step"]) / corrected
