"""Each baseline as ONNX graphs with static shapes: the same numbers as in PyTorch, over a stream of calls."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator

import numpy as np
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from nsm.baselines.base import CausalLM
from nsm.models.base import State
from nsm.spec import COUNT, StepSpec

TOLERANCE = 1e-5


class Entry(nn.Module):
    """An entry with its inputs and states by place."""

    def __init__(self, model: CausalLM, spec: StepSpec, name: str) -> None:
        super().__init__()
        self.model, self.spec, self.name = model, spec, name

    def forward(self, *values: Tensor) -> tuple[Tensor, ...]:
        inputs = self.spec.entry(self.name).inputs
        named = {item.name: value for item, value in zip(inputs, values, strict=False)}
        state = dict(zip(self.spec.state_names, values[len(inputs) :], strict=True))
        outputs, updates = self.model.graph(self.name, named, state)
        return (outputs["outputs"], *(updates[name] for name in self.spec.state_names))


@pytest.fixture
def quiet() -> Iterator[None]:
    """What the exporter warns of concerns its own use of torch."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    logger.setLevel(level)


def open_entry(model: CausalLM, spec: StepSpec, name: str) -> onnxruntime.InferenceSession:
    entry = spec.entry(name)
    length = entry.inputs[0].shape[1]
    program = torch.onnx.export(
        Entry(model, spec, name).eval(),
        (
            *(torch.ones(item.shape, dtype=torch.int64) for item in entry.inputs),
            *model.initial_state(spec.batch).values(),
        ),
        dynamo=True,
        opset_version=20,
        input_names=[*(item.name for item in entry.inputs), *(state.past for state in spec.states)],
        output_names=["outputs", *(state.present for state in spec.states)],
        verbose=False,
    )
    assert program is not None
    session = onnxruntime.InferenceSession(program.model_proto.SerializeToString(), providers=["CPUExecutionProvider"])
    expected = {item.name: item.shape for item in (*entry.inputs, *entry.outputs)}
    expected |= {state.past: state.shape for state in spec.states}
    expected |= {state.present: state.present_shape(length) for state in spec.states}
    found = {item.name: tuple(item.shape) for item in (*session.get_inputs(), *session.get_outputs())}
    assert found == expected
    return session


def write(spec: StepSpec, state: dict[str, np.ndarray], given: list[np.ndarray], valid: list[int]) -> None:
    """What whoever runs a graph does with the states that come out of it."""
    before = state.get(COUNT)
    for declared, value in zip(spec.states, given, strict=True):
        if declared.append_axis is None:
            state[declared.name] = value
            continue
        assert declared.append_axis == 2
        assert before is not None
        for lane, count in enumerate(valid):
            for turn in range(count):
                row = (int(before[lane]) + turn) % declared.shape[2]
                state[declared.name][lane, :, row] = value[lane, :, turn]


@torch.no_grad()
@pytest.mark.usefixtures("quiet")
@pytest.mark.parametrize("batch", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_the_graphs_are_the_model_over_a_stream_of_calls(model: CausalLM, batch: int) -> None:
    model = type(model)(**model.config).eval()
    spec = model.spec(batch)
    sessions = {entry.name: open_entry(model, spec, entry.name) for entry in spec.entries}
    expected: State = model.initial_state(batch)
    state = {name: value.numpy().copy() for name, value in expected.items()}
    generator = np.random.default_rng(0)
    for call in range(12):
        entry = spec.entries[call % 3 == 2]
        length = entry.inputs[0].shape[1]
        valid = [length] if batch == 1 else generator.integers(0, length + 1, batch).tolist()
        inputs = {"tokens": generator.integers(0, 20, (batch, length))}
        if batch > 1:
            inputs["valid"] = np.array(valid)
        named = {declared.past: state[declared.name] for declared in spec.states}
        outputs, *given = sessions[entry.name].run(None, {**inputs, **named})
        tensors = {name: torch.from_numpy(value) for name, value in inputs.items()}
        wanted, expected = model.call(entry.name, tensors, expected)
        write(spec, state, given, valid)
        for lane, count in enumerate(valid):
            np.testing.assert_allclose(outputs[lane, :count], wanted["outputs"][lane, :count], TOLERANCE, TOLERANCE)
        for name, value in expected.items():
            np.testing.assert_allclose(state[name], value, TOLERANCE, TOLERANCE, err_msg=name)
