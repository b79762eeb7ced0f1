"""as_step: a torch module that carries state, as a step model."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from nsm.adapters.hidden import check_hidden
from nsm.adapters.keys import by_name, check_order, keyed, taken_apart
from nsm.adapters.known_models import known_forward
from nsm.adapters.model import AdaptedModel, Call
from nsm.adapters.state import Carried
from nsm.adapters.torch_step import Offline, TorchStep, examine_model
from nsm.arguments import each_whole, whole
from nsm.errors import ConfigError, InputError, UnsupportedError
from nsm.models import devices, split_samples
from nsm.spec import TensorSpec

Recurrent = nn.LSTM | nn.GRU | nn.RNN


def as_step(
    module: nn.Module,
    states: Any = None,
    *,
    vocab_size: int | None = None,
    token_shape: Sequence[int] | None = None,
    timed: bool = False,
    outputs: Sequence[str] = ("outputs",),
    chunk_size: int = 16,
    samples: Sequence[ArrayLike] | NDArray[Any] | None = None,
    capacity: int | None = None,
    offline: Offline | Literal[False] | None = None,
) -> AdaptedModel:
    """Make a step model of a torch module, to be exported and checked like our own.

    It takes three kinds of modules:

    1. `nn.LSTM`, `nn.GRU` and `nn.RNN`, of any number of layers: `nsm.as_step(nn.LSTM(40, 128, num_layers=4))`. Tokens
       are vectors [B, T, input_size] whatever `batch_first` says.
    2. Modules with `step(x, state) -> (outputs, state)` and `initial_state(batch) -> state`, where a state is a
       dictionary of tensors with the streams on axis 0. Without a time axis `step` takes one token.
    3. Modules whose forward takes x and states and gives outputs and states, as `forward(x, h, c) -> (y, h, c)` or
       `forward(x, (h, c)) -> (y, (h, c))`: `states` has the arguments behind x, in the same nesting, as `Carried`s,
       which name the axis of streams, or as tensors with one stream on axis 0. Mappings and named tuples that forward
       returns are matched by key: the key under which a state was declared, or its name.

    The module is examined before anything else is done with it, on made-up tokens (standard normal numbers, positive
    ones where those give nothing finite, or any ids) or on `samples`; see `nsm.adapters.validate.EXPERIMENTS`. It is
    run in eval mode for that, and left as it was. It stays live: weights that it learns afterwards are exported, and
    initial values that are its parameters or come from its `initial_state`.

    Args:
        module: in float32, on the CPU; without hidden state that changes the outputs.
        states: for the third kind.
        vocab_size: where tokens are ids, 0 .. vocab_size - 1.
        token_shape: for tokens that are numbers, the shape of one: (512,) for frames of 512 samples, () for scalars
            (default: that of `samples` in floating point).
        timed: whether x has a time axis behind that of the streams, [B, T, *token]; else x is one token [B, *token].
        outputs: names of the outputs, the main one first, where there are several.
        chunk_size: tokens a call of `step` takes unless another multiple is asked for, with a time axis.
        samples: a few real sequences, [T] ids or [T, *token] numbers each, to examine a module on that gives nothing
            finite for made-up tokens.
        capacity: how many tokens a stream may have from one reset to the next, where a table or cache that is read or
            written at a position ends. By default the export finds it by experiment.
        offline: the model's own forward over whole sequences, [1, T] ids or [1, T, *token] -> main output [1, T, ...],
            as `lambda ids: model(ids).logits`: the step is compared with it, past every window. It is known for
            `nn.LSTM`, `nn.GRU`, `nn.RNN`, and where a model of `transformers` is inside. False: no comparison.

    Raises:
        InputError: samples that the module does not take.
        ConfigError: the declaration does not match the module; the message names the state or output.
        UnsupportedError: a module that cannot be a step model (bidirectional, or it keeps something to itself).
    """
    given: Any = module
    elsewhere = sorted(devices(module) - {"cpu"}) if isinstance(given, nn.Module) else []
    if elsewhere:
        raise ConfigError(
            f"{type(module).__name__} lies on the device {', '.join(elsewhere)}; as_step examines modules on the CPU. "
            "Move it there first, with module.cpu()."
        )
    if isinstance(module, Recurrent):
        model = _recurrent(module, chunk_size, capacity)
        if offline is None:
            offline = functools.partial(_whole, module)
    else:
        if vocab_size is None and token_shape is None:
            token_shape = _shape_of(samples)
        token = _token(vocab_size, token_shape)
        if states is None:
            model = _protocol(module, token, timed, outputs, chunk_size, capacity)
        else:
            if not states:
                check_hidden(module, token, timed)
            carried, nested = _declared(states)
            call = _nested(type(module).__name__, nested, outputs)
            check_order(module, nested)
            model = AdaptedModel(module, call, carried, token, outputs, timed, chunk_size, capacity)
    known = known_forward(module, model.token_spec) if offline is None else None
    examine_model(model, TorchStep(model, offline or None, known=known), _sequences(model, samples))
    return model


def _sequences(model: AdaptedModel, samples: Sequence[ArrayLike] | NDArray[Any] | None) -> list[NDArray[Any]]:
    """The samples as the model takes them; none where there are none."""
    if samples is None:
        return []
    golden, others = split_samples(model, samples)
    if not golden:
        raise InputError("samples holds no sequence; give a few, [T, *token] each, or leave it out.")
    return [*golden, *others]


def _shape_of(samples: Sequence[ArrayLike] | NDArray[Any] | None) -> tuple[int, ...] | None:
    """The shape of one token of the first sample, [T, *token] in floating point; None without such a sample."""
    if samples is None or not len(samples):
        return None
    try:
        first = np.asarray(samples[0])
    except ValueError:  # the check of the samples reports it
        return None
    return first.shape[1:] if first.dtype.kind == "f" and first.ndim else None


def _whole(module: Any, x: Tensor) -> Tensor:
    """The outputs [1, T, H] of a recurrent layer of torch over a whole sequence [1, T, input_size]."""
    output: Tensor = module(x if module.batch_first else x.transpose(0, 1))[0]
    return output if module.batch_first else output.transpose(0, 1)


def _token(vocab_size: int | None, token_shape: Sequence[int] | None) -> TensorSpec:
    vocab_size = None if vocab_size is None else whole("vocab_size", vocab_size)
    if (vocab_size is None) == (token_shape is None) or (vocab_size is not None and vocab_size < 1):
        raise ConfigError(
            "Expected the kind of tokens: vocab_size=N for ids, or token_shape=(...) for numbers, (512,) for frames of "
            f"512, () for scalars, or samples in floating point; given vocab_size={vocab_size}, "
            f"token_shape={token_shape}."
        )
    if vocab_size is not None:
        return TensorSpec("tokens", (), "int64", None, 0, vocab_size - 1)
    assert token_shape is not None
    return TensorSpec("tokens", tuple(each_whole("token_shape", token_shape)), "float32")


def _recurrent(module: Recurrent, chunk_size: int, capacity: int | None) -> AdaptedModel:
    if module.bidirectional:
        raise UnsupportedError(
            "A bidirectional RNN needs the end of a stream before its beginning can be answered, so it cannot run step "
            "by step. Train it with bidirectional=False."
        )
    sizes = {"hidden": module.proj_size or module.hidden_size}
    if isinstance(module, nn.LSTM):
        sizes["cell"] = module.hidden_size
    states = [
        Carried(name, torch.zeros(module.num_layers, 1, size, dtype=torch.float32), 1) for name, size in sizes.items()
    ]

    def call(module: Any, x: Tensor, states: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        given = x if module.batch_first else x.transpose(0, 1)
        # The layouts that the kernels take: a state that was moved is not contiguous.
        state = tuple(value.contiguous() for value in states)
        output, after = module(given, state if len(state) > 1 else state[0])
        return [output if module.batch_first else output.transpose(0, 1)], list(after) if len(state) > 1 else [after]

    token = TensorSpec("tokens", (module.input_size,), "float32")
    return AdaptedModel(module, call, states, token, ("outputs",), True, chunk_size, capacity)


def _protocol(
    module: nn.Module,
    token: TensorSpec,
    timed: bool,
    outputs: Sequence[str],
    chunk_size: int,
    capacity: int | None,
) -> AdaptedModel:
    step, initial = getattr(module, "step", None), getattr(module, "initial_state", None)
    if not callable(step) or not callable(initial):
        check_hidden(module, token, timed)
        raise ConfigError(
            f"{type(module).__name__} has no step(x, state) and initial_state(batch), so as_step has to be told its "
            "states: as_step(module, states=[Carried(name, initial, lane_axis), ...])."
        )
    start = initial(1)
    if not isinstance(start, Mapping) or not all(isinstance(value, Tensor) for value in start.values()):
        raise ConfigError(
            f"{type(module).__name__}.initial_state(1) gave a {type(start).__name__}; expected a dictionary of "
            "tensors with one stream on axis 0."
        )
    names = list(start)

    def call(module: Any, x: Tensor, states: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        given, after = module.step(x, dict(zip(names, states, strict=True)))
        if not isinstance(after, Mapping) or set(after) != set(names):
            found = sorted(after) if isinstance(after, Mapping) else type(after).__name__
            raise ConfigError(f"step took the states {sorted(names)} and gave {found}; it has to give the same ones.")
        return by_name(keyed(given), outputs), [after[name] for name in names]

    def begin(module: Any) -> list[Tensor]:
        start = module.initial_state(1)
        return [start[name] for name in names]

    carried = [Carried(name, value) for name, value in start.items()]
    return AdaptedModel(module, call, carried, token, outputs, timed, chunk_size, capacity, begin)


def _declared(states: Any) -> tuple[list[Carried], list[Any]]:
    """The states one after the other, and in their nesting."""
    if not isinstance(states, list | tuple) or not states:
        raise ConfigError(
            "states are the arguments behind x, a list of Carried or tensors, nested as the module takes them; given "
            f"{states!r}."
        )
    leaves, structure = pytree.tree_flatten(states)
    found = []
    for index, leaf in enumerate(leaves):
        if isinstance(leaf, Tensor):
            leaf = Carried(f"state_{index}", leaf)
        if not isinstance(leaf, Carried):
            raise ConfigError(f"A state is a Carried or a tensor of one stream; given {leaf!r}.")
        found.append(leaf)
    return found, list(pytree.tree_unflatten(found, structure))


def _nested(kind: str, states: list[Any], outputs: Sequence[str]) -> Call:
    """Call a module with states in their nesting, and flatten its result."""
    structure = pytree.tree_structure(states)
    apart: Callable[[Any], tuple[list[Tensor], list[Tensor]]] = taken_apart(kind, states, outputs)

    def call(module: Any, x: Tensor, states: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        return apart(module(x, *pytree.tree_unflatten(states, structure)))

    return call
