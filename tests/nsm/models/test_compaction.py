"""compact: smaller banks, the same outputs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

import nsm
from nsm.errors import ConfigError, InputError
from nsm.models.adaptive import AdaptiveNSM
from nsm.models.compaction import compact, nsm_layers, used_slots
from nsm.models.hybrid import HybridModel
from nsm.models.simple import SimpleNSM
from nsm.models.stream import StreamModel
from tests.nsm.variants import CHUNK, SLOTS, make, random_tokens, run, run_token_by_token

TOLERANCE = 1e-5
MASKED = {"initial_states": 3}
# What a masked slot can take part in, and must not: routing of every kind, consolidation, a memory, a cell.
SIMPLE: dict[str, dict[str, Any]] = {
    "gru": MASKED,
    "communication, some masked": {},
    "sparsemax": MASKED,
    "entmax": MASKED,
    "topk": MASKED,
    "every third chunk, lstm": MASKED,
    "memory": MASKED,
    "wider window, vectors": MASKED,
    "both ways": MASKED,
}


def simple(name: str = "gru", **changes: Any) -> SimpleNSM:
    model = make(name, **{**SIMPLE.get(name, {}), **changes})
    assert isinstance(model, SimpleNSM)
    return model


def adaptive(name: str = "adaptive", **changes: Any) -> AdaptiveNSM:
    model = make(name, **changes)
    assert isinstance(model, AdaptiveNSM)
    return model


def hybrid() -> HybridModel:
    """Its first NSM layer has four active slots of six, its second five."""
    model = make("hybrid", num_nsm_layers=2)
    assert isinstance(model, HybridModel)
    for layer, masked in zip(nsm_layers(model), ([1, 4], [0]), strict=True):
        layer.manager.mask[masked] = False
    return model


def slots(model: StreamModel) -> list[int]:
    return [layer.manager.max_states for layer in nsm_layers(model)]


def sequences_for(model: StreamModel, count: int, chunks: int) -> list[np.ndarray]:
    return list(random_tokens(model, count, chunks * CHUNK + 1).numpy())


@torch.no_grad()
def assert_same(small: StreamModel, large: StreamModel, tokens: Tensor) -> None:
    assert_close(run(small, tokens)[0], run(large, tokens)[0], rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize("name", SIMPLE)
@settings(max_examples=5, deadline=None)
@given(seed=st.integers(0, 1000), length=st.integers(1, 9 * CHUNK))
def test_masked_slots_go_and_the_outputs_stay(name: str, seed: int, length: int) -> None:
    model = simple(name)
    small = compact(model)
    assert slots(small) == [3] * len(slots(model))
    assert_same(small, model, random_tokens(model, 2, length, seed))


@torch.no_grad()
def test_a_stream_can_be_decoded_as_before() -> None:
    model = simple()
    small, tokens = compact(model), random_tokens(model, 2, 5 * CHUNK + 1)
    expected, _ = run_token_by_token(model, tokens, model.initial_state(2))
    outputs, _ = run_token_by_token(small, tokens, small.initial_state(2))
    assert_close(outputs, expected, rtol=TOLERANCE, atol=TOLERANCE)


def test_layers_keep_their_own_numbers_of_slots() -> None:
    model = simple(num_layers=3)
    first, second, third = (layer.manager for layer in nsm_layers(model))
    first.mask = torch.tensor([0, 1, 0, 0, 0, 0]).bool()
    second.mask = torch.tensor([1, 0, 0, 1, 0, 1]).bool()
    third.mask = torch.ones(SLOTS).bool()
    small = compact(model)
    assert slots(small) == small.config["num_states"] == [1, 3, SLOTS]
    assert all(bool(layer.manager.mask.all()) for layer in nsm_layers(small))
    for old, new in zip(nsm_layers(model), nsm_layers(small), strict=True):
        assert torch.equal(new.manager.bank, old.manager())
        assert torch.equal(new.manager.importance, old.manager.importance[old.manager.mask])
    assert_same(small, model, random_tokens(model, 2, 6 * CHUNK))
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in model.parameters())


def test_pruned_slots_go_too() -> None:
    model = simple(initial_states=None)
    with torch.no_grad():
        nsm_layers(model)[0].manager.importance[[0, 2]] = -5.0
    assert nsm_layers(model)[0].manager.prune_low_importance_states() == 2
    small = compact(model)
    assert slots(small)[0] == SLOTS - 2
    assert_same(small, model, random_tokens(model, 2, 6 * CHUNK))


@pytest.mark.parametrize("active", [1, 2, 4])
def test_top_k_routing_keeps_as_many_slots_as_it_chooses(active: int) -> None:
    model = simple("topk", top_k=3, initial_states=active)
    small = compact(model)
    assert slots(small) == [max(active, 3)] * 2
    assert [int(layer.manager.mask.sum()) for layer in nsm_layers(small)] == [active] * 2
    assert_same(small, model, random_tokens(model, 3, 7 * CHUNK))


def test_a_model_that_uses_all_its_slots_stays_as_large() -> None:
    model = simple(initial_states=None)
    small = compact(model)
    assert slots(small) == slots(model)
    for name, value in model.state_dict().items():
        assert torch.equal(small.state_dict()[name], value), name


@pytest.mark.parametrize("name", ["adaptive", "adaptive, lstm, memory, vectors", "both ways, adaptive"])
def test_an_adaptive_model_keeps_every_slot_that_its_sequences_use(name: str) -> None:
    model = adaptive(name, max_states=[24, 20], initial_states=3)
    sequences = sequences_for(model, 3, 30)
    used = used_slots(model, sequences)
    small = compact(model, sequences)
    # There are slots that came while the streams ran, and slots that never did.
    counts = [int(layer.sum()) for layer in used]
    assert slots(small) == counts
    assert max(counts) > 3
    assert sum(counts) < sum(slots(model))
    assert all(bool((layer | ~found.manager.mask).all()) for layer, found in zip(used, nsm_layers(model), strict=True))
    for sequence in sequences:
        assert_same(small, model, torch.from_numpy(sequence).unsqueeze(0))


@torch.no_grad()
def test_used_slots_are_those_of_any_commit() -> None:
    model = adaptive(max_states=12)
    (sequence,) = sequences_for(model, 1, 30)
    state, seen = model.initial_state(1), [model.initial_state(1)[f"{index}.mask"][0] for index in range(2)]
    for chunk in torch.from_numpy(sequence[:-1]).unsqueeze(0).split(CHUNK, 1):
        _, state = model.step(chunk, state)
        seen = [before | state[f"{index}.mask"][0] for index, before in enumerate(seen)]
    found = used_slots(model, [sequence])
    assert all(torch.equal(one, other) for one, other in zip(found, seen, strict=True))
    assert any(not torch.equal(one, state[f"{index}.mask"][0]) for index, one in enumerate(found)), "none was pruned"


def test_more_sequences_never_mean_fewer_slots() -> None:
    model = adaptive(max_states=24, initial_states=2)
    sequences = sequences_for(model, 4, 20)
    few, many = used_slots(model, sequences[:1]), used_slots(model, sequences)
    assert all(bool((more | ~less).all()) for less, more in zip(few, many, strict=True))


@pytest.mark.parametrize("sequences", [None, []])
def test_an_adaptive_model_needs_sequences(sequences: list[np.ndarray] | None) -> None:
    with pytest.raises(InputError, match=r"known from streams only: give sequences, .*nsm\.save\(.*samples="):
        compact(adaptive(), sequences)


@pytest.mark.parametrize("dtype", [np.uint8, np.int32, "list", "tensor"])
def test_sequences_of_ids_are_taken_as_samples_are(dtype: Any, tmp_path: Path) -> None:
    model = adaptive(max_states=24)
    sequences = sequences_for(model, 2, 20)
    convert: dict[Any, Any] = {"list": np.ndarray.tolist, "tensor": torch.from_numpy}
    given = [convert.get(dtype, lambda ids: ids.astype(dtype))(ids) for ids in sequences]
    nsm.save(model, tmp_path / "model.pt", samples=given)
    for one, other in zip(used_slots(model, given), used_slots(model, sequences), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("double", [False, True], ids=["fp32", "fp64"])
@pytest.mark.parametrize("dtype", [np.float16, np.float64])
def test_sequences_of_vectors_are_taken_as_samples_are(dtype: Any, double: bool) -> None:
    model = adaptive("adaptive, lstm, memory, vectors")
    sequences = [vectors.astype(np.float16).astype(np.float32) for vectors in sequences_for(model, 2, 20)]
    wanted = used_slots(model, sequences)
    given = [vectors.astype(dtype) for vectors in sequences]
    for one, other in zip(used_slots(model.double() if double else model, given), wanted, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    ("name", "sequence", "message"),
    [
        ("adaptive", "abc", "its dtype is <U3, the model takes int64"),
        ("adaptive", list("abc"), "its dtype is <U1, the model takes int64"),
        ("adaptive", [0.5], "its dtype is float64, the model takes int64"),
        ("adaptive", [[0, 1]], r"ids \[B, T\], at least one token; given shape \[1, 1, 2\]"),
        ("adaptive", [0, 10_000], "must lie in"),
        ("adaptive", [[0], [1, 2]], "inhomogeneous"),
        ("adaptive, lstm, memory, vectors", [[1]], "its dtype is int64, the model takes float32"),
        ("adaptive, lstm, memory, vectors", "not finite", "it holds NaN or infinite numbers"),
    ],
)
def test_a_sequence_that_the_model_does_not_take_is_named(name: str, sequence: Any, message: str) -> None:
    model = adaptive(name)
    good = sequences_for(model, 1, 2)[0]
    given = np.full_like(good, np.nan) if sequence == "not finite" else sequence
    with pytest.raises(InputError, match=rf"sequences\[1\] is not a sequence for this model: .*{message}"):
        compact(model, [good, given])


def test_a_hierarchy_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"A hierarchy has banks of fixed sizes"):
        compact(simple("hierarchy"))


def test_a_hybrid_is_compacted_above_its_attention() -> None:
    model = hybrid()
    small = compact(model)
    assert isinstance(small, HybridModel)
    assert slots(small) == small.config["num_states"] == [4, 5]
    assert_same(small, model, random_tokens(model, 2, 9 * CHUNK))


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_is_kept_and_the_model_stays_as_it_was(training: bool) -> None:
    model = adaptive(max_states=24).train(training)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    config = dict(model.config)
    small = compact(model, sequences_for(model, 1, 10))
    assert {module.training for module in small.modules()} == {training}
    assert {module.training for module in model.modules()} == {training}
    with torch.no_grad():
        for parameter in small.parameters():
            parameter.add_(1.0)
    assert model.config == config
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


@pytest.mark.parametrize("kind", ["simple", "topk", "adaptive", "hybrid"])
def test_a_compacted_model_survives_a_checkpoint(kind: str, tmp_path: Path) -> None:
    model: StreamModel
    if kind == "adaptive":
        large = adaptive(max_states=[24, 20])
        model = compact(large, sequences_for(large, 2, 20))
    elif kind == "hybrid":
        model = compact(hybrid())
    else:
        model = compact(simple("topk", initial_states=1) if kind == "topk" else simple())
    nsm.save(model, tmp_path / "small.pt")
    loaded = nsm.load(tmp_path / "small.pt")
    assert type(loaded) is type(model)
    assert isinstance(loaded, StreamModel)
    assert loaded.config == model.config
    assert slots(loaded) == slots(model)
    tokens = random_tokens(model, 2, 6 * CHUNK + 1)
    with torch.no_grad():
        assert torch.equal(run(loaded, tokens)[0], run(model, tokens)[0])


def test_a_compacted_model_can_be_compacted_again() -> None:
    model = adaptive(max_states=24)
    sequences = sequences_for(model, 2, 20)
    once = compact(model, sequences)
    assert slots(compact(once, sequences)) == slots(once)


def test_the_package_offers_it() -> None:
    assert nsm.compact is compact


def test_the_dtype_is_kept() -> None:
    model = simple().double()
    small = compact(model)
    assert {parameter.dtype for parameter in small.parameters()} == {torch.float64}
    assert_same(small, model, random_tokens(model, 2, 3 * CHUNK))
