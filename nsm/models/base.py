"""StepModel: the base class of models that can be exported, checked and run as a stream."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from nsm.errors import ConfigError, InputError
from nsm.spec import StepSpec, TensorSpec

State = dict[str, Tensor]
"""The whole state of B streams, by the names of `StepModel.spec(B).states`."""


class StepModel(nn.Module, ABC):
    """A sequence model whose state is an argument and a result.

    Attributes:
        config: the arguments that make this model again.
        token_spec: one lane and one token: shape () for ids, (input_dim,) for vectors.
        output_dim: width of the outputs.
        chunk_size: C; `step` takes a multiple of it.
        lanes: the only number of lanes the model takes; None where any will do.
    """

    config: dict[str, Any]
    token_spec: TensorSpec
    output_dim: int
    chunk_size: int
    lanes: int | None = None

    @abstractmethod
    def spec(self, batch: int = 1, tokens_per_call: int | None = None, debug_outputs: bool = False) -> StepSpec:
        """The declaration of the exported entries, for so many lanes and tokens a call of `step`.

        `debug_outputs` asks for more outputs, to look inside; a model that has none ignores it.
        """

    @abstractmethod
    def initial_state(self, batch: int = 1) -> State:
        """The state of `batch` streams before their first token. Its learned part carries gradients."""

    @abstractmethod
    def step(self, tokens: Tensor, state: State, valid: Tensor | None = None) -> tuple[Tensor, State]:
        """Take tokens [B, K], K a multiple of C, of which the first `valid` [B] count: outputs and state."""

    def call(self, entry: str, inputs: dict[str, Tensor], state: State) -> tuple[dict[str, Tensor], State]:
        """Run an entry as its graph does: inputs by name -> outputs by name, and the whole state."""
        if entry != "step":
            raise InputError(f"There is no entry {entry!r}. Entries: step.")
        outputs, state = self.step(inputs["tokens"], state, inputs.get("valid"))
        return {"outputs": outputs}, state

    def graph(self, entry: str, inputs: dict[str, Tensor], state: State) -> tuple[dict[str, Tensor], State]:
        """Like `call`, with only the new rows of the states that are appended to (see `StateSpec.append_axis`)."""
        return self.call(entry, inputs, state)

    @property
    def kind(self) -> str:
        """The name of the model in messages."""
        return type(self).__name__

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights: float32, or float64 after `double()`."""
        numbers = (*self.parameters(), *self.buffers())
        return next((value.dtype for value in numbers if value.is_floating_point()), torch.float32)

    def check_float32(self) -> None:
        """Raise `ConfigError` unless the model is in float32, as files and bundles hold it."""
        check_float32(self)

    def check_tokens(self, tokens: Tensor) -> None:
        """Raise `InputError` unless the tokens are [B, T, ...] of this model's kind and in range."""
        spec = self.token_spec
        integer = spec.dtype == "int64"
        shape = ", ".join(["B", "T", *map(str, spec.shape)])
        kind = f"{'ids' if integer else 'vectors' if spec.shape else 'numbers'} [{shape}]"
        dtypes = (torch.int64, torch.int32) if integer else (self.dtype,)
        if tokens.dim() != 2 + len(spec.shape) or tuple(tokens.shape[2:]) != spec.shape or 0 in tokens.shape[:2]:
            raise InputError(f"The model takes {kind}, at least one token; given shape {list(tokens.shape)}.")
        if tokens.dtype not in dtypes:
            raise InputError(f"The model takes {kind} of dtype {dtypes[0]}; given {tokens.dtype}.")
        if integer and not torch.compiler.is_compiling():
            low, high = int(tokens.min()), int(tokens.max())
            if (
                spec.minimum is not None
                and spec.maximum is not None
                and not spec.minimum <= low <= high <= spec.maximum
            ):
                raise InputError(f"Token ids must lie in {spec.minimum} .. {spec.maximum}; given {low} .. {high}.")

    def tokens_input(self, batch: int, count: int) -> TensorSpec:
        """The input `tokens` of an entry that takes `count` tokens a lane."""
        token = self.token_spec
        return TensorSpec("tokens", (batch, count, *token.shape), token.dtype, 1, token.minimum, token.maximum)

    def checked_count(self, tokens_per_call: int | None) -> int:
        """K, a multiple of C (default: C), or `InputError`."""
        count = self.chunk_size if tokens_per_call is None else tokens_per_call
        if count < 1 or count % self.chunk_size:
            raise InputError(
                f"A call takes a multiple of the model's chunk of {self.chunk_size} tokens; given {count}. "
                f"Take {max(1, round(count / self.chunk_size)) * self.chunk_size}."
            )
        return count


Model = TypeVar("Model", bound=StepModel)


def duplicate(model: Model) -> Model:
    """A copy of a model, in which results of other tensors, as training leaves in attributes, are plain tensors.

    Raises:
        ConfigError: it holds something that has no copy.
    """
    try:
        with _CopyOfResults():
            return copy.deepcopy(model)
    except Exception as error:  # whatever an attribute raises
        raise ConfigError(
            f"{model.kind} cannot be copied, which an export does: {type(error).__name__}: {error}. Keep what has no "
            "copy, such as files, locks and generators, outside of the module."
        ) from error


class _CopyOfResults(TorchFunctionMode):
    """Lets `copy.deepcopy` copy tensors that are results of others, which torch refuses."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.__deepcopy__ and not args[0].is_leaf:
            value, memo = args
            return memo.setdefault(id(value), value.detach().clone())
        return func(*args, **(kwargs or {}))


def on_cpu(model: Model) -> Model:
    """The model, or where it lies on another device a copy on the CPU, where models are run and exported."""
    return model if devices(model) <= {"cpu"} else duplicate(model).cpu()


def devices(module: nn.Module) -> set[str]:
    """The kinds of devices that weights and buffers lie on."""
    return {value.device.type for value in (*module.parameters(), *module.buffers())}


def check_float32(module: nn.Module, states: Iterable[tuple[str, Tensor]] = ()) -> None:
    """Raise `ConfigError` unless a module, and its states by name, are in float32.

    Buffers may be finer: a module rounds them where it takes them.
    """
    found = [(f"its weight {name}", value.dtype) for name, value in module.named_parameters()]
    found += [(f"its buffer {name}", v.dtype) for name, v in module.named_buffers() if v.dtype != torch.float64]
    found += [(f"its state {name}", value.dtype) for name, value in states]
    for what, dtype in found:
        if dtype.is_floating_point and dtype != torch.float32:
            raise ConfigError(
                f"{type(module).__name__} is to be saved, exported or run in float32; {what} is {dtype}. Convert it, "
                "and states that you give, with .float(), as in model.float(); a lower precision is asked for at the "
                "export: precision=..."
            )
