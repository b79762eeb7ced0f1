"""TokenToStateRouter: which slots a token writes to, how strongly, and the exact write of a whole chunk."""

from __future__ import annotations

from math import gcd

import torch
from torch import Tensor, nn

from nsm.errors import ConfigError

# Full strength would make log(1 - w) infinite; 2^-10 is exact in fp16 and bf16 as well.
MAX_WRITE = 1.0 - 2.0**-10
# A score that softmax turns into an exact 0. It replaces scores and is never added to one.
MASKED_SCORE = -1.0e9


class TokenToStateRouter(nn.Module):
    """Routes tokens to slots and writes them.

    Letters: B lanes, T tokens, S slots, D = `state_dim`, d = `token_dim`, R routing heads.

    For every token and routing head the scores over the *active* slots go through a softmax, so slots compete
    for the token, and a token gate g in [0, 1 - 2^-10] says how strongly the token is written at all. With the
    write weight w = g * softmax the slot becomes `(1 - w) * slot + w * value`, token after token: a leaky linear
    recurrence, non-expansive, so an error decays as fast as its slot is written. `write` evaluates all tokens of
    a chunk at once, exactly, with suffix products in log space.

    Several routing heads share out the numbers of a slot: head r writes the r-th part of the address half and
    the r-th part of the content half. The number of heads used is the largest divisor of `num_heads` for which
    both halves split evenly.

    The token gate follows the write gates of bounded-memory attention (Peng et al. 2022, "ABC") and gated slot
    attention (Zhang et al. 2024); competition over slots follows slot attention (Locatello et al. 2020).
    """

    def __init__(self, token_dim: int, state_dim: int, num_states: int, num_heads: int = 4) -> None:
        super().__init__()
        if min(token_dim, num_states, num_heads) < 1 or state_dim < 2:
            raise ConfigError(
                "A router needs token_dim, num_states, num_heads >= 1 and state_dim >= 2; given "
                f"token_dim={token_dim}, state_dim={state_dim}, num_states={num_states}, num_heads={num_heads}."
            )
        self.state_dim = state_dim
        self.num_states = num_states
        self.num_heads = gcd(num_heads, state_dim // 2) if state_dim % 2 == 0 else 1
        self.score = nn.Linear(token_dim, self.num_heads * num_states, bias=False)
        self.gate = nn.Linear(token_dim, self.num_heads)
        self.value = nn.Linear(token_dim, state_dim, bias=False)
        # Slots must differ from the first update on, or every token is smeared over all of them and recall is
        # learned late or never: torch's own initial weights are a quarter of these.
        nn.init.normal_(self.score.weight, std=2.0 * token_dim**-0.5)

    def route(self, tokens: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Routing of each token, from the tokens and the mask alone.

        Args:
            tokens: [B, T, d].
            mask: [B, S] bool, the active slots.

        Returns:
            weights [B, R, T, S], sum 1 over the active slots and exactly 0 on the others; gate [B, R, T, 1].
        """
        batch, length, _ = tokens.shape
        scores = self.score(tokens).view(batch, length, self.num_heads, self.num_states).transpose(1, 2)
        scores = torch.where(mask[:, None, None, :], scores, MASKED_SCORE)
        gate = MAX_WRITE * torch.sigmoid(self.gate(tokens)).transpose(1, 2).unsqueeze(-1)
        return scores.softmax(-1), gate

    def write(self, bank: Tensor, weights: Tensor, values: Tensor) -> Tensor:
        """Write a run of tokens into the bank, as if one after the other.

        slot' = prod_t (1 - w_t) * slot + sum_t w_t * prod_{t' > t} (1 - w_t') * value_t

        Args:
            bank: [B, S, D].
            weights: w = gate * routing weight, [B, R, T, S], in [0, 1 - 2^-10].
            values: [B, T, D].

        Returns:
            The bank after the last token, [B, S, D].
        """
        length = weights.shape[2]
        log_keep = torch.log1p(-weights)
        later = torch.ones(length, length, dtype=weights.dtype, device=weights.device).triu(1)
        suffix = weights * torch.exp(later @ log_keep)
        kept = torch.exp(log_keep.sum(2)).unsqueeze(-1)
        return self._join(kept * self._split(bank) + suffix.transpose(-1, -2) @ self._split(values))

    def forward(self, tokens: Tensor, states: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Write `tokens` [B, T, d] into `states` [B, S, D].

        Args:
            mask: [B, S] bool, the active slots (default: all).

        Returns:
            routed: the bank after the writes, [B, S, D].
            weights: the routing before the token gate, [B, T, S], >= 0 with sum 1 over slots; the mean over
                routing heads.
        """
        if mask is None:
            mask = torch.ones(states.shape[:2], dtype=torch.bool, device=states.device)
        weights, gate = self.route(tokens, mask)
        return self.write(states, weights * gate, self.value(tokens)), weights.mean(1)

    def _split(self, x: Tensor) -> Tensor:
        """[B, N, D] -> [B, R, N, D / R]: head r takes the r-th part of either half."""
        if self.num_heads == 1:
            return x.unsqueeze(1)
        batch, count, _ = x.shape
        parts = x.view(batch, count, 2, self.num_heads, -1).permute(0, 3, 1, 2, 4)
        return parts.reshape(batch, self.num_heads, count, -1)

    def _join(self, x: Tensor) -> Tensor:
        """Inverse of `_split`."""
        if self.num_heads == 1:
            return x.squeeze(1)
        batch, _, count, _ = x.shape
        parts = x.view(batch, self.num_heads, count, 2, -1).permute(0, 2, 3, 1, 4)
        return parts.reshape(batch, count, self.state_dim)
