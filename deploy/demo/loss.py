"""Cross entropy through the vocabulary head, a few hundred tokens at a time.

All logits of a step would be the largest tensor of all; in blocks they stay in the cache, and the
gradient of a block is known as soon as its loss is.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from advice import Advice

BLOCK = 256


class HeadLoss(torch.autograd.Function):
    """Mean cross entropy of softmax(states head^T) with the target; states `[N, hidden]`, targets `[N]`.

    With advice the target is not the token alone, but shares its weight with what the advisors expect.
    """

    @staticmethod
    def forward(
        ctx: Any, states: Tensor, head: Tensor, target: Tensor, advice: Advice | None, dtype: torch.dtype
    ) -> Tensor:
        total = torch.zeros(())
        low_head, low_states = head.to(dtype), states.to(dtype)
        grad_states = torch.empty_like(states)
        grad_head = torch.zeros_like(head)
        for start in range(0, len(states), BLOCK):
            block = slice(start, start + BLOCK)
            logits = (low_states[block] @ low_head.t()).float()
            wanted = target[block].unsqueeze(1)
            largest = logits.amax(1, keepdim=True)
            chosen = logits.gather(1, wanted)
            own = torch.ones_like(chosen)  # the token's share of the target
            if advice is not None:
                share, expected = advice.of(block)
                own, expected = own - share, expected.mul_(share)
                chosen = own * chosen + (logits * expected).sum(1, keepdim=True)
            probabilities = logits.sub_(largest).exp_()
            norm = probabilities.sum(1, keepdim=True)
            total += (norm.log() + largest - chosen).sum()
            grad = probabilities.div_(norm)
            grad.scatter_add_(1, wanted, -own)
            if advice is not None:
                grad -= expected
            low_grad = grad.to(dtype)
            grad_states[block] = (low_grad @ low_head).float()
            grad_head += (low_grad.t() @ low_states[block]).float()
        ctx.save_for_backward(grad_states.div_(len(states)), grad_head.div_(len(states)))
        return total / len(states)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad_states, grad_head = ctx.saved_tensors
        return grad_states * grad, grad_head * grad, None, None, None
