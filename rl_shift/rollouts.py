"""What learning from rollouts needs: generalised advantages, and minibatches of equal size."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor


def advantages(delta: Tensor, ended: Tensor, decay: float) -> Tensor:
    """Generalised advantages A_t = delta_t + decay (1 - ended_t) A_{t+1} along the last axis.

    Solved by doubling: after round k every element holds its next 2^k terms, so T steps need
    log2(T) rounds of whole tensors instead of T small ones.

    Args:
        delta: (N, T) one-step errors r + gamma V(s') - V(s).
        ended: (N, T) bool, rows after which nothing follows.
        decay: gamma lambda.
    """
    total, reach = delta.clone(), decay * (~ended).to(delta.dtype)
    step, length = 1, delta.shape[-1]
    while step < length:
        total[..., :-step] += reach[..., :-step] * total[..., step:].clone()
        reach[..., :-step] *= reach[..., step:].clone()
        step *= 2
    return total


def minibatches(rows: dict[str, Tensor], size: int) -> Iterator[dict[str, Tensor]]:
    """Rows in random order, in pieces of equal size; a rest smaller than a piece is left out.

    A short piece would be another shape: one more graph to compile, and none to replay on a GPU.

    Args:
        rows: tensors of B rows each.
        size: rows of a piece; all of them if there are fewer.
    """
    first = next(iter(rows.values()))
    count, size = len(first), min(size, len(first))
    order = torch.randperm(count, device=first.device)
    shuffled = {k: v[order] for k, v in rows.items()}
    for start in range(0, count - size + 1, size):
        yield {k: v[start : start + size] for k, v in shuffled.items()}
