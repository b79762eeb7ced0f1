"""ExternalMemory: a key-value store larger than the bank, read and written by content, carried as state."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from nsm.errors import ConfigError
from nsm.modules.ops import join_heads, split_heads

Memory = tuple[Tensor, Tensor, Tensor, Tensor]
"""keys [B, M, k]; values [B, M, d]; filled [B, M], how much of a row was ever written; next [B] int64, the oldest."""

# Sharpness of the comparison of a new key with the rows'.
_SHARPNESS = 8.0


class ExternalMemory(nn.Module):
    """M rows of key and value that outlive the bank.

    Letters: B lanes, T tokens, M rows, d = `token_dim`, k = `key_dim`, H heads.

    *Read*: tokens attend to the rows by content, H heads over the parts of the keys and values. The score of a row is
    lowered by the logarithm of how much of it was ever written, so an empty one is nothing and not zeros.

    *Write*, once a chunk: the tokens of the chunk are pooled by a learned score into one key and one value. They go
    to the rows whose keys are like the new one, or to the oldest row, in turn; a learned gate says which, and another
    how strongly (Graves et al. 2014). Taking turns needs no comparison of usages, which could come out differently in
    another precision.

    Args:
        token_dim: d; `num_heads` must divide it.
        rows: M.
        key_dim: k; `num_heads` must divide it.
        num_heads: H.

    Raises:
        ConfigError: sizes that do not fit together.
    """

    def __init__(self, token_dim: int, rows: int, key_dim: int, num_heads: int = 4) -> None:
        super().__init__()
        if rows < 2 or num_heads < 1 or token_dim % num_heads or key_dim < 1 or key_dim % num_heads:
            raise ConfigError(
                "A memory needs at least 2 rows, and heads that divide token_dim and key_dim; given "
                f"rows={rows}, token_dim={token_dim}, key_dim={key_dim}, num_heads={num_heads}."
            )
        self.rows, self.key_dim, self.num_heads = rows, key_dim, num_heads
        self.query = nn.Linear(token_dim, key_dim, bias=False)
        self.key = nn.Linear(token_dim, key_dim, bias=False)
        self.value = nn.Linear(token_dim, token_dim, bias=False)
        self.pool = nn.Linear(token_dim, 3)
        self.out = nn.Linear(token_dim, token_dim, bias=False)
        nn.init.zeros_(self.out.weight)

    def read(self, tokens: Tensor, memory: Memory) -> Tensor:
        """What tokens [B, T, d] find, [B, T, d]; zero while nothing was written."""
        keys, values, filled, _ = memory
        query = split_heads(self.query(tokens), self.num_heads)
        scores = query @ split_heads(keys, self.num_heads).transpose(-1, -2) * query.shape[-1] ** -0.5
        scores = scores + torch.log(filled + 1e-6)[:, None, None, :]
        found: Tensor = self.out(join_heads(scores.softmax(-1) @ split_heads(values, self.num_heads)))
        return found

    def write(self, tokens: Tensor, counts: Tensor | None, memory: Memory) -> Memory:
        """The memory after a chunk of tokens [B, C, d]; `counts` [B, C] bool says which of them count."""
        keys, values, filled, oldest = memory
        score, strength, novelty = self.pool(tokens).unbind(-1)
        if counts is not None:
            score = torch.where(counts, score, -1.0e9)
        share = score.softmax(-1).unsqueeze(1)
        key, value = share @ self.key(tokens), share @ self.value(tokens)
        gate = torch.sigmoid((share @ strength.unsqueeze(-1)).squeeze(-1))
        fresh = torch.sigmoid((share @ novelty.unsqueeze(-1)).squeeze(-1))
        alike = _unit(keys) @ _unit(key).transpose(-1, -2)
        by_content = (_SHARPNESS * alike.squeeze(-1) + torch.log(filled + 1e-6)).softmax(-1)
        in_turn = (torch.arange(self.rows, device=tokens.device) == oldest.unsqueeze(-1)).to(keys.dtype)
        weight = gate * (fresh * in_turn + (1.0 - fresh) * by_content)
        column = weight.unsqueeze(-1)
        return (
            keys + column * (key - keys),
            values + column * (value - values),
            filled + weight * (1.0 - filled),
            torch.where(oldest == self.rows - 1, 0, oldest + 1),
        )


def _unit(x: Tensor) -> Tensor:
    return x * torch.rsqrt((x * x).sum(-1, keepdim=True) + 1e-6)
