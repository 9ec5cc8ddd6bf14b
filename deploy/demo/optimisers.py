"""Two optimisers share the parameters: Muon takes the matrices inside the layers, AdamW everything else.

Muon (Jordan et al. 2024) replaces a matrix's averaged gradient by the nearest matrix whose singular
values are all about one, so that every direction learns at the same pace. At these sizes it needs
markedly fewer tokens than AdamW for the same loss; the products that it costs are small beside the
forward and backward of a few thousand tokens.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from model import Model

WEIGHT_DECAY = 0.1
MOMENTUM = 0.95
# A quintic whose iteration pulls singular values from (0, 1] to about one within five steps.
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
ITERATIONS = 5
UPDATE_SIZE = 0.2  # root mean square of an update per learning rate: AdamW's own, so both take the same rate


@torch.no_grad()
def orthogonalise(matrices: Tensor, dtype: torch.dtype) -> Tensor:
    """Every matrix of `[n, rows, cols]` with its singular values moved near one; products run in `dtype`."""
    a, b, c = COEFFICIENTS
    is_tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.transpose(1, 2) if is_tall else matrices
    x = (x / (x.norm(dim=(1, 2), keepdim=True) + 1e-20)).to(dtype)
    for _ in range(ITERATIONS):
        square = torch.bmm(x, x.transpose(1, 2))
        polynomial = torch.baddbmm(square, square, square, beta=b, alpha=c)
        x = torch.baddbmm(x, polynomial, x, beta=a)
    return (x.transpose(1, 2) if is_tall else x).float()


class Muon(torch.optim.Optimizer):
    """Muon for parameters that are matrices `[rows, cols]` or stacks of them `[n, rows, cols]`.

    splits: parameter -> how many matrices stand above each other in its rows (gate over up, say).
    """

    def __init__(
        self, parameters: Iterable[nn.Parameter], splits: dict[nn.Parameter, int], dtype: torch.dtype
    ) -> None:
        super().__init__(parameters, {"lr": 0.0})
        self._splits = splits
        self._dtype = dtype

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        for group in self.param_groups:
            rate = group["lr"]
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if "momentum" not in state:
                    state["momentum"] = torch.zeros_like(parameter)
                momentum = state["momentum"].lerp_(parameter.grad, 1 - MOMENTUM)
                direction = parameter.grad.lerp(momentum, MOMENTUM)
                rows, cols = parameter.shape[-2] // self._splits.get(parameter, 1), parameter.shape[-1]
                update = orthogonalise(direction.view(-1, rows, cols), self._dtype).view_as(parameter)
                parameter.mul_(1 - rate * WEIGHT_DECAY)
                parameter.add_(update, alpha=-rate * UPDATE_SIZE * max(rows, cols) ** 0.5)


def optimisers_for(model: Model, dtype: torch.dtype) -> list[torch.optim.Optimizer]:
    """Muon and AdamW over all parameters of the training model.

    AdamW gets vectors, token embeddings, the head, the router and the small mixes of hyper-connections,
    whose rows mean something each by itself.
    """
    matrices: list[nn.Parameter] = []
    head: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    splits: dict[nn.Parameter, int] = {}
    for name, parameter in model.named_parameters():
        if name.startswith("head"):
            head.append(parameter)
        elif parameter.dim() < 2 or name.startswith("embed") or min(parameter.shape[-2:]) < 32:
            others.append(parameter)
        else:
            matrices.append(parameter)
            if name.endswith("experts_w13"):
                splits[parameter] = 2
            elif name.endswith("engram.wkv.weight"):
                splits[parameter] = model.config.hc_mult + 1  # a key for each stream, and the value
    groups = [{"params": head, "weight_decay": WEIGHT_DECAY}, {"params": others, "weight_decay": 0.0}]
    adam = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95), eps=1e-10, fused=True)
    return [Muon(matrices, splits, dtype), adam]
