"""AdaptedModel: a foreign module in the form of a step model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from nsm.adapters.carried import Carried
from nsm.errors import ConfigError, InputError, UnsupportedError
from nsm.models.step import State, StepModel, check_float32
from nsm.plain import flag, whole
from nsm.spec import VALID, EntrySpec, StepSpec, TensorSpec

Call = Callable[[Any, Tensor, list[Tensor]], tuple[list[Tensor], list[Tensor]]]
"""(module, x, states) -> (outputs, states), all in the module's own layouts. The module is given, since a model that is
copied has another one."""


class AdaptedModel(StepModel):
    """A module whose forward gets its state and gives the next one.

    With a time axis the module takes any number of tokens x [B, T, *token] and gives [B, T, ...]: it gets the entries
    `step`, of K tokens, and `decode`, of one. Without, it takes one token x [B, *token] at a time, a frame of audio
    say, and gives [B, ...]: there is only `step`, with K = 1.

    Args:
        module: put into eval mode.
        call: how it is called.
        states: in the order of `call`.
        token: one lane and one token; its name is that of the input.
        outputs: names, the main one first.
        timed: whether there is a time axis.
        chunk_size: K of `step` unless another is asked for, with a time axis.
        capacity: tokens that a stream takes from one reset to the next; None where there is no end, or to find it.
    """

    def __init__(
        self,
        module: nn.Module,
        call: Call,
        states: Sequence[Carried],
        token: TensorSpec,
        outputs: Sequence[str] = ("outputs",),
        timed: bool = False,
        chunk_size: int = 16,
        capacity: int | None = None,
    ) -> None:
        super().__init__()
        names = [state.name for state in states]
        twice = next((name for name in (*names, *outputs) if [*names, *outputs].count(name) > 1), None)
        if twice is not None:
            raise ConfigError(f"Two of the states and outputs are called {twice}; every one needs a name of its own.")
        if not states:
            raise ConfigError("A step model has at least one state; given none. Name them with states=[...].")
        chunk_size, timed = whole("chunk_size", chunk_size), flag("timed", timed)
        if chunk_size < 1:
            raise ConfigError(f"chunk_size is at least 1; given {chunk_size}.")
        if capacity is not None and (capacity := whole("capacity", capacity)) < 1:
            raise ConfigError(f"capacity is at least 1 token; given {capacity}.")
        check_float32(module, [(state.name, state.initial) for state in states])
        self.capacity = capacity
        self.module = module.eval()
        self.token_spec = token
        self.chunk_size = chunk_size if timed else 1
        self.timed = timed
        self.outputs = tuple(outputs)
        self.lanes = 1 if any(state.lane_axis is None for state in states) else None
        self._call = call
        self._carried = tuple(states)
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._why = ""
        for index, state in enumerate(states):
            self.register_buffer(f"initial_{index}", state.initial.clone())
        # What tells two modules with equal weights apart, as far as it can be told.
        self.config = {
            "module": repr(module),
            "attributes": plain_attributes(module),
            "states": [[state.name, list(state.initial.shape), state.lane_axis] for state in states],
            "timed": timed,
            "chunk_size": self.chunk_size,
        }
        if capacity is not None:
            self.config["capacity"] = capacity
        self.eval()

    @property
    def kind(self) -> str:
        return type(self.module).__name__

    @property
    def carried(self) -> tuple[Carried, ...]:
        """The states, in the dtype that the module has now."""
        return tuple(
            Carried(state.name, getattr(self, f"initial_{index}"), state.lane_axis)
            for index, state in enumerate(self._carried)
        )

    def check_float32(self) -> None:
        check_float32(
            self.module, [(state.name, getattr(self, f"initial_{i}")) for i, state in enumerate(self._carried)]
        )

    def declare(self, shapes: dict[str, tuple[int, ...]], lanes: int | None, why: str = "") -> None:
        """Say what the examination found: the outputs' shapes of one lane and token, and how many lanes it takes."""
        self._shapes = shapes
        self.lanes = lanes
        self._why = why
        self._declared = self.spec(lanes or 1)
        self.output_dim = int(shapes[self.outputs[0]][-1]) if shapes[self.outputs[0]] else 1

    def spec(
        self,
        batch: int = 1,
        tokens_per_call: int | None = None,
        debug_outputs: bool = False,  # noqa: ARG002
    ) -> StepSpec:
        """The entries; see the class. There are no debug outputs.

        Raises:
            UnsupportedError: the module does not take so many lanes.
        """
        if self.lanes is not None and batch != self.lanes:
            raise UnsupportedError(
                f"The module takes {self.lanes} stream at a time: {self._why}. Asked for are {batch} lanes. "
                "Write it for any batch size, or open a session for each stream."
            )
        states = tuple(state.spec(batch) for state in self._carried)
        names = tuple(state.name for state in states)
        counts = {"step": self.checked_count(tokens_per_call)} | ({"decode": 1} if self.timed else {})
        entries = []
        for name, length in counts.items():
            inputs = [self.tokens_input(batch, length)]
            if batch > 1 and length == 1:  # whole calls of several tokens are for all lanes alike
                inputs.append(TensorSpec(VALID, (batch,), "int64", None, 0, 1))
            outputs = tuple(TensorSpec(n, (batch, length, *s), "float32", 1) for n, s in self._shapes.items())
            entries.append(EntrySpec(name, tuple(inputs), outputs, names, names))
        return StepSpec(tuple(entries), states, 1, batch, self.capacity)  # nothing happens at the end of a chunk

    def checked_count(self, tokens_per_call: int | None) -> int:
        """K: any number of tokens with a time axis, else one."""
        if not self.timed and tokens_per_call not in (None, 1):
            raise UnsupportedError(
                f"The module takes one token at a time, of shape {list(self.token_spec.shape)}; asked for are "
                f"{tokens_per_call} a call. Leave --chunk out."
            )
        count = self.chunk_size if tokens_per_call is None else tokens_per_call
        if count < 1:
            raise InputError(f"A call takes at least one token; given {count}.")
        return count

    def initial_state(self, batch: int = 1) -> State:
        return {state.name: state.start(batch) for state in self.carried}

    def step(self, tokens: Tensor, state: State, valid: Tensor | None = None) -> tuple[Tensor, State]:
        """Take tokens [B, K, *token]; with `valid` [B], K is 1 and a lane with 0 keeps its state."""
        outputs, after = self.run(tokens, state, valid)
        return outputs[0], after

    def run(self, tokens: Tensor, state: State, valid: Tensor | None = None) -> tuple[list[Tensor], State]:
        """Like `step`, with all outputs [B, K, ...]."""
        x = tokens if self.timed else tokens.squeeze(1)
        outputs, states = self._call(self.module, x, [one.into(state[one.name]) for one in self._carried])
        after = {one.name: one.out(value) for one, value in zip(self._carried, states, strict=True)}
        if valid is not None:
            after = {name: _where(valid > 0, value, state[name]) for name, value in after.items()}
        return [value if self.timed else value.unsqueeze(1) for value in outputs], after

    def call(self, entry: str, inputs: dict[str, Tensor], state: State) -> tuple[dict[str, Tensor], State]:
        self._declared.entry(entry)
        self.check_tokens(inputs["tokens"])
        outputs, after = self.run(inputs["tokens"], state, inputs.get(VALID))
        return dict(zip(self.outputs, outputs, strict=True)), after

    def forward(self, tokens: Tensor, state: State | None = None, return_state: bool = False) -> Any:
        """Run a sequence [B, T, *token] from `state`, or from the beginning of a stream: the main output, [B, T, ...];
        with `return_state`, and the state after the last token.
        """
        self.check_tokens(tokens)
        state = self.initial_state(len(tokens)) if state is None else state
        parts = []
        for part in [tokens] if self.timed else tokens.split(1, 1):
            outputs, state = self.step(part, state)
            parts.append(outputs)
        result = torch.cat(parts, 1)
        return (result, state) if return_state else result


def plain_attributes(module: nn.Module) -> dict[str, str]:
    """Numbers, flags and names that the parts of a module were made with, which its representation need not show."""
    found = {}
    for place, part in module.named_modules():
        for name, value in vars(part).items():
            if name != "training" and not name.startswith("_") and _is_plain(value):
                found[f"{place}.{name}"] = repr(value)
    return found


def _is_plain(value: object) -> bool:
    if isinstance(value, (tuple, list)):
        return all(_is_plain(item) for item in value)
    if isinstance(value, dict):
        return all(_is_plain(item) for item in (*value, *value.values()))
    return value is None or isinstance(value, (bool, int, float, complex, str, torch.dtype))


def _where(lanes: Tensor, new: Tensor, old: Tensor) -> Tensor:
    lanes = lanes.reshape(-1, *([1] * (new.dim() - 1)))
    if new.dtype == torch.bool:  # ONNX Runtime selects among numbers only
        return (lanes & new) | (~lanes & old)
    return torch.where(lanes, new, old)
