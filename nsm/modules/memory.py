"""ExternalMemory: a key-value store larger than the bank, read and written by content, carried as state."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from nsm.errors import ConfigError
from nsm.modules.ops import join_heads, split_heads


class Memory(NamedTuple):
    """key [B, M, k]; value [B, M, d]; filled [B, M], the written share of each row; next [B] int64, the oldest row."""

    key: Tensor
    value: Tensor
    filled: Tensor
    next: Tensor


# Scale of the cosine similarity between a new key and the keys of the rows.
_SHARPNESS = 8.0


class ExternalMemory(nn.Module):
    """M rows of key and value that outlive the bank.

    Letters: B lanes, T tokens, M rows, d = `token_dim`, k = `key_dim`, H heads.

    *Read*, equation (4) of the reference: tokens attend to the rows by content, with H heads. The logarithm of the
    written share is added to the score of a row, so that an empty row has no weight.

    *Write*, equation (15), once per chunk: a learned score pools the tokens of the chunk into one key and one value.
    They are written to the rows with similar keys, or to the oldest row; one learned gate chooses between the two,
    another sets the strength (Graves et al. 2014). The oldest row is found by a counter: a comparison of usages could
    differ between precisions.

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
        """Attend from tokens [B, T, d] to the rows: [B, T, d], zero for an empty memory."""
        keys, values, filled, _ = memory
        query = split_heads(self.query(tokens), self.num_heads)
        scores = query @ split_heads(keys, self.num_heads).transpose(-1, -2) * query.shape[-1] ** -0.5
        scores = scores + torch.log(filled + 1e-6)[:, None, None, :]
        found: Tensor = self.out(join_heads(scores.softmax(-1) @ split_heads(values, self.num_heads)))
        return found

    def write(self, tokens: Tensor, counts: Tensor | None, memory: Memory) -> Memory:
        """The memory after a chunk of tokens [B, C, d], of which `counts` [B, C] bool marks the valid ones."""
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
        return Memory(
            keys + column * (key - keys),
            values + column * (value - values),
            filled + weight * (1.0 - filled),
            torch.where(oldest == self.rows - 1, 0, oldest + 1),
        )


def _unit(x: Tensor) -> Tensor:
    return x * torch.rsqrt((x * x).sum(-1, keepdim=True) + 1e-6)
