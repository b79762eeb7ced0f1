"""The recurrent baselines against the obvious way to compute it: token by token, number by number from the formulas."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.testing import assert_close

from nsm.baselines import RWKVLM, MambaLM, RecurrentLM
from nsm.baselines.mamba import MambaLayer
from nsm.baselines.recurrent import GatedLayer, Kind
from nsm.baselines.rwkv import FASTEST, RWKVLayer

Stir = Callable[[nn.Module], None]
TOKENS = torch.randint(0, 20, (2, 37), generator=torch.Generator().manual_seed(0))


def close(one: Tensor, other: Tensor) -> None:
    assert_close(one, other, rtol=1e-9, atol=1e-9)


# -- recurrent ---------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("kind", ["lstm", "gru"])
@pytest.mark.parametrize("partial", [False, True])
def test_the_recurrent_layers_are_cells_called_token_by_token(stir: Stir, kind: Kind, partial: bool) -> None:
    model = RecurrentLM(20, 8, 2, kind)
    stir(model)
    hidden = model.embed(TOKENS)
    for layer in model.layers:
        assert isinstance(layer, GatedLayer)
        cell = (nn.LSTMCell if kind == "lstm" else nn.GRUCell)(8, 8).double()
        cell.load_state_dict({name.removesuffix("_l0"): value for name, value in layer.rnn.state_dict().items()})
        after, outputs = None, []
        for token in layer.norm(hidden).unbind(1):
            after = cell(token, after)
            outputs.append(after[0] if kind == "lstm" else after)
        hidden = hidden + torch.stack(outputs, 1)
    valid = torch.tensor([37, 37]) if partial else None
    close(model.step(TOKENS, model.initial_state(2), valid)[0], model.head(hidden))


# -- rwkv --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shift", [-6.0, 0.0, 9.0])
def test_the_blocks_of_rwkv_are_its_recurrence(stir: Stir, shift: float) -> None:
    """From channels that forget nothing to channels that forget as fast as they may; gradients stay finite."""
    layer = RWKVLayer(8, 2, 12)
    stir(layer)
    with torch.no_grad():
        layer.time_decay.add_(shift)
    r, k, v = torch.randn(3, 2, 2, 37, 4, dtype=torch.float64).unbind(0)
    memory = start = torch.randn(2, 2, 4, 4, dtype=torch.float64)
    decay = torch.exp(-layer.time_decay.exp().clamp(max=FASTEST)).transpose(-1, -2)
    outputs, states = [], [start]
    for now in range(37):
        written = k[:, :, now, :, None] * v[:, :, now, None, :]
        seen = memory + layer.time_first.transpose(-1, -2) * written
        outputs.append((r[:, :, now, None] @ seen).squeeze(2))
        memory = decay * memory + written
        states.append(memory)
    made, after = layer.recur(r, k, v, start, None)
    close(made, torch.stack(outputs, 2))
    close(after, memory)
    _, partly = layer.recur(r, k, v, start, torch.tensor([0, 18]))
    close(partly, torch.stack([states[0][0], states[18][1]]))
    layer.float().recur(r.float(), k.float(), v.float(), start.float(), None)[0].sum().backward()
    assert layer.time_decay.grad is not None
    assert bool(layer.time_decay.grad.isfinite().all())


@torch.no_grad()
def test_rwkv_is_its_formulas_token_by_token(stir: Stir) -> None:
    model = RWKVLM(20, 8, 1, 2, feed_forward=1.5)
    stir(model)
    (layer,) = model.layers
    assert isinstance(layer, RWKVLayer)
    hidden, outputs = model.embed(TOKENS), []
    last = last_channel = torch.zeros(2, 8, dtype=torch.float64)
    memory = torch.zeros(2, 2, 4, 4, dtype=torch.float64)
    decay = torch.exp(-layer.time_decay.exp().clamp(max=FASTEST)).transpose(-1, -2)
    for token in hidden.unbind(1):
        x = layer.time_norm(token)
        mixed = [x * (1 - ratio) + last * ratio for ratio in layer.time_mix[:, 0, 0]]
        maps = (layer.receptance, layer.key, layer.value, layer.gate)
        r, k, v, g = (linear(one) for linear, one in zip(maps, mixed, strict=True))
        r, k, v = r.view(2, 2, 1, 4), k.view(2, 2, 4, 1), v.view(2, 2, 1, 4)
        recalled = (r @ (memory + layer.time_first.transpose(-1, -2) * (k @ v))).reshape(2, 8)
        memory, last = decay * memory + k @ v, x
        recalled = functional.group_norm(recalled, 2, layer.scale, layer.shift)
        token = token + layer.output(recalled * g * torch.sigmoid(g))
        x = layer.channel_norm(token)
        r, k = (x * (1 - ratio) + last_channel * ratio for ratio in layer.channel_mix[:, 0, 0])
        made = layer.channel_value(torch.relu(layer.channel_key(k)) ** 2)
        last_channel = x
        outputs.append(token + torch.sigmoid(layer.channel_receptance(r)) * made)
    close(model(TOKENS), model.head(torch.stack(outputs, 1)))


# -- mamba -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_mamba_is_its_formulas_token_by_token(stir: Stir) -> None:
    model = MambaLM(20, 8, 1, state_size=3)
    stir(model)
    (layer,) = model.layers
    assert isinstance(layer, MambaLayer)
    hidden, outputs = model.embed(TOKENS), []
    past = [torch.zeros(2, 16, dtype=torch.float64)] * 3
    h = torch.zeros(2, 16, 3, dtype=torch.float64)
    A = -torch.exp(layer.A_log).T
    for token in hidden.unbind(1):
        given, z = layer.in_proj(layer.norm(token)).chunk(2, -1)
        past = [*past[-3:], given]
        x = functional.silu(sum(layer.conv1d.kernel[:, 0, i] * past[i] for i in range(4)) + layer.conv1d.bias)
        dt, B, C = layer.x_proj(x).split([1, 3, 3], -1)
        dt = functional.softplus(layer.dt_proj(dt))
        h = torch.exp(dt[..., None] * A) * h + dt[..., None] * B[:, None] * x[..., None]
        y = (h * C[:, None]).sum(-1) + layer.D * x
        outputs.append(token + layer.out_proj(y * functional.silu(z)))
    close(model(TOKENS), model.head(torch.stack(outputs, 1)))
