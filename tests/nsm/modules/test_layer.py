"""The layer against the reference, which takes one token of one stream at a time: outputs and state."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from nsm.modules.layer import NSMLayer
from nsm.modules.ops.layout import to_states
from nsm.modules.protocol import LayerState
from nsm.modules.reference import ReferenceLayer, route
from tests.nsm.modules.layers import (
    CHUNK,
    LENGTH,
    VARIANTS,
    causal_only,
    clock,
    make_layer,
    random_tokens,
    scan,
)


@pytest.fixture(params=VARIANTS.values(), ids=list(VARIANTS))
def layer(request: pytest.FixtureRequest) -> NSMLayer:
    return make_layer(**request.param)


def check(layer: NSMLayer, tokens: Tensor, outputs: Tensor, state: LayerState) -> None:
    """Against the reference, lane by lane: outputs and every state."""
    for lane in range(tokens.shape[0]):
        stream = ReferenceLayer(layer)
        assert_close(outputs[lane], stream.run(tokens[lane]), rtol=1e-6, atol=1e-7)
        found = {role: value[lane] for role, value in state.items()}
        assert_close(found["bank"], stream.bank, rtol=1e-6, atol=1e-7)
        assert torch.equal(found["mask"], stream.mask)
        if layer.consolidation.has_cell:
            assert_close(found["cell"], stream.cell, rtol=1e-6, atol=1e-7)
        if layer.adaptation is not None:
            assert_close(found["importance"], stream.importance, rtol=0, atol=1e-7)
        if stream.memory is not None:
            for role, part in zip(("key", "value", "filled", "next"), stream.memory, strict=True):
                assert_close(found[f"memory_{role}"], part[0], rtol=1e-6, atol=1e-7)
        assert_close(found["tail"], torch.stack(stream.normed[1 - layer.mixing.width :]), rtol=1e-9, atol=1e-12)
        opened = stream.mixed[len(stream.mixed) // CHUNK * CHUNK :]
        values = [to_states(found["open_write"].unsqueeze(0))[0, place] for place in range(CHUNK)]
        for place, mixed in enumerate(opened):
            assert_close(values[place], layer.router.value.weight @ mixed, rtol=1e-9, atol=1e-12)
            weight = route(layer.router, mixed, stream.mask[: layer.written_slots])
            assert_close(found["open_weight"][:, place], weight, rtol=1e-6, atol=1e-9)
        assert not any(bool(value.any()) for value in values[len(opened) :])


@torch.no_grad()
@pytest.mark.parametrize("chunks", [1, 6])
def test_scan_is_the_loop_over_single_tokens(layer: NSMLayer, chunks: int) -> None:
    tokens = random_tokens(2, LENGTH)
    check(layer, tokens, *scan(layer, tokens, chunks))


@torch.no_grad()
@pytest.mark.parametrize("name", causal_only)
def test_decode_and_commit_are_the_loop_over_single_tokens(name: str) -> None:
    layer, tokens = make_layer(**VARIANTS[name]), random_tokens(2, LENGTH)
    state, outputs = layer.initial_state(2), []
    for place in range(LENGTH):
        now = clock(layer, place, 2)
        output, state, routing = layer.decode(tokens[:, place : place + 1], state, now)
        assert routing.shape == (2, layer.heads, 1, layer.written_slots)
        outputs.append(output)
        full = torch.full((2,), place % CHUNK == CHUNK - 1)
        state = layer.commit(state, full, now)
    check(layer, tokens, torch.cat(outputs, 1), state)
