from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from onnx import helper, numpy_helper

from nsm.errors import InputError, NonFiniteError
from nsm.export.sources.onnx.file import Port
from nsm.export.sources.onnx.model import Foreign
from nsm.export.sources.torch import TorchSource
from nsm.export.verify.golden import (
    MAX_EXTRA_BYTES,
    MAX_SAMPLED,
    MIN_SAMPLED,
    MIN_STATE_STREAMS,
    MIN_TRACE_BYTES,
    kept_of,
    log_spaced,
    record,
    synthetic,
)
from nsm.models.adaptive import AdaptiveNSM
from nsm.models.checkpoint import fingerprint
from nsm.models.simple import SimpleNSM
from nsm.runtimes.base import Runtime
from nsm.runtimes.parity.conditioning import Perturbation
from nsm.spec import StateSpec, StepSpec
from nsm.trace import Array, Trace
from tests.runtimes.fake import CHUNK, OUTPUTS, fake_spec

Factory = Callable[..., SimpleNSM]


def make_ids(count: int, length: int, seed: int = 5, high: int = 20) -> Array:
    return np.random.default_rng(seed).integers(0, high, (count, length))


def recorded_bytes(trace: Trace) -> int:
    return sum(value.nbytes for part in (trace.outputs, trace.before, trace.after) for value in part.values())


@torch.no_grad()
def assert_is_stepping_by_hand(model: SimpleNSM, trace: Trace) -> None:
    """Every kept number of the trace, against the model stepped over the trace's own inputs."""
    state = model.initial_state(trace.streams)
    sampled = trace.sampled.tolist()
    for step in range(trace.steps):
        if step in sampled:
            for name, value in trace.before.items():
                np.testing.assert_array_equal(
                    value[:, sampled.index(step)], state[name][: trace.state_streams].numpy(), err_msg=name
                )
        outputs, state = model.step(torch.from_numpy(trace.inputs["tokens"][:, step]), state)
        np.testing.assert_array_equal(trace.outputs["outputs"][:, step], outputs[:, trace.positions].numpy())
        if step in sampled:
            for name, value in trace.after.items():
                np.testing.assert_array_equal(
                    value[:, sampled.index(step)], state[name][: trace.state_streams].numpy(), err_msg=name
                )


# -- what is recorded ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunks", [1, 2])
def test_the_trace_is_what_stepping_by_hand_gives(model: SimpleNSM, chunks: int) -> None:
    count = chunks * model.chunk_size
    ids = make_ids(3, 20 * count)
    trace = record(TorchSource.of(model), list(ids), steps=20, tokens_per_call=count)
    assert (trace.streams, trace.steps, trace.state_streams) == (3, 20, 3)
    np.testing.assert_array_equal(trace.inputs["tokens"], ids.reshape(3, 20, count))
    assert set(trace.inputs) == {"tokens"}, "every token counts"
    np.testing.assert_array_equal(trace.positions, np.arange(count))
    assert set(trace.before) == set(trace.after) == set(model.spec().state_names)
    assert_is_stepping_by_hand(model, trace)
    np.testing.assert_array_equal(trace.before["0.bank"][:, 0], model.initial_state(3)["0.bank"].detach().numpy())
    assert np.abs(trace.after["0.bank"][:, -1] - trace.before["0.bank"][:, 0]).max() > 0.01


def test_a_stream_of_vectors_is_recorded_too(model_factory: Factory) -> None:
    model = model_factory(vocab_size=None, input_dim=3, gate_type="lstm", consolidate_every=2)
    vectors = np.random.default_rng(0).standard_normal((2, 40, 3))  # float64 is taken as float32
    trace = record(TorchSource.of(model), list(vectors), steps=5)
    assert trace.inputs["tokens"].shape == (2, 5, 8, 3)
    assert trace.inputs["tokens"].dtype == np.float32
    assert_is_stepping_by_hand(model, trace)


