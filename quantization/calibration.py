"""Calibration on rollouts: the ranges of activations on states that really occur.

The fp32 graph runs over the user's sequences. At calls spread over the age of the streams, from the first after a reset
on, the inputs of every linear op are observed, with the state that the stream has then. Random states are not offered:
if a state is the direct input of a linear op, their ranges would be far off. (If it is normalized first, as in the NSM,
they make no difference; examples/calibration.py measures it.)
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort

from nsm.errors import NonFiniteError, UnsupportedError
from nsm.quantization.calibration_data import Asymmetric, Calibration
from nsm.quantization.linear_ops import LinearOp, linear_ops_of
from nsm.quantization.policy import LEVELS
from nsm.quantization.preconditions import MAX_STEPS, check_bounded, check_enough, size_of
from nsm.runtimes import Progress
from nsm.runtimes.session import Session
from nsm.spec import VALID, StepSpec
from nsm.trace import Array, Arrays

AGES = 12
"""Number of observed calls per stream, log-spaced from the first to the last."""
_KEPT = 4096
"""Number of values kept of an activation per call, in addition to its minimum and maximum."""
_SHARES: tuple[float, ...] = tuple(np.linspace(0.3, 1.0, 71).tolist())
"""Fractions of a range to try as its end: clipping a few values gives the others finer levels."""
_GAIN = 0.8
"""Ratio of the squared errors of uint8 and int8 below which a zero point is worth its cost."""


def calibrate(
    graph: Path, session: Session, sequences: Sequence[Array], progress: Progress | None = None
) -> Calibration:
    """Run a session over sequences, and observe the linear ops of its graph `step`.

    Args:
        graph: the fp32 `step.onnx`.
        session: over the same graph.
        sequences: [T] ids or [T, input_dim] vectors each; shorter than a call is too short.
        progress: called after every call.

    Raises:
        InputError: the sequences are too few or too short; see `nsm.quantization.preconditions.check_enough`.
        NonFiniteError: the fp32 model itself gives NaN or infinity.
        UnsupportedError: the states explode, so that no range holds for long.
    """
    check_enough(sequences, session.spec.entry("step").inputs[0].shape[1])
    ranges: dict[str, Range] = {}
    ages: set[int] = set()
    shares: list[float] = []
    calls, streams = 0, 0
    for call in rollouts(session, sequences, progress):
        if not ranges:
            watched = Watched(graph)
            ranges = {linear_op.key: Range() for linear_op in watched.linear_ops}
        for key, values in watched(call.feeds).items():
            ranges[key].add(values)
        ages.add(call.age)
        shares += call.occupancy
        calls += 1
        streams = max(streams, call.streams)
    occupancy = (min(shares), max(shares)) if shares else None
    return Calibration(*levels_of(ranges), streams, calls, tuple(sorted(ages)), occupancy)


@dataclass(frozen=True)
class Call:
    """A call to examine: the inputs of the graph, states included, and the positions of the streams."""

    feeds: Arrays
    age: int
    occupancy: list[float]
    streams: int


def rollouts(session: Session, sequences: Sequence[Array], progress: Progress | None = None) -> Iterator[Call]:
    """Calls spread over the age of streams, each with the state that its streams have there.

    Lanes end together, so sequences of like lengths are rolled together. A stream ends at the model's capacity.
    """
    entry = session.spec.entry("step")
    length = entry.inputs[0].shape[1]
    most = MAX_STEPS if session.spec.capacity is None else min(MAX_STEPS, session.spec.capacity // length)
    long = [sequence[: len(sequence) // length * length] for sequence in sequences if len(sequence) >= length]
    long.sort(key=len, reverse=True)
    groups = [long[start : start + session.batch] for start in range(0, len(long), session.batch)]
    done, seen = 0, 0
    total = sum(min(most, min(map(len, group)) // length) for group in groups)
    for group in groups:
        lanes = [group[lane % len(group)] for lane in range(session.batch)]
        seen += len(group)
        steps = min(most, min(map(len, group)) // length)
        wanted = {int(step) - 1 for step in np.geomspace(1, steps, AGES).round()}
        session.reset()
        sizes = []
        for step in range(steps):
            tokens = np.stack([lane[step * length : (step + 1) * length] for lane in lanes])
            if step in wanted:
                state = session.read_state()
                sizes.append(size_of(state))
                yield Call(_feeds(session.spec, tokens, state), step, _occupancy(state, len(group)), seen)
            try:
                session.step(tokens)
            except NonFiniteError:
                check_bounded(sizes, step)  # says more than that a number became infinite
                raise
            done += 1
            if progress is not None:
                progress(done, total)
        check_bounded(sizes, steps)


class Watched:
    """The graph `step`, with the inputs of its linear ops as outputs: feeds -> values by the linear op's key.

    A matrix that several linear ops share, as in a call of several chunks, has the inputs of all of them.
    """

    def __init__(self, graph: Path) -> None:
        model = onnx.load(str(graph))
        self.linear_ops: list[LinearOp] = linear_ops_of(model)
        if not self.linear_ops:
            raise UnsupportedError(
                "The model has no linear op with constant weights, so there is nothing to quantize. Keep fp32."
            )
        outputs = list(dict.fromkeys(linear_op.activation for linear_op in self.linear_ops))
        del model.graph.output[:]
        model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in outputs)
        options = ort.SessionOptions()
        options.log_severity_level = 3
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "watched.onnx"
            onnx.save(model, str(path), save_as_external_data=True, location="weights.bin")
            self._session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        self._outputs = outputs
        self._inputs = {value.name for value in self._session.get_inputs()}

    def __call__(self, feeds: Arrays) -> Arrays:
        given = self._session.run(self._outputs, {name: feeds[name] for name in self._inputs})
        values = dict(zip(self._outputs, given, strict=True))
        shared: dict[str, list[Array]] = {}
        for linear_op in self.linear_ops:
            shared.setdefault(linear_op.key, []).append(values[linear_op.activation].ravel())
        return {key: np.concatenate(parts) for key, parts in shared.items()}


class Range:
    """Observed range of one activation."""

    def __init__(self) -> None:
        self._low, self._high = 0.0, 0.0
        self._kept: list[Array] = []
        self._generator = np.random.default_rng(0)

    def add(self, values: Array) -> None:
        """Observe the values of a call.

        Raises:
            NonFiniteError: one is NaN or infinite.
        """
        flat = values.ravel()
        if not np.isfinite(flat).all():
            raise NonFiniteError(
                "The fp32 model gives NaN or infinite activations on the calibration sequences. Check the weights and "
                "the sequences."
            )
        self._low = min(self._low, float(flat.min(initial=0.0)))
        self._high = max(self._high, float(flat.max(initial=0.0)))
        self._kept.append(flat if len(flat) <= _KEPT else self._generator.choice(flat, _KEPT, replace=False))

    def scale(self) -> float:
        """The scale with the least mean squared error on the observed values; 1 for an activation that is almost zero.

        The scale must be a normal float32: division by a subnormal one gives NaN in OpenVINO.
        """
        if self._nothing:
            return 1.0
        values, largest = self._values(), self._largest
        return min((share * largest / LEVELS for share in _SHARES), key=lambda scale: _signed_error(values, scale))

    def asymmetric(self, scale: float) -> Asymmetric | None:
        """Scale and zero point of an asymmetric uint8; None if an int8 with this scale is almost as good.

        The search moves each end of the range in turn to minimize the mean squared error. Zero stays exact.
        """
        if self._nothing:
            return None
        values = self._values()
        low, high = self._low, self._high
        for _ in range(2):
            high = min((share * self._high for share in _SHARES), key=lambda end: _error(values, _between(low, end)))
            low = min((share * self._low for share in _SHARES), key=lambda end: _error(values, _between(end, high)))
        best = _between(low, high)
        return best if _error(values, best) < _GAIN * _signed_error(values, scale) else None

    @property
    def _largest(self) -> float:
        return max(-self._low, self._high)

    @property
    def _nothing(self) -> bool:
        return bool(0.3 * self._largest / 255 < np.finfo(np.float32).tiny)

    def _values(self) -> Array:
        return np.concatenate(self._kept)


def levels_of(ranges: Mapping[str, Range]) -> tuple[dict[str, float], dict[str, Asymmetric]]:
    """The int8 scale of each activation, and the uint8 parameters of those that lose less with them."""
    scales = {key: found.scale() for key, found in ranges.items()}
    asymmetric = {key: best for key, found in ranges.items() if (best := found.asymmetric(scales[key])) is not None}
    return scales, asymmetric


def _signed_error(values: Array, scale: float) -> float:
    """Mean squared error of int8 without a zero point."""
    return float(np.mean(np.square(values - scale * np.clip(np.rint(values / scale), -LEVELS, LEVELS))))


def _between(low: float, high: float) -> Asymmetric:
    """From the number at `low` or next to it to the one at `high`, zero among them."""
    scale = float(high - low) / 255
    return Asymmetric(scale, int(np.clip(np.rint(-low / scale), 0, 255)))


def _error(values: Array, levels: Asymmetric) -> float:
    """Mean squared error of uint8."""
    numbers = np.clip(np.rint(values / levels.scale) + levels.zero, 0, 255) - levels.zero
    return float(np.mean(np.square(values - levels.scale * numbers)))


def _feeds(spec: StepSpec, tokens: Array, state: Arrays) -> Arrays:
    entry = spec.entry("step")
    feeds = {entry.inputs[0].name: tokens.astype(entry.inputs[0].numpy_dtype)}
    counted = entry.input(VALID)
    if counted is not None:
        feeds[VALID] = np.full(counted.shape, tokens.shape[1], counted.numpy_dtype)
    return feeds | {item.past: state[item.name] for item in spec.states_of(entry.reads)}


def _occupancy(state: Arrays, streams: int) -> list[float]:
    masks = [value[:streams] for name, value in state.items() if name.endswith(".mask")]
    return [float(lane.mean()) for mask in masks for lane in mask]
