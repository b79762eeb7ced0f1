"""Sparse alternatives to softmax over the last axis, with static shapes and standard ONNX operators.

`sparsemax` and `entmax15` are continuous: a small change of the scores changes the weights little, so rounding is
harmless. `top_k` is not continuous: when two scores change places, a weight jumps from one slot to another, and two
precisions of one model diverge.
"""

from __future__ import annotations

import torch
from torch import Tensor


def sparsemax(scores: Tensor) -> Tensor:
    """Euclidean projection of the scores onto the simplex (Martins and Astudillo 2016)."""
    # A score more than 1 below the highest gets weight 0; the clamp keeps masked scores out of the sums.
    scores = torch.clamp(scores - scores.amax(-1, keepdim=True), min=-2.0)
    ordered = _descending(scores)
    rank = _ranks(scores)
    total = torch.cumsum(ordered, -1)
    support = (1.0 + rank * ordered > total).to(scores.dtype)
    count = support.sum(-1, keepdim=True)
    threshold = ((ordered * support).sum(-1, keepdim=True) - 1.0) / count
    return torch.clamp(scores - threshold, min=0.0)


def entmax15(scores: Tensor) -> Tensor:
    """Entmax with alpha 1.5, between softmax and sparsemax (Peters, Niculae and Martins 2019): (z / 2 - tau)^2."""
    halved = torch.clamp(0.5 * (scores - scores.amax(-1, keepdim=True)), min=-2.0)
    ordered = _descending(halved)
    rank = _ranks(scores)
    mean = torch.cumsum(ordered, -1) / rank
    spread = torch.cumsum(ordered * ordered, -1) - rank * mean * mean
    # Where no tau exists, any value works; the clamp avoids the square root of 0, which has no gradient.
    tau = mean - torch.sqrt(torch.clamp((1.0 - spread) / rank, min=1e-12))
    count = (tau <= ordered).to(torch.int64).sum(-1, keepdim=True)
    chosen = torch.where(rank.to(torch.int64) == count, tau, 0.0).sum(-1, keepdim=True)
    return torch.square(torch.clamp(halved - chosen, min=0.0))


def top_k(scores: Tensor, count: int) -> Tensor:
    """A mask of the `count` highest scores; scores that equal the lowest of these are included."""
    border = torch.topk(scores, count, -1).values[..., -1:]
    return scores >= border


def _descending(scores: Tensor) -> Tensor:
    return torch.topk(scores, scores.shape[-1], -1).values


def _ranks(scores: Tensor) -> Tensor:
    return torch.arange(1, scores.shape[-1] + 1, device=scores.device).to(scores.dtype)
