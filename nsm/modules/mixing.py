"""LocalMixing: a short causal depthwise convolution, the first operation of a layer."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional


class LocalMixing(nn.Module):
    """SiLU of a depthwise causal convolution over the tokens; the state is its tail, the last `width` - 1 inputs.

    Equation (1) of the reference. A token sees its immediate predecessors before it is read and written. Recall
    needs this: it binds a key to the value that follows the key.
    """

    def __init__(self, dim: int, width: int = 4) -> None:
        super().__init__()
        self.width = width
        kernel = torch.zeros(dim, 1, width)
        kernel[:, 0, -1] = 1.0
        kernel[:, 0, -2] = 0.5
        self.kernel = nn.Parameter(kernel)
        self.bias = nn.Parameter(torch.zeros(dim))

    def forward(self, tokens: Tensor, tail: Tensor, valid: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Mix a run of tokens.

        Args:
            tokens: [B, T, d].
            tail: [B, width - 1, d], the inputs just before; zeros at the start of a stream.
            valid: [B], how many of the tokens count (default: all).

        Returns:
            mixed [B, T, d], and the tail after the valid tokens.
        """
        joined = torch.cat([tail, tokens], 1)
        # backend: ONNX Runtime has a fast depthwise kernel for two dimensions only, so the height is one.
        rows = joined.transpose(1, 2).unsqueeze(2)
        mixed = functional.conv2d(rows, self.kernel.unsqueeze(2), self.bias, groups=tokens.shape[-1])
        mixed = functional.silu(mixed.squeeze(2).transpose(1, 2))
        if valid is None:
            return mixed, joined[:, tokens.shape[1] :]
        places = valid[:, None] + torch.arange(self.width - 1, device=tokens.device)
        return mixed, torch.gather(joined, 1, places.unsqueeze(-1).expand(-1, -1, tokens.shape[-1]))
