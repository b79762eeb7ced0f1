"""Any split of a stream, on every backend, is the stream as PyTorch runs it in one piece.

Models of all kinds are exported once; hypothesis makes up what happens to the lanes of a session: pieces of any length,
lanes that rest, resets, snapshots inside a chunk and restores, on the same lane or another.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from nsm.baselines.transformer import TransformerLM
from nsm.export import openvino
from nsm.export.build import Request
from nsm.export.onnx import export_onnx, initial_arrays
from nsm.export.record import record, synthetic
from nsm.export.torch_source import TorchSource
from nsm.models import AdaptiveNSM, HybridModel, SimpleNSM, StepModel, fingerprint
from nsm.runtimes.budgets import find_budget
from nsm.runtimes.parity import compare
from nsm.runtimes.session import Session
from nsm.runtimes.targets import find_target
from nsm.spec import COUNT, OFFSET, StepSpec
from nsm.trace import Array, Arrays
from tests.runtimes.fake import assert_same

CHUNK = 4
_ANY: dict[str, Any] = {"d_model": 8, "num_heads": 2, "chunk_size": CHUNK}
_NSM: dict[str, Any] = {**_ANY, "routing_heads": 2, "output_dim": 5, "feed_forward": 1.0}
_IDS: dict[str, Any] = {**_NSM, "vocab_size": 20, "num_states": 6}

# The model, lanes, and chunks a call of `step`.
VARIANTS: dict[str, tuple[Callable[[], StepModel], int, int]] = {
    "lstm, every third chunk, wide window": (
        lambda: SimpleNSM(
            **_IDS, num_layers=1, gate_type="lstm", window=40, consolidate_every=3, initial_states=4, communication=True
        ),
        3,
        2,
    ),
    "hierarchy, sparsemax, memory": (
        lambda: SimpleNSM(**_IDS, num_layers=1, hierarchy=(2, 3), routing="sparsemax", memory_rows=3),
        3,
        1,
    ),
    "adaptive, vectors": (
        lambda: AdaptiveNSM(
            **_NSM,
            input_dim=3,
            state_dim=16,
            max_states=6,
            initial_states=3,
            num_layers=1,
            prune_threshold=0.3,
            allocate_threshold=0.35,
            novelty_threshold=0.5,
        ),
        1,
        2,
    ),
    "hybrid": (
        lambda: HybridModel(**_IDS, num_attention_layers=1, num_nsm_layers=1, attention_window=7),
        1,
        1,
    ),
    "mingru, some masked": (lambda: SimpleNSM(**_IDS, num_layers=2, gate_type="mingru", initial_states=3), 3, 1),
    "transformer": (lambda: TransformerLM(20, num_layers=1, context=10, **_ANY), 3, 1),
}
ADAPTIVE, PLAIN, MINGRU = "adaptive, vectors", "transformer", "mingru, some masked"
LSTM = "lstm, every third chunk, wide window"
MASKED = ("lstm, every third chunk, wide window", ADAPTIVE, "mingru, some masked")
TARGETS = ("onnx", "onnxruntime", "openvino")


def but_long(names: Iterable[str]) -> list[Any]:
    """All of them on all targets take minutes: those of which others show as much are left to the long tests."""
    return [pytest.param(name, marks=pytest.mark.slow if name in (MINGRU, LSTM) else ()) for name in names]


@dataclass(frozen=True)
class Exported:
    model: StepModel
    spec: StepSpec
    directory: Path

    def open(self, target: str) -> Session:
        found = find_target(target)
        files = {e.name: self.directory / found.folder / f"{e.name}{found.suffix}" for e in self.spec.entries}
        runtime = found.runtime_module().load(files, self.spec, "cpu", 1)
        return Session(runtime, self.spec, initial_arrays(self.model, self.spec.batch), fingerprint(self.model), target)


Exporter = Callable[[str], Exported]
Opener = Callable[[str, str], tuple[Exported, Session]]


@pytest.fixture(scope="session")
def exporter(tmp_path_factory: pytest.TempPathFactory) -> Exporter:
    """Exports a variant, once."""

    @cache
    @torch.no_grad()
    def made(name: str) -> Exported:
        torch.manual_seed(0)
        make, batch, chunks = VARIANTS[name]
        model = make().eval()
        _stir(model)
        spec, directory = model.spec(batch, chunks * CHUNK), tmp_path_factory.mktemp("streams")
        (directory / "graphs").mkdir()
        export_onnx(model, spec, directory / "graphs")
        openvino.build(Request(directory, directory / "openvino", spec, None))
        return Exported(model, spec, directory)

    return made


@pytest.fixture(scope="session")
def opener(exporter: Exporter) -> Opener:
    """Opens a variant on a target, once; the session is reset."""
    sessions: dict[tuple[str, str], Session] = {}

    def opened(name: str, target: str) -> tuple[Exported, Session]:
        exported = exporter(name)
        if (name, target) not in sessions:
            sessions[name, target] = exported.open(target)
        sessions[name, target].reset()
        return exported, sessions[name, target]

    return opened


def _stir(model: nn.Module) -> None:
    """Random weights all over, so that nothing hides behind a gate that starts closed."""
    for name, parameter in model.named_parameters():
        parameter.add_(torch.randn_like(parameter), alpha=1.0 if name.endswith("importance") else 0.3)


def make_tokens(model: StepModel, lanes: int, length: int, seed: int) -> Array:
    return np.stack(synthetic(TorchSource.of(model), lanes, length, seed))


@torch.no_grad()
def offline(model: StepModel, history: Array) -> tuple[Array, Arrays]:
    """Outputs and state of one lane, which PyTorch runs in one piece from the beginning."""
    if not len(history):
        return np.empty(0), {name: value[0].numpy() for name, value in model.initial_state(1).items()}
    outputs, state = model(torch.from_numpy(history[None]), return_state=True)
    return outputs[0].numpy(), {name: value[0].numpy() for name, value in state.items()}


def lane_of(session: Session, lane: int) -> Arrays:
    state = session.read_state()
    return {spec.name: state[spec.name][spec.lane_index(lane)] for spec in session.spec.states}


def assert_close(given: Arrays, wanted: Arrays, about: str) -> None:
    assert set(given) == set(wanted)
    for name, value in wanted.items():
        if value.dtype.kind == "f":
            np.testing.assert_allclose(given[name], value, rtol=1e-5, atol=1e-5, err_msg=f"{about}: {name}")
        else:
            np.testing.assert_array_equal(given[name], value, err_msg=f"{about}: {name}")


# What happens: (how many tokens the lanes are given, how many of them count on each lane as a share), or to a lane.
FEEDS = st.tuples(
    st.integers(1, 5 * CHUNK), st.lists(st.sampled_from([0.0, 0.2, 0.5, 0.8, 1.0]), min_size=3, max_size=3)
)
TURNS = st.tuples(st.sampled_from(["reset", "snapshot", "restore"]), st.integers(0, 2))
EVENTS = st.lists(st.one_of(FEEDS, FEEDS, TURNS), min_size=4, max_size=9)


ALL_STREAMS = [
    pytest.param(
        name, target, marks=pytest.mark.slow if name in (MINGRU, LSTM) or (target == "onnx" and name != PLAIN) else ()
    )
    for name in VARIANTS
    for target in TARGETS
]


@pytest.mark.parametrize(("name", "target"), ALL_STREAMS)
@settings(max_examples=3, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(events=EVENTS, seed=st.integers(0, 99))
def test_any_split_is_the_stream_in_one_piece(
    name: str, target: str, opener: Opener, events: list[tuple[Any, Any]], seed: int
) -> None:
    exported, session = opener(name, target)
    model, lanes = exported.model, exported.spec.batch
    assert session.is_fresh()
    start = make_tokens(model, lanes, 1, 0)[:, :0]
    history = list(start)
    kept: tuple[bytes, Array] | None = None
    for turn, (what, argument) in enumerate([*events, (CHUNK + 3, [1.0] * 3)]):
        before = session.read_state()
        touched = set(range(lanes))
        if what == "reset":
            session.reset(argument % lanes)
            history[argument % lanes], touched = start[0], {argument % lanes}
        elif what == "snapshot":
            kept, touched = (session.snapshot(argument % lanes), history[argument % lanes]), set()
        elif what == "restore":
            if kept is None:
                continue
            session.restore(kept[0], argument % lanes)
            history[argument % lanes], touched = kept[1], {argument % lanes}
        else:
            tokens = make_tokens(model, lanes, what, 100 * seed + turn)
            valid = np.array([round(what * share) for share in argument[:lanes]])
            outputs = session.feed(tokens, valid)["outputs"]
            touched = set(np.flatnonzero(valid).tolist())
            for lane in touched:
                history[lane] = np.concatenate([history[lane], tokens[lane, : valid[lane]]])
                wanted, _ = offline(model, history[lane])
                about = f"turn {turn}, lane {lane}, outputs"
                np.testing.assert_allclose(
                    outputs[lane, : valid[lane]], wanted[-valid[lane] :], rtol=1e-5, atol=1e-5, err_msg=about
                )
        after = session.read_state()
        for lane in range(lanes):
            if lane not in touched:
                assert_same(
                    {s.name: after[s.name][s.lane_index(lane)] for s in exported.spec.states},
                    {s.name: before[s.name][s.lane_index(lane)] for s in exported.spec.states},
                )
    for lane in range(lanes):
        assert_close(lane_of(session, lane), offline(model, history[lane])[1], f"lane {lane}")
        if OFFSET in exported.spec.state_names:
            assert session.offsets[lane] == len(history[lane]) % CHUNK


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", but_long(VARIANTS))
def test_reset_is_fresh_bit_by_bit(name: str, target: str, opener: Opener) -> None:
    exported, session = opener(name, target)
    fresh = exported.open(target)
    tokens = make_tokens(exported.model, exported.spec.batch, 3 * CHUNK + 1, 1)
    session.feed(tokens[:, ::-1])
    session.reset()
    assert_same(session.read_state(), fresh.read_state())
    assert_same(session.read_state(), initial_arrays(exported.model, exported.spec.batch))
    assert_same(session.feed(tokens), fresh.feed(tokens))
    assert_same(session.read_state(), fresh.read_state())


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", but_long(MASKED))
def test_slots_that_begin_masked_may_hold_anything(name: str, target: str, opener: Opener) -> None:
    exported, session = opener(name, target)
    tokens = make_tokens(exported.model, exported.spec.batch, 9 * CHUNK + 2, 2)
    results = []
    for poison in (0.0, 1e30, -1e30):
        state = initial_arrays(exported.model, exported.spec.batch)
        poisoned = 0
        for key, mask in state.items():
            layer, _, role = key.partition(".")
            for slotted in (f"{layer}.bank", f"{layer}.cell"):
                if role == "mask" and slotted in state:
                    np.moveaxis(state[slotted], 2, 1)[~mask] = poison
                    poisoned += int((~mask).sum())
        assert poisoned
        session.load_state(state)
        pieces = np.split(tokens, [CHUNK + 1, 5 * CHUNK], 1)
        outputs = [session.feed(piece)["outputs"] for piece in pieces]
        after = session.read_state()
        for key, mask in after.items():
            if key.endswith(".mask"):
                for slotted in (key.replace("mask", "bank"), key.replace("mask", "cell")):
                    if slotted in after:
                        np.moveaxis(after[slotted], 2, 1)[~mask] = 0
        results.append({**after, "outputs": np.concatenate(outputs, 1)})
    assert_same(results[1], results[0])
    assert_same(results[2], results[0])


# -- decisions --------------------------------------------------------------------------------------------------------

CALLS = 1040


@pytest.fixture(scope="module")
@torch.no_grad()
def decided(exporter: Exporter) -> tuple[Array, Array]:
    """Tokens [calls, 1, K, 3] of a stream whose kind changes now and then, and PyTorch's masks after each call."""
    exported = exporter(ADAPTIVE)
    random = np.random.default_rng(5)
    count = exported.spec.entry("step").inputs[0].shape[1]
    kinds = random.standard_normal((CALLS // 80, 3)) * 3
    spread = random.choice([0.1, 1.0, 3.0], CALLS // 80)
    which = np.arange(CALLS) // 80
    noise = random.standard_normal((CALLS, 1, count, 3))
    tokens = (kinds[which][:, None, None] + spread[which][:, None, None, None] * noise).astype(np.float32)
    state, masks = exported.model.initial_state(1), []
    for call in torch.from_numpy(tokens):
        _, state = exported.model.step(call, state)
        masks.append(state["0.mask"][0].numpy())
    return tokens, np.stack(masks)


def test_slots_are_pruned_and_allocated_again_and_again(decided: tuple[Array, Array]) -> None:
    """Otherwise the test below would compare masks that never change."""
    _, masks = decided
    changes = masks[1:].astype(int) - masks[:-1].astype(int)
    assert (changes < 0).sum() >= 3, "pruned"
    assert (changes > 0).sum() >= 3, "allocated"
    assert masks.any(1).all()


@pytest.mark.parametrize("target", ["onnxruntime", "openvino"])
def test_backends_prune_and_allocate_the_slots_that_pytorch_does(
    target: str, opener: Opener, decided: tuple[Array, Array]
) -> None:
    _, session = opener(ADAPTIVE, target)
    tokens, masks = decided
    for call, (piece, mask) in enumerate(zip(tokens, masks, strict=True)):
        session.step(piece)
        np.testing.assert_array_equal(session.read_state()["0.mask"][0], mask, err_msg=f"call {call}")


# -- a model without chunks -------------------------------------------------------------------------------------------


def test_the_cache_of_a_transformer_is_written_in_place(exporter: Exporter) -> None:
    spec = exporter(PLAIN).spec
    assert [entry.name for entry in spec.entries] == ["step", "decode"]
    assert {state.name for state in spec.states if state.append_axis is not None} == {"0.key", "0.value"}
    assert COUNT in spec.state_names


@pytest.mark.parametrize("target", TARGETS)
def test_a_model_without_chunks_passes_the_comparison(target: str, opener: Opener) -> None:
    exported, session = opener(PLAIN, target)
    source = TorchSource.of(exported.model)
    trace = record(source, synthetic(source, 4, 80), steps=20, origin="synthetic")
    report = compare(trace, session, find_budget("fp32"))
    report.require()
    assert report.split is not None
    assert report.free_run.p99 > 0


@pytest.mark.parametrize("target", TARGETS)
def test_a_lane_without_chunks_may_be_stepped_from_anywhere(target: str, opener: Opener) -> None:
    exported, session = opener(PLAIN, target)
    tokens = make_tokens(exported.model, 3, 2 * CHUNK, 3)
    first = session.step(tokens[:, :CHUNK], [CHUNK, 3, 0])["outputs"]
    second = session.step(tokens[:, CHUNK:], [CHUNK] * 3)["outputs"]
    for lane, count in enumerate((CHUNK, 3, 0)):
        history = np.concatenate([tokens[lane, :count], tokens[lane, CHUNK:]])
        wanted, state = offline(exported.model, history)
        np.testing.assert_allclose(first[lane, :count], wanted[:count], rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(second[lane], wanted[count:], rtol=1e-5, atol=1e-5)
        assert_close(lane_of(session, lane), state, f"lane {lane}")