def test_the_trace_says_whose_it_is_and_what_it_was_recorded_on(model: SimpleNSM) -> None:
    ids = list(make_ids(1, 16))
    assert record(TorchSource.of(model), ids, steps=2).source == "recorded"
    trace = record(TorchSource.of(model), ids, steps=2, origin="synthetic")
    assert trace.source == "synthetic"
    assert trace.fingerprint == fingerprint(model)


def test_samples_are_log_spaced_from_the_first_step_to_the_last(model: SimpleNSM) -> None:
    sampled = record(TorchSource.of(model), list(make_ids(1, 64)), steps=200).sampled
    assert sampled[0] == 0
    assert sampled[-1] == 199
    assert MIN_SAMPLED <= len(sampled) <= MAX_SAMPLED
    assert (np.diff(sampled) > 0).all()
    ratios = (sampled[1:] + 1) / (sampled[:-1] + 1)
    assert ratios[len(ratios) // 2 :].max() < 1.1 * ratios[len(ratios) // 2 :].min()


@pytest.mark.parametrize(("steps", "wanted"), [(1, [0]), (2, [0, 1]), (3, [0, 1, 2])])
def test_few_steps_are_all_sampled(model: SimpleNSM, steps: int, wanted: list[int]) -> None:
    trace = record(TorchSource.of(model), list(make_ids(1, 64)), steps=steps)
    assert trace.sampled.tolist() == wanted
    assert trace.steps == steps


def test_short_sequences_are_repeated(model: SimpleNSM) -> None:
    trace = record(TorchSource.of(model), [np.arange(3), np.arange(11)], steps=4)
    tokens = trace.inputs["tokens"].reshape(2, -1)
    np.testing.assert_array_equal(tokens[0], np.resize(np.arange(3), 32))
    np.testing.assert_array_equal(tokens[1], np.resize(np.arange(11), 32))


def test_every_tensor_has_a_conditioning_floor_of_the_size_of_rounding(model: SimpleNSM) -> None:
    trace = record(TorchSource.of(model), list(make_ids(2, 160)), steps=20)
    floats = {name for name, value in {**trace.outputs, **trace.after}.items() if value.dtype.kind == "f"}
    for kind in ("one_step", "free_run"):
        assert set(trace.conditioning[kind]) == floats
        assert all(0 <= floor < 1e-5 for floor in trace.conditioning[kind].values())
        assert min(trace.conditioning[kind][name] for name in ("outputs", "0.bank", "1.bank")) > 1e-8


@torch.no_grad()
def test_the_floor_is_zero_where_the_outputs_are(model_factory: Factory) -> None:
    model = model_factory()
    for value in model.head.parameters():
        value.zero_()
    trace = record(TorchSource.of(model), list(make_ids(1, 32)), steps=3)
    assert trace.conditioning["free_run"]["outputs"] == trace.conditioning["one_step"]["outputs"] == 0.0


def test_progress_runs_up_to_its_total(model: SimpleNSM) -> None:
    seen: list[tuple[int, int]] = []
    record(
        TorchSource.of(model), list(make_ids(1, 32)), steps=3, progress=lambda done, total: seen.append((done, total))
    )
    assert [done for done, _ in seen] == list(range(1, seen[-1][1] + 1))
    assert {total for _, total in seen} == {seen[-1][0]}


def test_the_model_given_is_left_as_it_was(model_factory: Factory) -> None:
    model = model_factory().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trace = record(TorchSource.of(model), list(make_ids(1, 32)), steps=3)
    assert model.training
    after = model.state_dict()
    assert all(
        after[name].dtype == value.dtype and bool((after[name] == value).all()) for name, value in before.items()
    )
    assert_is_stepping_by_hand(model.eval(), trace)


def test_a_saved_trace_is_read_back(model: SimpleNSM, tmp_path: Path) -> None:
    trace = record(TorchSource.of(model), list(make_ids(2, 64)), steps=6)
    trace.save(tmp_path / "golden.npz")
    read = Trace.load(tmp_path / "golden.npz")
    assert (read.fingerprint, read.source, read.conditioning) == (trace.fingerprint, trace.source, trace.conditioning)
    assert_is_stepping_by_hand(model, read)


@torch.no_grad()
def test_what_an_adaptive_model_decides_is_recorded_at_every_step_of_every_stream() -> None:
    torch.manual_seed(0)
    model = AdaptiveNSM(
        vocab_size=20, state_dim=16, max_states=6, initial_states=2, num_layers=1, novelty_threshold=0.5
    )
    ids = make_ids(3, 12 * model.chunk_size)
    trace = record(TorchSource.of(model), list(ids), steps=12)
    assert set(trace.decisions) == {"0.mask", "0.importance"}
    state = model.initial_state(3)
    for step in range(13):
        for name, value in trace.decisions.items():
            np.testing.assert_array_equal(value[:, step], state[name].numpy(), err_msg=f"{name}, {step}", strict=True)
        if step < 12:
            _, state = model.step(torch.from_numpy(trace.inputs["tokens"][:, step]), state)
    masks = trace.decisions["0.mask"]
    assert (masks[:, -1] != masks[:, 0]).any(), "something was decided"


def test_a_model_that_decides_nothing_has_no_decisions_recorded(model: SimpleNSM) -> None:
    assert record(TorchSource.of(model), list(make_ids(1, 32)), steps=2).decisions == {}


# -- its size --------------------------------------------------------------------------------------------------------


def weight_bytes(model: SimpleNSM) -> int:
    return sum(value.numel() * value.element_size() for value in model.parameters())


def test_a_large_vocabulary_keeps_fewer_tokens_of_a_call(model_factory: Factory) -> None:
    model = model_factory(vocab_size=4000, output_dim=None)
    trace = record(TorchSource.of(model), list(make_ids(2, 128, high=4000)), steps=32)
    full = 2 * 32 * model.chunk_size * 4000 * 4
    limit = max(MIN_TRACE_BYTES, weight_bytes(model))
    assert full > limit
    assert recorded_bytes(trace) <= limit
    assert 1 <= len(trace.positions) < model.chunk_size
    assert model.chunk_size - 1 in trace.positions, "the last token of a call sees most of the state"
    assert (trace.steps, trace.state_streams) == (32, 2)
    assert_is_stepping_by_hand(model, trace)


def test_one_position_a_call_is_kept_even_over_the_limit(model_factory: Factory) -> None:
    model = model_factory(vocab_size=6000, output_dim=None, chunk_size=2)
    one_position = 8 * 64 * 6000 * 4
    limit = max(MIN_TRACE_BYTES, weight_bytes(model))
    assert one_position > limit
    trace = record(TorchSource.of(model), list(make_ids(8, 128, high=6000)), steps=64)
    assert trace.streams == 8
    assert list(trace.positions) == [1]
    assert trace.outputs["outputs"].nbytes == one_position
    assert recorded_bytes(trace) - one_position <= limit // 2


def test_large_states_are_kept_for_fewer_streams(model_factory: Factory) -> None:
    model = model_factory(num_states=64, d_model=64, num_layers=1)
    trace = record(TorchSource.of(model), list(make_ids(32, 40)), steps=24)
    limit = max(MIN_TRACE_BYTES, weight_bytes(model))
    assert 2 * MAX_SAMPLED * model.spec(32).state_nbytes > limit
    assert recorded_bytes(trace) <= limit
    assert trace.streams == 32
    assert MIN_SAMPLED <= len(trace.sampled) < MAX_SAMPLED
    assert MIN_STATE_STREAMS <= trace.state_streams < 32
    assert (trace.sampled[0], trace.sampled[-1]) == (0, 23)
    assert_is_stepping_by_hand(model, trace)


@pytest.mark.parametrize("steps", [8, 64, 200, 4096])
def test_the_states_of_two_streams_are_known_at_eight_steps_at_least(steps: int) -> None:
    """Of a model of 24 MB whose state is 0.5 MB a lane: one stream at two steps says nothing of the others."""
    source = TorchSource.of(SimpleNSM(vocab_size=256, d_model=384, num_layers=2, num_states=32))
    spec, limit = source.spec(8), source.parameters * 4
    positions, streams, sampled = kept_of(spec, 8, steps, 256, limit)
    assert MIN_STATE_STREAMS <= streams <= 8
    assert MIN_SAMPLED <= len(sampled) <= MAX_SAMPLED
    assert (sampled[0], sampled[-1]) == (0, steps - 1)
    states = 2 * streams * len(sampled) * spec.state_nbytes // 8
    assert states <= limit
    outputs = 8 * steps * 256 * 4 * len(positions)
    assert outputs + states <= limit or len(positions) == 1


@pytest.mark.parametrize(("numbers", "streams", "samples"), [(200_000, 2, 8), (800_000, 1, 10), (4_000_000, 1, 2)])
def test_states_do_not_make_a_trace_huge(numbers: int, streams: int, samples: int) -> None:
    """A cache of 0.8, 3.2 and 16 MB a lane, of a model that is smaller than that."""
    cache = StateSpec("0.cache", (8, numbers), "float32")
    entry = replace(fake_spec(8, entries=("step",)).entry("step"), reads=("0.cache",), writes=("0.cache",))
    spec = StepSpec((entry,), (cache,), CHUNK, 8)
    _, kept, sampled = kept_of(spec, 8, 64, OUTPUTS, MIN_TRACE_BYTES)
    assert (kept, len(sampled)) == (streams, samples)
    assert (sampled[0], sampled[-1]) == (0, 63)
    assert 2 * kept * len(sampled) * cache.nbytes // 8 <= MAX_EXTRA_BYTES


@pytest.mark.parametrize(("steps", "count"), [(1, 1), (2, 2), (8, 8), (9, 8), (64, 16), (4096, 2), (4096, 16)])
def test_sampled_steps_are_as_many_as_asked_for_and_never_closer_later(steps: int, count: int) -> None:
    sampled = log_spaced(steps, count)
    assert len(sampled) == count
    assert (sampled[0], sampled[-1]) == (0, steps - 1)
    gaps = np.diff(sampled)
    assert (gaps >= 1).all()
    assert (gaps[1:] >= gaps[:-1] - 1).all()  # but for rounding


# -- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("count", "steps"), [(0, 5), (1, 0), (2, -3)])
def test_nothing_to_record_is_refused(model: SimpleNSM, count: int, steps: int) -> None:
    with pytest.raises(InputError, match=f"at least one sequence and one step; given {count} and {steps}"):
        record(TorchSource.of(model), list(make_ids(count, 16)), steps=steps)


@pytest.mark.parametrize("sequence", [np.empty(0, np.int64), np.array(3)])
def test_a_sequence_without_tokens_is_refused(model: SimpleNSM, sequence: Array) -> None:
    with pytest.raises(InputError, match=r"at least one token; given shape|The model takes sequences of"):
        record(TorchSource.of(model), [sequence], steps=2)


@pytest.mark.parametrize(
    "sequence",
    [
        np.zeros((16, 2), np.int64),
        np.zeros(16, np.float32),
        np.zeros(16, bool),
        np.array(["a", "b"]),
    ],
)
def test_sequences_the_model_does_not_take_are_refused(model: SimpleNSM, sequence: Array) -> None:
    with pytest.raises(InputError, match=r"The model takes sequences of int64 \['T'\]; given"):
        record(TorchSource.of(model), [sequence], steps=2)


@pytest.mark.parametrize("sequence", [np.zeros((16, 4), np.float32), np.zeros(16, np.float32), np.zeros((16, 3), int)])
def test_vectors_of_another_kind_are_refused(model_factory: Factory, sequence: Array) -> None:
    model = model_factory(vocab_size=None, input_dim=3)
    with pytest.raises(InputError, match=r"The model takes sequences of float32 \['T', 3\]; given"):
        record(TorchSource.of(model), [sequence], steps=2)


def test_one_bad_sequence_among_good_ones_is_refused(model: SimpleNSM) -> None:
    with pytest.raises(InputError, match=r"given .*float64\[16\]"):
        record(TorchSource.of(model), [np.zeros(16, np.int64), np.zeros(16, np.float64)], steps=2)


@pytest.mark.parametrize("token", [20, -1])
def test_ids_outside_the_vocabulary_are_refused(model: SimpleNSM, token: int) -> None:
    with pytest.raises(InputError, match=r"Token ids must lie in 0 \.\. 19"):
        record(TorchSource.of(model), [np.array([0, 1, token])], steps=2)


def test_a_wrong_number_of_tokens_per_call_is_refused(model: SimpleNSM) -> None:
    with pytest.raises(InputError, match=r"multiple of the model's chunk of 8 tokens; given 12\. Take 16"):
        record(TorchSource.of(model), list(make_ids(1, 16)), steps=2, tokens_per_call=12)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@torch.no_grad()
def test_a_reference_that_is_not_finite_is_refused(model_factory: Factory, value: float) -> None:
    model = model_factory()
    next(model.embed.parameters())[7] = value
    with pytest.raises(NonFiniteError, match=r"The reference produces NaN or infinity .* on lanes \[0\]"):
        record(TorchSource.of(model), [np.arange(20)], steps=4)


# -- made-up sequences -----------------------------------------------------------------------------------------------


def test_made_up_ids_cover_the_vocabulary_and_can_be_made_again(model: SimpleNSM) -> None:
    made = synthetic(TorchSource.of(model), 3, 400)
    assert [item.shape for item in made] == [(400,)] * 3
    assert set(np.concatenate(made).tolist()) == set(range(20))
    assert not np.array_equal(made[0], made[1])
    np.testing.assert_array_equal(made, synthetic(TorchSource.of(model), 3, 400))
    assert not np.array_equal(made, synthetic(TorchSource.of(model), 3, 400, seed=1))


def test_made_up_vectors_are_standard_normal(model_factory: Factory) -> None:
    made: list[Any] = synthetic(TorchSource.of(model_factory(vocab_size=None, input_dim=3)), 2, 1000)
    assert [(item.shape, item.dtype) for item in made] == [((1000, 3), np.float32)] * 2
    assert abs(float(made[0].mean())) < 0.1
    assert abs(float(made[0].std()) - 1) < 0.1


class OnlyWeights(Perturbation):
    """A perturbation that leaves inputs and states alone."""

    def runtime(self, runtime: Runtime) -> Runtime:
        return runtime


def test_the_weights_of_a_perturbed_reference_are_perturbed(model: SimpleNSM) -> None:
    source = TorchSource.of(model)
    tokens = make_ids(1, 8)
    found = []
    for perturbation in (None, OnlyWeights(0), OnlyWeights(1)):
        with source.reference(source.spec(1), perturbation) as session:
            found.append(session.step(np.asarray(tokens)[:, : session.spec.entry("step").tokens])["outputs"])
    for other in found[1:]:
        assert (other != found[0]).any(), "nothing was perturbed"
        np.testing.assert_allclose(other, found[0], rtol=1e-4, atol=1e-5)
    assert (found[1] != found[2]).any(), "every draw is another one"


def test_the_weights_of_a_perturbed_graph_are_perturbed_and_its_small_constants_are_not() -> None:
    weights = {"w": np.full((8, 8), 0.3, np.float32), "scales": np.full(4, 0.3, np.float32)}
    tensors = [numpy_helper.from_array(value, name) for name, value in weights.items()]
    given = helper.make_model(helper.make_graph([], "g", [], [], tensors))
    foreign = Foreign(given, Port("x", (1, 8), "float32"), (), (), False)
    perturbed = foreign.perturbed(Perturbation(0)).model
    found = {tensor.name: numpy_helper.to_array(tensor) for tensor in perturbed.graph.initializer}
    assert 0 < np.abs(found["w"] / weights["w"] - 1).max() < 2e-7
    np.testing.assert_array_equal(found["scales"], weights["scales"])
    np.testing.assert_array_equal(numpy_helper.to_array(given.graph.initializer[0]), weights["w"])
