"""What a step model takes, gives and carries, as data: the vocabulary that models, exporters and runtimes share.

    step(inputs, state) -> (outputs, state')

State is an argument and a result. A model declares it as a list of `StateSpec`; an exported graph has one input
and one output for each of them. All shapes are static and include the batch ("lanes") on `batch_axis`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np

from nsm.errors import BundleError

Init = Literal["zeros", "learned"]

# States whose role is one of these are a window of keys and values and take the names other tools know.
_WINDOW_ROLES = ("key", "value")


@dataclass(frozen=True)
class TensorSpec:
    """A named input or output.

    `time_axis` is the axis that runs over the tokens of a call, None where there is none (`valid`).
    `minimum` and `maximum` (both inclusive) bound integer inputs, so that a token id the model has no embedding
    for is refused before it reaches a backend that would read outside its table.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    time_axis: int | None = None
    minimum: int | None = None
    maximum: int | None = None

    @property
    def numpy_dtype(self) -> np.dtype[Any]:
        return np.dtype(self.dtype)


@dataclass(frozen=True)
class StateSpec:
    """One tensor of state.

    Args:
        name: `{layer}.{role}`, for instance `0.bank`.
        shape: static shape, lanes included.
        dtype: numpy name of the element type.
        batch_axis: the axis of the lanes.
        init: "zeros", or "learned" where the initial value is part of the model. Both are stored in a bundle.
        past, present: names of the graph's input and output; derived from `name` unless given. Sorted inputs
            pair with sorted outputs.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    batch_axis: int = 0
    init: Init = "zeros"
    past: str = ""
    present: str = ""

    def __post_init__(self) -> None:
        window = self.name.rsplit(".", 1)[-1] in _WINDOW_ROLES
        if not self.past:
            object.__setattr__(self, "past", ("past_key_values." if window else "past_state.") + self.name)
        if not self.present:
            object.__setattr__(self, "present", ("present." if window else "present_state.") + self.name)

    @property
    def numpy_dtype(self) -> np.dtype[Any]:
        return np.dtype(self.dtype)

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape)) * self.numpy_dtype.itemsize

    def lane_index(self, lane: int) -> tuple[slice | int, ...]:
        """Index of one lane's part, which keeps the batch axis out of the result."""
        return (slice(None),) * self.batch_axis + (lane,)


@dataclass(frozen=True)
class EntrySpec:
    """One exported graph: what it takes and gives besides the states."""

    name: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]

    def input(self, name: str) -> TensorSpec:
        return next(spec for spec in self.inputs if spec.name == name)


@dataclass(frozen=True)
class StepSpec:
    """A step model: its entries (graphs over one set of weights) and the states they all share.

    `chunk_size` is C, the commit period in tokens: token i after a reset belongs to chunk i // C.
    `batch` is the number of lanes.
    """

    entries: tuple[EntrySpec, ...]
    states: tuple[StateSpec, ...]
    chunk_size: int
    batch: int
    family: str = field(default="nsm")

    def entry(self, name: str) -> EntrySpec:
        return next(entry for entry in self.entries if entry.name == name)

    @property
    def state_names(self) -> tuple[str, ...]:
        return tuple(state.name for state in self.states)

    @property
    def state_nbytes(self) -> int:
        """Bytes of carried state, all lanes."""
        return sum(state.nbytes for state in self.states)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> StepSpec:
        """Inverse of `to_json`.

        Raises:
            BundleError: a key is missing, unknown, or of the wrong kind.
        """
        try:
            return cls(
                entries=tuple(
                    EntrySpec(
                        name=entry["name"],
                        inputs=tuple(_tensor(item) for item in entry["inputs"]),
                        outputs=tuple(_tensor(item) for item in entry["outputs"]),
                    )
                    for entry in data["entries"]
                ),
                states=tuple(
                    StateSpec(**{**item, "shape": tuple(int(n) for n in item["shape"])}) for item in data["states"]
                ),
                chunk_size=int(data["chunk_size"]),
                batch=int(data["batch"]),
                family=str(data["family"]),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise BundleError(
                f"The spec in the manifest cannot be read ({type(error).__name__}: {error}). "
                "Was the manifest edited by hand? Export the bundle again."
            ) from error


def _tensor(item: Mapping[str, Any]) -> TensorSpec:
    return TensorSpec(**{**item, "shape": tuple(int(n) for n in item["shape"])})
