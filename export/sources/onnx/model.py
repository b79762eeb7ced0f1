"""Foreign: a foreign ONNX graph with its inputs, outputs and states."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import onnx
from onnx import TensorProto, numpy_helper

from nsm.export.graphs import tensors_of
from nsm.export.sources.onnx.file import Port
from nsm.export.sources.onnx.states import GraphState
from nsm.runtimes.parity import Perturbation

_WEIGHTS = 16


@dataclass(frozen=True)
class Foreign:
    """A foreign graph with its inputs, outputs and states.

    Args:
        model: as it was given, with weights; its constants are no inputs any more.
        main: the input that takes tokens.
        answers: the outputs that are not states.
        states: in the order in which they were named.
        timed: whether axis 1 of the main input takes any number of tokens.
        decided: which node decides by the values of the tokens or states; "" where none does.
    """

    model: onnx.ModelProto
    main: Port
    answers: tuple[str, ...]
    states: tuple[GraphState, ...]
    timed: bool
    decided: str = ""

    @property
    def batch(self) -> int | str:
        """The size of the streams' axis: a name where it may be any."""
        return self.main.shape[0]

    @property
    def lanes(self) -> int | None:
        """The only number of streams at a time; None where any will do."""
        if self.decided or any(state.lane_axis is None for state in self.states):
            return 1
        return None if isinstance(self.batch, str) else self.batch

    @property
    def token_shape(self) -> tuple[int, ...]:
        """Of one token; all behind the streams and, where there is one, time."""
        rest = self.main.shape[2 if self.timed else 1 :]
        return tuple(int(size) for size in rest)

    def perturbed(self, perturbation: Perturbation) -> Foreign:
        """Return a copy with perturbed weights: float32 constants of at least `_WEIGHTS` numbers.

        Smaller constants are parts of a formula or of a shape, such as 1.0, an epsilon, or the scales of a Resize.
        """
        model = onnx.ModelProto()
        model.CopyFrom(self.model)
        for tensor in tensors_of(model):
            if tensor.data_type == TensorProto.FLOAT and math.prod(tensor.dims) >= _WEIGHTS:
                tensor.CopyFrom(numpy_helper.from_array(perturbation(numpy_helper.to_array(tensor)), tensor.name))
        return replace(self, model=model)

    def static(self, batch: int, length: int) -> onnx.ModelProto:
        """A copy of the graph whose inputs have these sizes; other shape information is removed."""
        sizes: dict[str, int] = {}
        if isinstance(self.batch, str):
            sizes[self.batch] = batch
        if self.timed:
            sizes[str(self.main.shape[1])] = length
        model = onnx.ModelProto()
        model.CopyFrom(self.model)
        del model.graph.value_info[:]
        for value in model.graph.input:
            for dim in value.type.tensor_type.shape.dim:
                if dim.HasField("dim_param") and dim.dim_param in sizes:
                    dim.dim_value = sizes[dim.dim_param]
        return model
