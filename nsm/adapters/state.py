"""A state as a module has it, and as a step model carries it: with the lanes first."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nsm.arguments import whole
from nsm.errors import ConfigError
from nsm.spec import StateSpec

# A model is float32, or float64 for the while that its rounding is measured.
_DTYPES = {
    torch.float32: "float32",
    torch.float64: "float32",
    torch.int64: "int64",
    torch.int32: "int32",
    torch.bool: "bool",
}


@dataclass(frozen=True)
class Carried:
    """One state of a foreign module.

    Args:
        name: how it is called in a bundle.
        initial: its value before the first step, of one lane, in the module's own layout. A parameter or buffer of the
            module, or a view of one (`module.start[:1]`), is read again at export, so that
            training until then counts. Any other tensor (`torch.tanh(module.start)`) is copied now.
        lane_axis: the axis of the lanes there, of size 1 in `initial`; None where it has none, so that one lane is all
            there can be.
    """

    name: str
    initial: Tensor
    lane_axis: int | None = 0

    def __post_init__(self) -> None:
        if not self.name:
            raise ConfigError("A state needs a name.")
        given: Any = self.initial
        if not isinstance(given, Tensor):
            raise ConfigError(
                f"The initial value of the state {self.name} is of type {type(given).__name__}; expected a tensor. "
                "Of an array torch.from_numpy makes one."
            )
        # A result of other tensors could not be copied with the model. The memory is that of the given tensor, by which
        # `Learned` finds it.
        object.__setattr__(self, "initial", given.detach())
        if self.lane_axis is not None:
            object.__setattr__(self, "lane_axis", whole(f"lane_axis of the state {self.name}", self.lane_axis))
        axis, shape = self.lane_axis, list(self.initial.shape)
        if self.initial.dtype not in _DTYPES:
            known = ", ".join(dict.fromkeys(_DTYPES.values()))
            raise ConfigError(
                f"The state {self.name} is {self.initial.dtype}; a state may be {known}. Convert it, and a module that "
                "computes in low precision, with .float(): what is exported gets its precision by precision=..."
            )
        if axis is not None and (not 0 <= axis < len(shape) or shape[axis] != 1):
            raise ConfigError(
                f"The state {self.name} of shape {shape} is to have its lanes on axis {axis}, which has to be there "
                "and of size 1: give the shape of one stream, and None for a state without an axis for streams."
            )
        if self.initial.is_floating_point() and not bool(torch.isfinite(self.initial).all()):
            raise ConfigError(f"The initial value of the state {self.name} holds NaN or infinity.")

    def spec(self, batch: int) -> StateSpec:
        """As a bundle declares it: lanes first."""
        dtype = _DTYPES[self.initial.dtype]
        return StateSpec(
            self.name, tuple(self.start(batch).shape), dtype, init="learned" if bool(self.initial.any()) else "zeros"
        )

    def start(self, batch: int) -> Tensor:
        """The initial value for so many lanes, lanes first."""
        first = self.out(self.initial)
        return first.expand(batch, *first.shape[1:]).clone()

    def into(self, state: Tensor) -> Tensor:
        """From lanes first to the module's layout."""
        if self.lane_axis is None:
            return state.squeeze(0)
        return state if self.lane_axis == 0 else state.movedim(0, self.lane_axis)

    def out(self, state: Tensor) -> Tensor:
        """From the module's layout to lanes first."""
        if self.lane_axis is None:
            return state.unsqueeze(0)
        return state if self.lane_axis == 0 else state.movedim(self.lane_axis, 0)


@dataclass(frozen=True)
class Learned:
    """A parameter or buffer of a module, or a view of one, that a state starts from.

    `path` is its name in the module; `shape`, `stride` and `offset` are those of the view.
    """

    path: str
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int

    @classmethod
    def find(cls, module: nn.Module, initial: Tensor) -> Learned | None:
        """Where a module has this tensor; None where it has not."""
        for path, value in (*module.named_parameters(), *module.named_buffers()):
            dense = value.is_contiguous() and value.storage_offset() == 0 and value.dtype == initial.dtype
            if dense and value.numel() and value.data_ptr() == initial.untyped_storage().data_ptr():
                return cls(path, tuple(initial.shape), initial.stride(), int(initial.storage_offset()))
        return None

    def read(self, module: nn.Module) -> Tensor:
        """Its value now."""
        owner, _, name = self.path.rpartition(".")
        value: Tensor = getattr(module.get_submodule(owner), name)
        return value.detach().contiguous().as_strided(self.shape, self.stride, self.offset)
