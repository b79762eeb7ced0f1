from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from nsm.errors import InputError
from nsm.models.adaptive import AdaptiveNSM
from nsm.models.hybrid import HybridModel
from nsm.models.simple import SimpleNSM
from nsm.models.stream import StreamModel
from nsm.modules.attention_layer import AttentionLayer
from nsm.modules.bank.router import Routing
from nsm.modules.ops.layout import to_states
from nsm.spec import TensorSpec
from nsm.utils.recorders import read_trace, record_model
from nsm.utils.recording import bank_states
from tests.nsm.utils.traces import trace_of

CHUNK = 8


def ids(streams: int, length: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 20, (streams, length))


@pytest.fixture(scope="module")
def adaptive() -> AdaptiveNSM:
    """Slots are allocated from the first commits on, and pruned later."""
    return make_adaptive()


def make_adaptive(routing: Routing = "softmax") -> AdaptiveNSM:
    torch.manual_seed(0)
    return AdaptiveNSM(
        routing=routing,
        vocab_size=20,
        state_dim=16,
        max_states=12,
        initial_states=3,
        prune_threshold=0.33,
        num_heads=2,
        chunk_size=CHUNK,
        routing_heads=2,
    ).eval()


@pytest.mark.parametrize("length", [5, 8, 21, 32])
def test_a_run_is_what_the_model_did(model: SimpleNSM, length: int) -> None:
    tokens = ids(3, length)
    recording = record_model(model, torch.from_numpy(tokens), stream=1)
    assert recording.positions.tolist() == list(range(length))
    assert recording.seen.tolist() == list(range(0, length + 1, CHUNK))
    assert [layer.layer for layer in recording.layers] == [0, 1]
    padded = np.pad(tokens[1:2], ((0, 0), (0, -length % CHUNK)), mode="edge")
    with torch.no_grad():
        _, _, routing = model.traced_step(torch.from_numpy(padded), model.initial_state(1))
        _, state = model(torch.from_numpy(tokens[1:2, : length // CHUNK * CHUNK or 1]), return_state=True)
    for layer in recording.layers:
        wanted = routing[f"routing.{layer.layer}"][0, :length].numpy()
        np.testing.assert_allclose(layer.routing, wanted, atol=1e-6)
        assert layer.routing.shape == (length, 2, 6)
        np.testing.assert_allclose(layer.states[-1], to_states(state[f"{layer.layer}.bank"])[0].numpy(), atol=1e-5)
        np.testing.assert_allclose(layer.change[1:], np.linalg.norm(np.diff(layer.states, axis=0), axis=-1), atol=1e-6)
        assert np.isnan(layer.change[0]).all()
        assert layer.routable.all()
        assert layer.threshold == 0.1
        assert layer.importance is not None
        np.testing.assert_allclose(layer.importance, 0.5)


def test_all_ways_to_give_one_stream_are_the_same(model: SimpleNSM) -> None:
    tokens = ids(1, 20)
    first = record_model(model, tokens)
    for given in (tokens[0], tokens.tolist(), torch.from_numpy(tokens), torch.from_numpy(tokens[0]).int()):
        np.testing.assert_array_equal(record_model(model, given).layers[1].routing, first.layers[1].routing)


def test_vectors_and_models_that_are_not_causal() -> None:
    model = SimpleNSM(input_dim=5, state_dim=16, num_states=4, num_heads=2, chunk_size=CHUNK, causal=False)
    recording = record_model(model, np.random.default_rng(0).normal(size=(2, 12, 5)), stream=1)
    assert recording.layers[0].routing.shape == (12, 4, 4)
    assert recording.length == 12


def test_entropy_is_that_of_the_formula(model: SimpleNSM) -> None:
    layer = record_model(model, ids(1, 16)).layers[0]
    wanted = [[-sum(w * np.log2(w) for w in head if w > 0) for head in token] for token in layer.routing.tolist()]
    np.testing.assert_allclose(layer.entropy, wanted, rtol=1e-5)
    sure = np.zeros((1, 2, 4))
    sure[0, 0, 3] = 1
    sure[0, 1] = 0.25
    known = replace(layer, routing=sure).entropy
    np.testing.assert_array_equal(known, [[0, 2]])
    assert not np.signbit(known).any()


def test_the_masks_are_those_that_tokens_were_routed_with(adaptive: AdaptiveNSM) -> None:
    recording = record_model(adaptive, ids(1, 160))
    layer = recording.layers[0]
    assert layer.adapts
    assert layer.importance is not None
    assert float(np.ptp(layer.importance)) > 0
    np.testing.assert_array_equal((layer.routing > 0).all(1), layer.routable)
    np.testing.assert_array_equal(layer.routable[::CHUNK], layer.mask[:-1])


def test_slower_time_scales_are_in_the_bank_but_not_in_the_routing() -> None:
    model = SimpleNSM(vocab_size=20, d_model=16, num_states=6, num_heads=2, chunk_size=CHUNK, hierarchy=(2,))
    layer = record_model(model, ids(1, 20)).layers[0]
    assert layer.routing.shape[-1] == layer.routable.shape[-1] == 3
    assert layer.states.shape[1] == layer.mask.shape[1] == 6


def test_only_layers_that_route_are_shown() -> None:
    model = HybridModel(
        vocab_size=20, d_model=16, num_states=4, num_attention_layers=1, num_nsm_layers=2, num_heads=2, chunk_size=CHUNK
    )
    assert [layer.layer for layer in record_model(model, ids(1, 9)).layers] == [1, 2]


def test_what_a_model_does_not_take_is_refused(model: SimpleNSM, adaptive: AdaptiveNSM) -> None:
    with pytest.raises(InputError, match=r"streams 0 \.\. 1; asked for stream 2"):
        record_model(model, ids(2, 9), stream=2)
    with pytest.raises(InputError, match="takes ids of dtype int64; given vectors"):
        record_model(model, np.zeros((2, 9)))
    with pytest.raises(InputError, match=r"Token ids must lie in 0 \.\. 19"):
        record_model(model, [3, 99])
    layers = [AttentionLayer(16, 2, CHUNK, CHUNK)]
    plain = StreamModel(torch.nn.Embedding(20, 16), layers, torch.nn.Identity(), TensorSpec("tokens", (), "int64"), 16)
    with pytest.raises(InputError, match="This model has no routing to show"):
        record_model(plain, ids(1, 9))


@pytest.mark.parametrize("kind", ["simple", "adaptive"])
def test_a_trace_of_everything_is_the_run(kind: str, model: SimpleNSM, adaptive: AdaptiveNSM) -> None:
    chosen = model if kind == "simple" else adaptive
    tokens = ids(2, 160).reshape(2, 20, CHUNK)
    trace = trace_of(chosen, tokens, list(range(20)), list(range(CHUNK)))
    read, run = read_trace(trace, 1), record_model(chosen, tokens[1].ravel())
    np.testing.assert_array_equal(read.positions, run.positions)
    np.testing.assert_array_equal(read.seen, run.seen)
    for found, wanted in zip(read.layers, run.layers, strict=True):
        for name in ("routing", "states", "change"):
            np.testing.assert_allclose(getattr(found, name), getattr(wanted, name), atol=1e-5)
        np.testing.assert_array_equal(found.routable, wanted.routable)
        np.testing.assert_array_equal(found.mask, wanted.mask)
        if kind == "adaptive":
            assert found.importance is not None
            assert wanted.importance is not None
            np.testing.assert_allclose(found.importance, wanted.importance, atol=1e-6)
        else:
            assert found.importance is None


@pytest.mark.parametrize("routing", ["softmax", "sparsemax"])
def test_a_trace_of_a_part_knows_what_it_has(routing: Routing) -> None:
    adaptive = make_adaptive(routing)
    tokens = ids(1, 160).reshape(1, 20, CHUNK)
    read = read_trace(trace_of(adaptive, tokens, [0, 1, 4, 19], [3, 7]))
    run = record_model(adaptive, tokens[0].ravel())
    assert read.positions.tolist() == [8 * step + place for step in range(20) for place in (3, 7)]
    assert read.seen.tolist() == [0, 8, 16, 32, 40, 152, 160]
    for found, wanted in zip(read.layers, run.layers, strict=True):
        np.testing.assert_allclose(found.routing, wanted.routing[read.positions], atol=1e-6)
        assert np.isfinite(found.change).all(-1).tolist() == [False, True, True, False, True, False, True]
        np.testing.assert_allclose(found.change[[1, 2, 4, 6]], wanted.change[[1, 2, 5, 20]], atol=1e-5)
        # Masks are those of every token, whether or not it chose the slot and the step was sampled.
        np.testing.assert_array_equal(found.routable, wanted.routable[read.positions])
    assert len(np.unique(read.layers[0].routable, axis=0)) > 3


def test_tokens_that_do_not_count_are_left_out(model: SimpleNSM) -> None:
    trace = trace_of(model, ids(1, 16).reshape(1, 2, CHUNK), [0], list(range(CHUNK)))
    partial = replace(trace, inputs={**trace.inputs, "valid": np.array([[8, 3]])})
    assert read_trace(partial).positions.tolist() == list(range(11))
    unsaid = replace(trace, inputs={"tokens": trace.inputs["tokens"]})
    assert read_trace(unsaid).length == 16


def test_traces_that_show_nothing_are_refused(model: SimpleNSM) -> None:
    trace = trace_of(model, ids(2, 16).reshape(2, 2, CHUNK), [0], [7])
    with pytest.raises(InputError, match="This trace has no routing to show"):
        read_trace(replace(trace, outputs={"outputs": trace.outputs["outputs"]}))
    fewer = replace(trace, before={name: value[:1] for name, value in trace.before.items()})
    with pytest.raises(InputError, match=r"states of streams 0 \.\. 0; asked for stream 1"):
        read_trace(fewer, 1)


def test_a_span_is_a_part_of_a_recording(model: SimpleNSM) -> None:
    recording = record_model(model, ids(1, 40))
    part = recording.between(10, 26)
    assert part.positions.tolist() == list(range(10, 26))
    assert part.seen.tolist() == [16, 24]
    np.testing.assert_array_equal(part.layers[0].routing, recording.layers[0].routing[10:26])
    np.testing.assert_array_equal(part.layers[0].states, recording.layers[0].states[2:4])
    with pytest.raises(InputError, match=r"Nothing was recorded between tokens 40 and 50.*0 \.\. 39"):
        recording.between(40, 50)


def test_banks_become_states_as_in_the_model() -> None:
    bank = torch.randn(3, 8, 5, 6)
    np.testing.assert_array_equal(bank_states(bank.numpy()), to_states(bank).numpy())
