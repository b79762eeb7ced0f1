"""AdaptedModel: a foreign module in the form of a step model."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from nsm.adapters.kept import Lent, tensors
from nsm.adapters.state import Carried, Learned
from nsm.adapters.validate import Examination
from nsm.arguments import flag, whole
from nsm.errors import ConfigError, InputError, UnsupportedError
from nsm.models import State, StepModel, check_float32
from nsm.spec import VALID, EntrySpec, StepSpec, TensorSpec

Call = Callable[[Any, Tensor, list[Tensor]], tuple[list[Tensor], list[Tensor]]]
"""(module, x, states) -> (outputs, states), all in the module's own layouts. The module is given, since a model that is
copied has another one."""
Begin = Callable[[Any], list[Tensor]]
"""module -> the initial values of one stream, lanes first, as they are now."""


class AdaptedModel(StepModel):
    """A module whose forward gets its state and gives the next one.

    With a time axis the module takes any number of tokens x [B, T, *token] and gives [B, T, ...]: it gets the entries
    `step`, of K tokens, and `decode`, of one. Without, it takes one token x [B, *token] at a time, a frame of audio
    say, and gives [B, ...]: there is only `step`, with K = 1.

    Args:
        module: not copied: later training is exported. Its mode is kept; if a part is in train mode, the export and
            the reference use a copy in eval mode.
        call: how it is called.
        states: in the order of `call`.
        token: one lane and one token; its name is that of the input.
        outputs: names, the main one first.
        timed: whether there is a time axis.
        chunk_size: K of `step` unless another is asked for, with a time axis.
        capacity: tokens that a stream takes from one reset to the next; None where there is no end, or to find it.
        begin: gives the initial values anew. Without it, one that is a parameter or a buffer of the module, or a view
            of one, is read from it whenever it is needed, and any other is a copy.

    Attributes:
        examination: results of the experiments; see `nsm.adapters.validate`.
        copies: whether the module is handed copies of its arguments, which it writes into.
    """

    examination: Examination

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
        begin: Begin | None = None,
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
        self.module = module
        self.training = module.training
        self.token_spec = token
        self.chunk_size = chunk_size if timed else 1
        self.timed = timed
        self.outputs = tuple(outputs)
        self.lanes = 1 if any(state.lane_axis is None for state in states) else None
        self.copies = False
        self._call, self._begin = call, begin
        self._carried = tuple(states)
        self._learned = [None if begin else Learned.find(module, state.initial) for state in states]
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._why = ""
        self._where: list[tuple[str, Any]] = []
        self._lent = Lent(module, [])
        self.register_buffer("precision", torch.zeros(0))  # of a module without weights
        for index, state in enumerate(states):
            if begin is None and self._learned[index] is None:
                self.register_buffer(f"initial_{index}", state.initial.clone())

    def __deepcopy__(self, memo: dict[int, Any]) -> AdaptedModel:
        """A deep copy, including attributes that Python cannot copy: tensors that are results of others.

        Raises:
            UnsupportedError: something in an attribute of the module cannot be copied.
        """
        for tensor in tensors(self.module):
            if not tensor.is_leaf:
                memo[id(tensor)] = tensor.detach().clone()
        made = type(self).__new__(type(self))
        memo[id(self)] = made
        try:
            made.__dict__.update(copy.deepcopy({**self.__dict__, "_lent": None}, memo))
            made._lent = Lent(made.module, made._where)
        except Exception as error:  # a lock, a file, a generator: whatever Python does not copy
            raise UnsupportedError(
                f"{self.kind} cannot be copied, which an export in eval mode and in float64 needs: "
                f"{type(error).__name__}: {error}. Take what cannot be copied (a lock, a file, a generator) out of the "
                "module's attributes."
            ) from error
        return made

    @property
    def config(self) -> dict[str, Any]:  # type: ignore[override]  # the module may change, so it is not cached
        """Facts that distinguish modules with equal weights, as far as they are known."""
        return {
            "module": repr(self.module),
            "attributes": plain_attributes(self.module),
            "states": [
                [state.name, list(state.initial.shape), state.lane_axis, _digest(state.initial)]
                for state in self.carried
            ],
            "timed": self.timed,
            "chunk_size": self.chunk_size,
            **({} if self.capacity is None else {"capacity": self.capacity}),
        }

    @property
    def kind(self) -> str:
        return type(self.module).__name__

    @property
    def carried(self) -> tuple[Carried, ...]:
        """The states with their initial values as they are now, in the dtype that the module has now."""
        values = [value.detach() for value in self._begin(self.module)] if self._begin else self._initial()
        dtype = self.dtype
        return tuple(
            Carried(state.name, value.to(dtype) if value.is_floating_point() else value, state.lane_axis)
            for state, value in zip(self._carried, values, strict=True)
        )

    def _initial(self) -> list[Tensor]:
        return [
            getattr(self, f"initial_{index}") if learned is None else learned.read(self.module)
            for index, learned in enumerate(self._learned)
        ]

    def check_float32(self) -> None:
        values = self._begin(self.module) if self._begin else self._initial()
        names = [state.name for state in self._carried]
        check_float32(self.module, list(zip(names, values, strict=True)))

    def declare(self, found: Examination) -> None:
        """Take the results of an examination: shapes of the outputs for one lane and token, number of lanes."""
        self.examination = found
        self._shapes = dict(found.shapes)
        self.lanes, self._why = found.lanes, found.why
        self._declared = self.spec(found.lanes or 1)
        main = self._shapes[self.outputs[0]]
        self.output_dim = int(main[-1]) if main else 1

    def lend(self, where: list[tuple[str, Any]]) -> None:
        """From now on, put these attributes back after every call; see `nsm.adapters.kept.Lent`."""
        self._where, self._lent = where, Lent(self.module, where)

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
        states = tuple(state.spec(batch) for state in self.carried)
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
                f"{tokens_per_call} a call. Leave --tokens-per-call out."
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
        given = [one.into(state[one.name]) for one in self._carried]
        if self.copies:
            x, given = x.clone(), [value.clone() for value in given]
        if self._where:
            with self._lent:
                outputs, states = self._call(self.module, x, given)
        else:
            outputs, states = self._call(self.module, x, given)
        for one, value in zip(self._carried, states, strict=True):
            _check_tensor(f"state {one.name}", value)
        for name, value in zip(self.outputs, outputs, strict=False):
            _check_tensor(f"output {name}", value)
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


def _check_tensor(what: str, value: Any) -> None:
    if not isinstance(value, Tensor):
        raise ConfigError(f"The {what} is a {type(value).__name__}; expected a tensor. Do outputs and states fit?")


def _digest(value: Tensor) -> str:
    return hashlib.sha256(value.detach().cpu().contiguous().numpy().tobytes()).hexdigest()[:16]


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
