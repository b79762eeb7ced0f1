"""TorchStep: a module as a `Step` for the examination, with access to its hidden values."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from nsm.adapters.kept import Kept
from nsm.adapters.model import AdaptedModel
from nsm.adapters.validate import OFFLINE_TOLERANCE, Advice, Results, close, examine
from nsm.errors import ConfigError
from nsm.spec import TensorSpec
from nsm.trace import Array, Arrays

Offline = Callable[[Tensor], Tensor]
"""Whole sequences [1, T, *token] -> the main output [1, T, ...]."""

_SEEDS = 4
ADVICE = Advice(
    samples="If it takes others, give as_step a few real sequences to examine it on: samples=[...], [T, *token] each.",
    length="If it only ever takes a fixed number of tokens, let these be one token: timed=False, token_shape=(T, ...).",
    lanes="(Carried(..., lane_axis=N) says where lanes are; a module for one stream has states with lane_axis=None.)",
    state="Make it a state: an argument of forward that is returned, new, and not written in place.",
    random="Dropout has no place in eval mode: pass training=self.training to its function. Other random numbers come "
    "from outside: make them an input.",
    offline="Give as_step the model's forward over whole sequences: offline=lambda x: ...",
)


class TorchStep:
    """See `nsm.adapters.validate.Step` and `Keeps`.

    Args:
        model: the module in the form of a step model.
        offline: the model's own forward, where it was given.
        kind: its name in messages (default: the module's class).
        advice: remedies for faults (default: for as_step).
        inside: name of the submodule that is all of it, and is not named in messages.
        known: the name and forward of a known model inside, where it was not. The step is compared with it if both give
            the same for the first token; else the step computes something else on purpose.
    """

    timed: bool
    chunk: int

    def __init__(
        self,
        model: AdaptedModel,
        offline: Offline | None = None,
        kind: str | None = None,
        advice: Advice = ADVICE,
        inside: str = "",
        known: tuple[str, Offline] | None = None,
    ) -> None:
        self._model, self._offline, self._known, self._inside = model, offline, known, f"{inside}."
        self._kept = Kept(model.module)
        self._written: dict[str, None] = {}
        self._suspects: dict[str, None] = {}
        self.kind = kind or type(model.module).__name__
        self.inputs: Sequence[TensorSpec] = (model.token_spec,)
        self.outputs: Sequence[str] = model.outputs
        self.timed, self.chunk = model.timed, model.chunk_size
        fixed = [state.name for state in model.carried if state.lane_axis is None]
        self.lanes = 1 if fixed else None
        self.why = f"its states {fixed} have no axis for streams" if fixed else ""
        self.size = sum(p.numel() for p in model.parameters())
        self.capacity = model.capacity
        if known is not None:
            found = f"The offline run is that of {known[0]}, found inside. For a step that departs from it on purpose, "
            advice = replace(advice, departs=f"{found}give offline=False, or another offline=lambda x: ...")
        self.advice = advice

    def initial(self, lanes: int) -> Arrays:
        return {name: value.detach().numpy().copy() for name, value in self._model.initial_state(lanes).items()}

    def __call__(self, inputs: Mapping[str, Any], state: Arrays) -> Results:
        (tokens,) = (torch.from_numpy(np.array(value)) for value in inputs.values())
        given = {name: torch.from_numpy(np.array(value)) for name, value in state.items()}
        versions = {name: value._version for name, value in (("x", tokens), *given.items())}
        try:
            with torch.no_grad():
                outputs, after = self._model.run(tokens, given)
        except ConfigError:
            raise
        except Exception as error:  # whatever a module raises
            shapes = {name: list(value.shape) for name, value in given.items()}
            found = "; ".join(self._suspects)
            raise ConfigError(
                f"{self.kind} fails on tokens of shape {list(tokens.shape)} (lanes, tokens, ...) and states of shapes "
                f"{shapes} (lanes first): {type(error).__name__}: {error}. Do token_shape, timed and the states fit it?"
                f"{f' ({found}.)' if found else ''}"
            ) from error
        self._written |= {
            name: None for name, value in (("x", tokens), *given.items()) if value._version != versions[name]
        }
        if self._written:
            self._model.copies = True
        if len(outputs) != len(self.outputs):
            raise ConfigError(f"The module gave {len(outputs)} outputs; named are {list(self.outputs)}. Name them all.")
        named = zip(self.outputs, outputs, strict=True)
        return (
            {name: _array(f"output {name}", value) for name, value in named},
            {name: _array(f"state {name}", value) for name, value in after.items()},
        )

    def offline(self, inputs: Arrays) -> Arrays | None:
        if self._offline is None:
            return self._known_offline(inputs)
        (tokens,) = (torch.from_numpy(value) for value in inputs.values())
        with torch.no_grad():
            given: Any = self._offline(tokens)
        if not isinstance(given, Tensor):
            raise ConfigError(
                f"offline gave a {type(given).__name__} for sequences {list(tokens.shape)}; expected a tensor, the "
                f"main output {self.outputs[0]} [1, T, ...]: offline=lambda ids: model(ids).logits"
            )
        return {self.outputs[0]: given.numpy()}

    def _known_offline(self, inputs: Arrays) -> Arrays | None:
        """The outputs of the known model inside; None where the step does not give the same for the first token."""
        if self._known is None:
            return None
        ((name, tokens),) = inputs.items()
        outputs, _ = self({name: tokens[:, :1]}, self.initial(1))
        main = self.outputs[0]
        try:
            with torch.no_grad():
                given = self._known[1](torch.from_numpy(tokens)).numpy()
        except Exception:  # whatever a library raises: nothing was promised about it
            return None
        first = given[:, :1].astype(outputs[main].dtype)
        return {main: given} if close(outputs[main], first, OFFLINE_TOLERANCE) else None

    # -- hidden values -----------------------------------------------------------------------------------------------

    def kept(self) -> Mapping[str, str]:
        return {name.removeprefix(self._inside): value for name, value in self._kept.digests().items()}

    def scramble(self, names: Sequence[str]) -> bool:
        return self._kept.scramble([*names, *(self._inside + name for name in names)])

    def put_back(self) -> None:
        self._kept.put_back()

    def lend(self, names: Sequence[str]) -> None:
        self._model.lend(self._kept.where([*names, *(self._inside + name for name in names)]))

    def written(self) -> list[str]:
        return list(self._written)

    def suspects(self) -> list[str]:
        return list(self._suspects)

    def drawn(self, inputs: Arrays, state: Arrays) -> list[str] | None:
        names: dict[str, None] = {}
        before: list[tuple[str, bytes]] = []

        def enter(name: str) -> Callable[..., None]:
            return lambda *_: before.append((name, _generators()))

        def leave(*_: Any) -> None:
            name, generators = before.pop()
            if generators != _generators() and not any(drawer.startswith(name) for drawer in names):
                names[name] = None

        parts = [
            (name.removeprefix(self._inside), part)
            for name, part in self._model.module.named_modules()
            if name and f"{name}." != self._inside
        ]
        hooks = [part.register_forward_pre_hook(enter(name)) for name, part in parts]
        hooks += [part.register_forward_hook(leave) for _, part in parts]
        first = _generators()
        try:
            self(inputs, state)
        finally:
            for hook in hooks:
                hook.remove()
        if first == _generators():
            return None
        results = []
        for seed in range(_SEEDS):
            _seed(seed)
            results.append(self(inputs, state))
        same = all(
            np.array_equal(value, results[0][place][name])
            for given in results
            for place in (0, 1)
            for name, value in given[place].items()
        )
        kinds = dict(parts)
        return None if same else [f"{name} ({type(kinds[name]).__name__})" for name in names]

    @contextlib.contextmanager
    def examining(self) -> Iterator[None]:
        """In eval mode; at the end modes, hidden values and generators are restored."""
        modes = [(part, part.training) for part in self._model.modules()]
        generators = torch.get_rng_state(), random.getstate(), np.random.get_state()  # noqa: NPY002 - modules draw from it
        self._model.eval()
        hooks = [
            part.register_forward_pre_hook(self._suspect(name, part))
            for name, part in self._model.module.named_modules()
            if isinstance(part, _BatchNorm) and (part.running_mean is None or part.training)
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
            for part, training in modes:
                part.training = training
            self._kept.put_back()
            torch.set_rng_state(generators[0])
            random.setstate(generators[1])
            np.random.set_state(generators[2])  # noqa: NPY002 - modules draw from it

    def _suspect(self, name: str, part: nn.Module) -> Callable[..., None]:
        why = "is in train mode" if part.training else "has no running statistics"
        phrase = f"{name or 'the module'} ({type(part).__name__}) {why}: it normalises over the streams of a call"
        return lambda *_: self._suspects.update({phrase: None})


def examine_model(model: AdaptedModel, step: TorchStep, samples: Sequence[Array] = ()) -> None:
    """Examine a module, and declare the results; see `nsm.adapters.validate.examine`."""
    with step.examining():
        found = examine(step, samples)
    model.declare(found)


def _array(what: str, value: Tensor) -> Array:
    """A result as an array of its own."""
    try:
        return value.detach().numpy().copy()
    except TypeError as error:  # bfloat16 and the like
        raise ConfigError(f"The {what} is {value.dtype}; expected float32. Convert it: .float()") from error


def _generators() -> bytes:
    """The state of all generators that a module may draw from."""
    drawn: Any = np.random.get_state()  # noqa: NPY002 - modules draw from it
    numbers = torch.get_rng_state().numpy().tobytes() + drawn[1].tobytes()
    return bytes(numbers) + repr((drawn[2], random.getstate())).encode()


def _seed(seed: int) -> None:
    torch.default_generator.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002 - modules draw from it
