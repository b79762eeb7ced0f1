"""A model that the compiler of OpenVINO crashes on (2025.2 to 2026.4): three residual attentions, several queries."""

from __future__ import annotations

import torch
from torch import Tensor, nn

LAYERS, WINDOW, WIDTH, FRAMES = 3, 12, 16, 4


class Attentions(nn.Module):
    """Residual single-head attentions of rank 3 over a window of frames, several queries a call."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.projections = nn.ModuleList(nn.Linear(WIDTH, 3 * WIDTH) for _ in range(LAYERS))

    def forward(self, x: Tensor, *windows: Tensor) -> tuple[Tensor, ...]:
        kept = []
        for projection, window in zip(self.projections, windows, strict=True):
            seen = torch.cat([window, x], 1)
            q, k, v = projection(seen).chunk(3, -1)
            x = x + (q[:, WINDOW:] @ k.transpose(1, 2) / 4).softmax(-1) @ v
            kept.append(seen[:, -WINDOW:])
        return (x, *kept)


def frames(lanes: int, steps: int) -> Tensor:
    """Inputs of a stream, [lanes, steps, frames of a call, width]."""
    return torch.randn(lanes, steps, FRAMES, WIDTH, generator=torch.Generator().manual_seed(1))
