from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

import nsm
from nsm.bundle import Bundle
from nsm.errors import InputError, NonFiniteError, UnsupportedError
from nsm.export.graphs.exporter import export_onnx, initial_arrays
from nsm.models.adaptive import AdaptiveNSM
from nsm.models.stream import StreamModel
from nsm.quantization.calibration import AGES, Range, Watched, calibrate, rollouts
from nsm.quantization.linear_ops import linear_ops_of, weight_key
from nsm.quantization.preconditions import MAX_STEPS, MIN_CALLS
from nsm.runtimes.backends.onnxruntime import load
from nsm.runtimes.session.session import Session
from nsm.trace import Array, Arrays
from tests.quantization.graphs import make_graph, product_node
from tests.quantization.toy import DEPTH, IN, LENGTH, OUT, SLOTS, WIDTH, Toy, make_toy
from tests.small_models import CHUNK, VOCABULARY, make_model, make_sequences

FIRST, LAST = weight_key(IN), weight_key(OUT)


def ones(calls: int, more: int = 0) -> Array:
    """A sequence of so many calls of the toy: every number of the bank grows by 2 or 6 a call."""
    return np.ones((calls * LENGTH + more, DEPTH), np.float32)


def vectors(calls: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal((calls * LENGTH, DEPTH)).astype(np.float32)


@pytest.fixture
def toy(tmp_path: Path) -> Toy:
    return make_toy(tmp_path)


# -- a range ---------------------------------------------------------------------------------------------------------


def squared_error(values: Array, scale: float) -> float:
    """Mean, of an int8 with that scale, by the definition of QuantizeLinear but for -128."""
    levels = np.clip(np.rint(values / scale), -127, 127)
    return float(np.mean((values - scale * levels) ** 2))


def draw(kind: str, size: int) -> Array:
    random = np.random.default_rng(3)
    drawn = {
        "uniform": random.uniform(-2, 3, size),
        "normal": 1e-3 * random.standard_normal(size),
        "long tails": random.laplace(0, 50, size),
        "one outlier": np.append(random.standard_normal(size - 1), 20.0),
    }
    return np.asarray(drawn[kind], np.float32)


@pytest.mark.parametrize("kind", ["uniform", "normal", "long tails", "one outlier"])
def test_a_scale_is_near_the_best_there_is(kind: str) -> None:
    values = draw(kind, 3000)
    found = Range()
    for part in np.array_split(values, 7):  # calls of any size
        found.add(part.reshape(1, -1))
    largest = float(np.abs(values).max())
    best = min(squared_error(values, share * largest / 127) for share in np.linspace(0.05, 1.1, 1051))
    worst = squared_error(values, 3 * largest / 127)
    assert squared_error(values, found.scale()) <= 1.1 * best + 1e-3 * worst
    assert found.scale() <= largest / 127 * (1 + 1e-6)


def test_a_scale_clips_where_that_is_better() -> None:
    """Of N numbers spread evenly over 0 .. 1 and a 2: c makes c^2 / (12 * 127^2) + (2 - c)^2 / N least."""
    found, calls, size = Range(), 16, 4096
    for call in range(calls):
        values = np.linspace(0, 1, size, dtype=np.float32)
        values[0] = 2.0 if call == 5 else 0.0
        found.add(values)
    best = 2 * 12 * 127**2 / (12 * 127**2 + calls * size)
    assert best < 1.6
    assert found.scale() == pytest.approx(best / 127, rel=0.05)


def test_of_many_numbers_some_will_do_but_the_largest_counts() -> None:
    found, values = Range(), draw("uniform", 200_000)
    found.add(values)
    assert found.scale() == pytest.approx(np.abs(values).max() / 127, rel=0.05)


def asymmetric_error(values: Array, scale: float, zero: float) -> float:
    levels = np.clip(np.rint(values / scale) + zero, 0, 255) - zero
    return float(np.mean((values - scale * levels) ** 2))


@pytest.mark.parametrize(("sign", "zeros"), [(1.0, range(9, 20)), (-1.0, range(236, 247))])
def test_what_is_hardly_ever_negative_is_unsigned_with_levels_near_the_best(sign: float, zeros: range) -> None:
    """As a GELU or SiLU gives it, or its mirror image."""
    x = 1e3 * draw("normal", 4000).astype(np.float64)
    values = (sign * x / (1 + np.exp(-x))).astype(np.float32)
    found = Range()
    found.add(values)
    best = found.asymmetric(found.scale())
    assert best is not None
    assert best.zero in zeros
    ends = np.linspace(0.3, 1.1, 41)
    low, high = float(min(values)), float(max(values))
    least = min(
        asymmetric_error(values, scale, np.rint(-a * low / scale))
        for a in ends
        for b in ends
        if (scale := (b * high - a * low) / 255) > 0
    )
    given = asymmetric_error(values, best.scale, best.zero)
    assert given <= 1.1 * least
    assert given < 0.5 * squared_error(values, found.scale())


@pytest.mark.parametrize("kind", ["uniform", "normal", "long tails"])
def test_what_has_both_signs_alike_stays_signed(kind: str) -> None:
    found, values = Range(), draw(kind, 3000)
    found.add(values)
    found.add(-values)
    assert found.asymmetric(found.scale()) is None


@pytest.mark.parametrize("value", [3.0, -0.25])
def test_a_constant_is_a_level(value: float) -> None:
    found = Range()
    found.add(np.full(100, value, np.float32))
    assert found.asymmetric(found.scale()) is None  # its int8 is exact


def test_zero_is_a_level_even_where_no_number_is_near_it() -> None:
    """Masked slots are zero, and padding is."""
    found, values = Range(), draw("uniform", 3000)
    found.add(np.abs(values) / 4 + 3)
    best = found.asymmetric(found.scale())
    assert best is not None
    assert best.zero == 0
    assert best.scale == pytest.approx((np.abs(values).max() / 4 + 3) / 255, rel=0.02)


def test_an_activation_that_is_always_zero_has_a_scale_of_one() -> None:
    found = Range()
    found.add(np.zeros((2, 5), np.float32))
    assert found.scale() == 1.0
    assert Range().scale() == 1.0
    for size in (1e-37, 3e-44):  # a scale that small is no normal number: OpenVINO divides by it, and gives NaN
        found = Range()
        found.add(np.full(8, size, np.float32))
        assert found.scale() == 1.0
        assert found.asymmetric(found.scale()) is None


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_number_that_is_none_is_refused(bad: float) -> None:
    with pytest.raises(NonFiniteError, match=r"gives NaN or infinite activations on the calibration sequences\. Check"):
        Range().add(np.array([1.0, bad], np.float32))


# -- what is looked at -----------------------------------------------------------------------------------------------


def test_ages_begin_at_the_reset_and_spread_to_the_last_call(toy: Toy) -> None:
    calls = list(rollouts(toy.open(), [vectors(200), vectors(200, 1)]))
    ages = [call.age for call in calls]
    assert ages[0] == 0
    assert ages[-1] == 199
    assert AGES - 3 <= len(ages) <= AGES  # close to the reset several fall on one call
    steps = np.diff(ages)
    assert np.all(steps >= 1)
    assert np.all(steps[3:] >= steps[2:-1])  # wider and wider
    assert not calls[0].feeds["past_state.0.bank"].any()


@pytest.mark.parametrize("calls", [1, 2, 3])
def test_of_a_short_stream_every_call_is_looked_at(toy: Toy, calls: int) -> None:
    assert [call.age for call in rollouts(toy.open(), [vectors(calls)])] == list(range(calls))


def test_a_long_stream_is_cut(toy: Toy) -> None:
    done: list[tuple[int, int]] = []
    ages = [call.age for call in rollouts(toy.open(), [vectors(300)], lambda *at: done.append(at))]
    assert ages[-1] == MAX_STEPS - 1
    assert done == [(step + 1, MAX_STEPS) for step in range(MAX_STEPS)]


def test_a_call_holds_the_tokens_and_the_state_of_its_streams(toy: Toy) -> None:
    sequences = [vectors(20), vectors(20, 1)]
    for call in rollouts(toy.open(), sequences):
        bank = np.zeros((2, WIDTH))
        for step in range(call.age):
            tokens = np.stack([sequence[step * LENGTH : (step + 1) * LENGTH] for sequence in sequences])
            bank = 0.5 * bank + (tokens @ IN).sum(1)
        np.testing.assert_allclose(call.feeds["past_state.0.bank"], bank, rtol=1e-5, atol=1e-6)
        wanted = [sequence[call.age * LENGTH : (call.age + 1) * LENGTH] for sequence in sequences]
        np.testing.assert_array_equal(call.feeds["tokens"], wanted)
        assert set(call.feeds) == {"tokens", "past_state.0.bank", "past_state.0.mask"}


def test_a_call_of_a_bundle_is_what_a_session_has_there(exported: Path) -> None:
    """A second session is stepped by hand, and the feeds give what it answers."""
    sequences = make_sequences(2, 20 * CHUNK)
    spec = Bundle(exported).manifest.spec
    entry = spec.entry("step")
    with nsm.open(exported, target="onnxruntime") as rolled, nsm.open(exported, target="onnxruntime") as other:
        rolled.step(sequences[:, :CHUNK])  # what was before is forgotten
        calls, age = 0, 0
        for call in rollouts(rolled, list(sequences)):
            for _ in range(call.age - age):
                other.step(sequences[:, age * CHUNK : (age + 1) * CHUNK])
                age += 1
            state = other.read_state()
            wanted = {item.past: state[item.name] for item in spec.states_of(entry.reads)}
            wanted |= {"tokens": sequences[:, age * CHUNK : (age + 1) * CHUNK], "valid": np.full(2, CHUNK)}
            assert set(call.feeds) == set(wanted)
            for name, value in wanted.items():
                np.testing.assert_array_equal(call.feeds[name], value, err_msg=name)
                assert call.feeds[name].dtype == value.dtype
            calls += 1
        assert calls >= AGES - 2
        assert age == 19


def test_occupancy_is_of_the_lanes_that_have_streams(toy: Toy) -> None:
    calls = list(rollouts(toy.open(), [vectors(40)]))
    assert [call.occupancy for call in calls] == [[min(call.age, SLOTS) / SLOTS] for call in calls]
    assert all(len(call.occupancy) == 2 for call in rollouts(toy.open(), [vectors(4), vectors(4)]))


# -- sequences -------------------------------------------------------------------------------------------------------


def test_sequences_of_like_lengths_are_rolled_together(toy: Toy) -> None:
    sequences = [ones(1), ones(30, more=1), ones(2), ones(31), vectors(0)]
    calls = list(rollouts(toy.open(), sequences))
    assert max(call.age for call in calls) == 29
    assert [call.age for call in calls if call.streams == 4] == [0]  # the second pair
    assert calls[-1].streams == 4
    assert all(call.feeds["past_state.0.bank"].any() == (call.age > 0) for call in calls)  # each pair from a reset


def test_more_lanes_than_sequences_are_filled_with_copies(tmp_path: Path) -> None:
    toy = make_toy(tmp_path, lanes=3)
    calls = list(rollouts(toy.open(), [vectors(5), vectors(5, 1)]))
    assert all(call.streams == 2 for call in calls)
    for call in calls:
        tokens = call.feeds["tokens"]
        np.testing.assert_array_equal(tokens[2], tokens[0])
        assert not np.array_equal(tokens[1], tokens[0])
        assert len(call.occupancy) == 2


@pytest.mark.parametrize("sequences", [[], [ones(0, more=1)], [ones(MIN_CALLS - 1, more=1)], [ones(1)] * 40])
def test_next_to_nothing_does_not_calibrate(toy: Toy, sequences: list[Array]) -> None:
    with pytest.raises(InputError, match=r"Calibration needs at least 16 calls of 2 tokens in all"):
        calibrate(toy.graph, toy.open(), sequences)


# -- a calibration ---------------------------------------------------------------------------------------------------


def test_a_calibration_says_what_was_seen(toy: Toy) -> None:
    found = calibrate(toy.graph, toy.open(), [vectors(20), vectors(20, 1), vectors(3, 2)])
    assert (found.streams, found.ages[0], found.ages[-1]) == (3, 0, 19)
    assert found.calls == len(found.ages) + 3  # the short one was looked at on its own, at ages that were there
    assert found.occupancy == (0.0, 1.0)
    assert set(found.scales) == {FIRST, LAST}
    assert set(found.asymmetric) <= set(found.scales)


def test_a_model_without_masks_has_no_occupancy(tmp_path: Path) -> None:
    toy = make_toy(tmp_path, masks=False)
    assert calibrate(toy.graph, toy.open(), [ones(MIN_CALLS)]).occupancy is None


def test_the_scales_are_of_the_states_of_the_stream_and_not_of_random_ones(tmp_path: Path) -> None:
    """A bank that forgets little has grown to 6 * 40 when the stream ends; a random one says 3."""
    toy = make_toy(tmp_path, keep=1.0)
    found = calibrate(toy.graph, toy.open(), [ones(40), ones(40)])
    assert found.scales[FIRST] == pytest.approx(1 / 127, rel=1e-3)
    assert found.scales[LAST] == pytest.approx(240 / 127, rel=0.1)
    watched, random = Watched(toy.graph), Range()
    generator = np.random.default_rng(0)
    for _ in range(found.calls):
        bank = generator.standard_normal((2, WIDTH)).astype(np.float32)
        feeds = {
            "tokens": ones(1)[None].repeat(2, 0),
            "past_state.0.bank": bank,
            "past_state.0.mask": np.ones(20, bool),
        }
        feeds["past_state.0.mask"] = feeds["past_state.0.mask"].reshape(2, SLOTS)
        random.add(watched(feeds)[LAST])
    assert found.scales[LAST] > 20 * random.scale()


def test_a_bundle_has_a_scale_for_every_product_of_every_entry(exported: Path) -> None:
    with nsm.open(exported, target="onnxruntime") as session:
        found = calibrate(exported / "graphs" / "step.onnx", session, list(make_sequences(3, 20 * CHUNK)))
    for entry in ("step", "decode", "commit"):
        linear_ops = linear_ops_of(onnx.load(str(exported / "graphs" / f"{entry}.onnx")))
        assert {linear_op.key for linear_op in linear_ops} <= set(found.scales)
    assert all(0 < scale < 1 for scale in found.scales.values())
    assert (found.streams, found.occupancy) == (3, (1.0, 1.0))


def test_a_matrix_of_several_products_has_the_range_of_all_their_activations(tmp_path: Path) -> None:
    """As in a call of several chunks: the last activation is a small one."""
    weight = np.eye(2, dtype=np.float32)
    nodes = [product_node("one", "x", "w", "y"), product_node("two", "z", "w", "u")]
    shapes = {name: [1, 2] for name in "xzyu"}
    model = make_graph(
        nodes, {name: shapes[name] for name in "xz"}, {name: shapes[name] for name in "yu"}, {"w": weight}
    )
    onnx.save(model, str(tmp_path / "step.onnx"))
    watched = Watched(tmp_path / "step.onnx")
    values = watched({"x": np.array([[9.0, -8.0]], np.float32), "z": np.array([[1.0, 2.0]], np.float32)})
    assert {key: sorted(value.tolist()) for key, value in values.items()} == {weight_key(weight): [-8, 1, 2, 9]}


# -- what is refused -------------------------------------------------------------------------------------------------


def test_a_model_that_gives_nan_is_refused(tmp_path: Path) -> None:
    toy = make_toy(tmp_path, first=np.full_like(IN, np.nan))
    with pytest.raises(NonFiniteError, match="fp32 model gives NaN"):
        calibrate(toy.graph, toy.open(), [ones(MIN_CALLS)])


@pytest.mark.parametrize("calls", [30, 250])  # after 128 it has overflowed
def test_states_that_explode_are_refused(tmp_path: Path, calls: int) -> None:
    toy = make_toy(tmp_path, keep=2.0)
    with pytest.raises(UnsupportedError, match=r"states explode: .* grows from .* to .* not quantized\. Train on"):
        calibrate(toy.graph, toy.open(), [ones(calls)])


def test_a_stream_that_breaks_at_once_is_not_said_to_explode(tmp_path: Path) -> None:
    toy = make_toy(tmp_path, keep=1.0)
    sequence = ones(200)
    sequence[110:120] = 3e38
    with pytest.raises(NonFiniteError, match="NaN or infinite"):
        calibrate(toy.graph, toy.open(), [sequence])


@pytest.mark.parametrize("keep", [0.0, 0.999, 1.0])
def test_states_that_settle_or_grow_slowly_are_fine(tmp_path: Path, keep: float) -> None:
    toy = make_toy(tmp_path, keep=keep)
    assert calibrate(toy.graph, toy.open(), [ones(MAX_STEPS)]).ages[-1] == MAX_STEPS - 1


def test_a_graph_without_products_is_refused(tmp_path: Path) -> None:
    toy = make_toy(tmp_path, linear_ops=False)
    with pytest.raises(UnsupportedError, match="The model has no linear op with constant weights, so there is nothing"):
        calibrate(toy.graph, toy.open(), [ones(MIN_CALLS)])


# -- masked slots ----------------------------------------------------------------------------------------------------

_SIZES: dict[str, Any] = {"vocab_size": VOCABULARY, "state_dim": 16, "num_layers": 1, "chunk_size": CHUNK}
_MASKED: dict[str, Callable[[], StreamModel]] = {
    "lstm, communication": lambda: make_model(initial_states=3, num_layers=1, gate_type="lstm", communication=True),
    "hierarchy": lambda: make_model(initial_states=4, num_layers=1, hierarchy=(2,)),
    "adaptive": lambda: AdaptiveNSM(max_states=8, initial_states=4, **_SIZES).eval(),
}


@pytest.mark.parametrize(
    "kind",
    ["lstm, communication", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("hierarchy", "adaptive"))],
)
def test_what_lies_in_masked_slots_sets_no_scale(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, sequences = _MASKED[kind](), list(make_sequences(2, 20 * CHUNK))
    spec = model.spec(2)
    spec = replace(spec, entries=(spec.entry("step"),))
    export_onnx(model, spec, tmp_path)
    graph, initial = tmp_path / "step.onnx", initial_arrays(model, 2)
    with Session(load({"step": graph}, spec, "cpu", 1), spec, initial, "f" * 64, "onnxruntime") as session:
        read = session.read_state
        assert not all(value.all() for name, value in read().items() if name.endswith(".mask"))

        def poisoned(active: bool) -> Arrays:
            state = read()
            for name, value in state.items():
                layer, role = name.rsplit(".", 1)
                if role in ("bank", "cell"):
                    value.swapaxes(1, 2)[state[f"{layer}.mask"] == active] = 1e3
            return state

        clean = calibrate(graph, session, sequences)
        monkeypatch.setattr(session, "read_state", lambda: poisoned(active=False))
        assert calibrate(graph, session, sequences).scales == clean.scales
        monkeypatch.setattr(session, "read_state", lambda: poisoned(active=True))
        assert calibrate(graph, session, sequences).scales != clean.scales, "there are scales that a slot may set"
