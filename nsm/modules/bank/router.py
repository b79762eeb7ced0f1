"""TokenToStateRouter: routing weights, write strength, and the exact write of a whole chunk.

Equations (7) - (9) of the reference.
"""

from __future__ import annotations

from math import gcd
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from nsm.errors import ConfigError
from nsm.modules.ops import FusedLinear, entmax15, sparsemax, to_bank, to_states, top_k

# The highest write weight. At 1, log(1 - w) would be infinite; 2^-10 is exact in fp16 and bf16 too.
MAX_WRITE = 1.0 - 2.0**-10
# A score whose softmax is exactly 0. It replaces the score of an inactive slot and is never added to it, because the
# values of an inactive slot may make that score infinite or NaN. A prior on slots may be added to it.
MASKED_SCORE = -1.0e9

Routing = Literal["softmax", "topk", "sparsemax", "entmax"]
ROUTINGS: tuple[str, ...] = get_args(Routing)


def log_of_rest(weights: Tensor) -> Tensor:
    """log(1 - w) of weights in [0, 1 - 2^-10], accurate for small w.

    1 - w rounds a small w away. The rounding error, w - (1 - (1 - w)), is computed exactly (Sterbenz 1974). It is zero
    for w >= 1/2; for smaller w it is subtracted from the logarithm, which is exact to the last bits.
    """
    # backend: every runtime has a fast Log. atanh gives the same values, but took a third of a commit on OpenVINO.
    rest = 1.0 - weights
    lost = weights - (1.0 - rest)
    return torch.log(rest) - lost


class TokenToStateRouter(nn.Module):
    """Routes tokens to slots and writes them.

    Letters: B lanes, T tokens, S slots, D = `state_dim`, d = `token_dim`, R bank heads of f = D / (2 R) numbers.

    For every token and bank head, the scores over the *active* slots become weights that sum to 1: slots compete
    for the token. A token gate g in [0, 1 - 2^-10] sets the strength of the write. With the write weight
    w = g * weight, a slot becomes `(1 - w) * slot + w * value`, token after token. This linear recurrence is
    non-expansive: an error decays as fast as its slot is written. `transition` evaluates all tokens of a chunk at
    once, exactly, with suffix products in log space.

    R is the largest divisor of `num_heads` that splits D / 2 evenly.

    Scores become weights by `routing`:
        softmax: dense, the default.
        topk: softmax over the `top_k` highest scores; not continuous.
        sparsemax, entmax: continuous, with exact zeros (Martins and Astudillo 2016; Peters et al. 2019, alpha 1.5).

    The token gate follows the write gates of bounded-memory attention (Peng et al. 2022, "ABC") and gated slot
    attention (Zhang et al. 2024); competition over slots follows slot attention (Locatello et al. 2020).

    Raises:
        ConfigError: invalid sizes or routing.
    """

    def __init__(
        self,
        token_dim: int,
        state_dim: int,
        num_states: int,
        num_heads: int = 4,
        *,
        routing: Routing = "softmax",
        top_k: int | None = None,
    ) -> None:
        super().__init__()
        if min(token_dim, num_states, num_heads) < 1 or state_dim < 2 or state_dim % 2:
            raise ConfigError(
                "A router needs token_dim, num_states, num_heads >= 1 and an even state_dim >= 2 (halves for address "
                f"and content); given token_dim={token_dim}, state_dim={state_dim}, num_states={num_states}, "
                f"num_heads={num_heads}."
            )
        if routing not in ROUTINGS:
            raise ConfigError(f"routing must be one of {', '.join(ROUTINGS)}; given {routing!r}.")
        if (routing == "topk") != (top_k is not None) or (top_k is not None and not 1 <= top_k <= num_states):
            raise ConfigError(
                f"routing='topk' goes with top_k in 1 .. num_states={num_states}, and only it; "
                f"given routing={routing!r}, top_k={top_k}."
            )
        self.state_dim = state_dim
        self.num_states = num_states
        self.num_heads = gcd(num_heads, state_dim // 2)
        self.routing = routing
        self.top_k = top_k
        self.score = nn.Linear(token_dim, self.num_heads * num_states, bias=False)
        self.gate = nn.Linear(token_dim, self.num_heads)
        self.product = FusedLinear()
        self.value = nn.Linear(token_dim, state_dim, bias=False)
        # Four times torch's default. Otherwise each token is spread over all slots at first, and recall is learned
        # late or never.
        nn.init.normal_(self.score.weight, std=2.0 * token_dim**-0.5)

    def scores(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """From tokens [B, T, d]: scores [B, R, T, S], before any mask, and token gates [B, R, T, 1]."""
        batch, length, _ = tokens.shape
        product = self.product(tokens, self.score.weight, self.gate.weight)
        scores, gate = torch.split(product, [self.num_heads * self.num_states, self.num_heads], -1)
        gate = MAX_WRITE * torch.sigmoid(gate + self.gate.bias)
        return (
            scores.reshape(batch, length, self.num_heads, self.num_states).transpose(1, 2),
            gate.transpose(1, 2).unsqueeze(-1),
        )

    def weights(self, scores: Tensor, mask: Tensor) -> Tensor:
        """Scores [B, R, T, S] and the active slots mask [B, S] -> weights [B, R, T, S].

        They sum to 1 over the active slots and are exactly 0 on the others.
        """
        scores = torch.where(mask[:, None, None, :], scores, MASKED_SCORE)
        if self.routing == "sparsemax":
            return sparsemax(scores)
        if self.routing == "entmax":
            return entmax15(scores)
        if self.top_k is not None:
            scores = torch.where(top_k(scores, self.top_k), scores, MASKED_SCORE)
        return scores.softmax(-1)

    @staticmethod
    def transition(weights: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """The write of a chunk of tokens, one after the other, as a linear map: bank' = keep * bank + update.

        keep = prod_t (1 - w_t);  update = sum_t w_t * prod_{t' > t} (1 - w_t') * value_t

        Args:
            weights: w = gate * routing weight, [B, R, T, S], in [0, 1 - 2^-10].
            values: [B, G, T, f], for addresses and contents, G = 2 R.

        Returns:
            keep [B, G, S, 1] and update [B, G, S, f].
        """
        length = weights.shape[2]
        # Column t sums over the tokens after t; the last column sums over all.
        later = torch.ones(length, length, dtype=weights.dtype, device=weights.device).tril(-1)
        later = torch.cat([later, torch.ones_like(later[:, :1])], 1)
        written = weights.transpose(-1, -2)
        after, keep = torch.split(torch.exp(log_of_rest(written) @ later), [length, 1], -1)
        left = written * after
        return torch.cat([keep, keep], 1), torch.cat([left, left], 1) @ values

    def forward(self, tokens: Tensor, states: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Write `tokens` [B, T, d] into `states` [B, S, D].

        Args:
            mask: [B, S] bool, the active slots (default: all).

        Returns:
            routed: the bank after the writes, [B, S, D].
            weights: the routing before the token gate, [B, T, S], >= 0 with sum 1 over slots; the mean over
                bank heads.
        """
        if mask is None:
            mask = torch.ones(states.shape[:2], dtype=torch.bool, device=states.device)
        scores, gate = self.scores(tokens)
        weights = self.weights(scores, mask)
        keep, update = self.transition(weights * gate, to_bank(self.value(tokens), self.num_heads))
        return to_states(keep * to_bank(states, self.num_heads) + update), weights.mean(1)
