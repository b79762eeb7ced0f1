"""A `.pt2`, a program of torch.export, as a step model whose states are named."""

from __future__ import annotations

import difflib
import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import ConstantArgument, InputKind, InputSpec, OutputKind, TensorArgument
from torch.utils import _pytree as pytree

from nsm.adapters import AdaptedModel, Carried, TorchStep, examine_model
from nsm.adapters.validate import Advice
from nsm.errors import CheckpointError, InputError, UnsupportedError
from nsm.export.capture import Retrace, move_modules
from nsm.export.sources.program_archive import check_archive
from nsm.export.sources.program_keys import check_keys, output_names
from nsm.export.sources.program_training import check_eval_mode
from nsm.export.sources.state_names import state_name
from nsm.export.sources.state_options import StateOption
from nsm.files import open_regular
from nsm.models import Checkpoint
from nsm.results import Message
from nsm.spec import LARGEST, TensorSpec
from nsm.trace import Array

CHUNK = 16
_ADVICE = Advice(
    samples="Wrap the module with nsm.as_step, which takes a few real sequences to examine it on: samples=[...].",
    length="If it only ever takes a fixed number of tokens, export it with a static axis 1: then these are one token.",
    lanes="Export the module for one stream, with a static axis 0 of size 1.",
    state="Export the module in eval mode, and make what is left an argument of forward that is returned, new.",
    random="Export the module in eval mode, in which dropout does nothing; make other random numbers an input.",
    offline="Give the model over whole sequences: --offline WHOLE.pt2",
)


def load_program(
    path: Path, states: Sequence[StateOption], vocab_size: int | None = None, capacity: int | None = None
) -> tuple[Checkpoint, list[Message]]:
    """Read a program, and see that it is a step with these states.

    Args:
        path: of a `.pt2` written by `torch.export.save`.
        states: all of them. An output is named by its key if forward returns it in a mapping, else by its operator.
        vocab_size: of a program over ids, which does not say it itself.
        capacity: tokens that a stream takes from one reset to the next.

    Returns:
        The model, without sequences, and messages for the user.

    Raises:
        CheckpointError: it is none, or would run code when it is loaded.
        InputError: states that do not fit its inputs and outputs.
        UnsupportedError: training mode, or a failed experiment of `nsm.adapters.validate`, such as buffers that
            change.
    """
    program = _load(path)
    check_eval_mode(program, str(path))
    inputs, outputs = _inputs(program), output_names(program)
    _check_sizes(path, inputs)
    constants = {spec.arg.name: spec.arg.value for spec in _given(program) if isinstance(spec.arg, ConstantArgument)}
    places = [_place(option, inputs, constants, outputs) for option in states]
    check_keys(program, dict(zip([option.past for option in states], places, strict=True)))
    left = [name for name in inputs if name not in [option.past for option in states]]
    written = _written(program)
    if written and not states:
        raise UnsupportedError(
            f"The only state of {path} is the registered buffer {', '.join(written)}, which its forward changes; no "
            "exported graph keeps it from call to call. Make it an argument and a result of forward, export the module "
            "again, and name it: --state INPUT=OUTPUT"
        )
    if len(left) != 1 or not states:
        raise InputError(
            f"{path} has the inputs {_shown(inputs)} and the outputs {outputs}. Besides the states "
            f"({', '.join(option.past for option in states) or 'none is named'}), expected exactly one input, found "
            f"{len(left)}: {', '.join(left) or 'none'}. Name the states with --state INPUT=OUTPUT, where an "
            f"output is also its place, 0 .. {len(outputs) - 1}."
        )
    twice = next((place for place in places if places.count(place) > 1), None)
    if twice is not None:
        raise InputError(f"Two states are to be the output {outputs[twice]}; each has one of its own.")
    unread = [option.past for option in states if not _read(program, option.past)]
    if unread:
        raise InputError(
            f"{path} never reads its states {unread}. Where torch.export.export is given one tensor for two arguments, "
            "it takes them for the same: export again with a tensor of its own for each state. If the model does not "
            "need them, leave them out of it."
        )
    tensors = _tensors(program)
    answers = [index for index in tensors if index not in places]
    if others := [outputs[place] for place in places if place not in tensors]:
        raise InputError(f"A state is a tensor; --state names the output {others[0]} of {path}, which has {outputs}.")
    if not answers:
        raise InputError(f"Every tensor among the outputs of {path} is a state: {outputs}. A step needs another one.")
    model = _adapted(program, left[0], states, places, answers, vocab_size, capacity)
    messages = [
        Message(
            f"state {one.name}: input {option.past}, output {outputs[place]}, {list(one.initial.shape)}, starts from "
            f"{option.init}; found by {option.found}"
        )
        for one, option, place in zip(model.carried, states, places, strict=True)
    ]
    messages += model.examination.messages
    with open_regular(path, "torch") as file:
        digest = hashlib.file_digest(file, "sha256")
    digest.update(repr(model.config).encode())
    return Checkpoint(model, [], [], digest.hexdigest()), messages


def whole_program(path: Path) -> tuple[Callable[[Array], Array], int | None]:
    """A function that runs a program over a whole sequence [1, T, *token], and its T; None if T is dynamic.

    Raises:
        CheckpointError: it is none, or would run code when it is loaded.
        InputError: it has not one input, or its input has no axis of time.
    """
    program = _load(path)
    inputs = _inputs(program)
    if len(inputs) != 1 or len(next(iter(inputs.values())).shape) < 2:
        raise InputError(f"{path} has the inputs {_shown(inputs)}; expected one, a whole sequence [1, T, *token].")
    ((name, value),) = inputs.items()
    sizes: list[Any] = list(value.shape)
    module, length = Program(program, [name]), sizes[1]

    @torch.no_grad()
    def run(tokens: Array) -> Array:
        given = torch.from_numpy(tokens)
        output: Tensor = module(given if given.is_floating_point() else given.to(value.dtype))[0]
        return output.numpy()

    return run, None if isinstance(length, torch.SymInt) else int(length)


def _load(path: Path) -> ExportedProgram:
    check_archive(path)
    try:
        return torch.export.load(path)
    except Exception as error:  # whatever torch raises for a damaged or newer file
        raise CheckpointError(f"{path} cannot be loaded by torch {torch.__version__}: {error}") from error


class Program(nn.Module):
    """The module of a program, called with the inputs that `names` has, in that order.

    Arguments other than tensors keep their values from torch.export. The outputs are flattened.
    """

    def __init__(self, program: ExportedProgram, names: Sequence[str]) -> None:
        super().__init__()
        self.program = program.module(check_guards=False)
        move_modules(self.program.graph, "model.module")
        self._arguments = [_argument(spec, names) for spec in _given(program)]
        self._nesting = program.call_spec.in_spec

    def forward(self, *given: Tensor) -> tuple[Tensor, ...]:
        leaves = [given[place] if place is not None else constant for place, constant in self._arguments]
        if torch.compiler.is_exporting():
            return tuple(pytree.tree_leaves(Retrace(self.program).retrace(*leaves)))
        arguments, named = pytree.tree_unflatten(leaves, self._nesting)
        return tuple(pytree.tree_leaves(self.program(*arguments, **named)))

    def train(self, mode: bool = True) -> Program:  # noqa: ARG002 - the mode of a program is fixed
        return self


def _argument(spec: InputSpec, names: Sequence[str]) -> tuple[int | None, Any]:
    """The index of an argument among the inputs, or its constant value."""
    if isinstance(spec.arg, ConstantArgument):
        return None, spec.arg.value
    if not isinstance(spec.arg, TensorArgument):
        raise UnsupportedError(
            f"The program takes the number {spec.arg.name}, which may be another with each call. Export it with one "
            "that is fixed."
        )
    return list(names).index(spec.arg.name), None


def _adapted(
    program: ExportedProgram,
    main: str,
    named: Sequence[StateOption],
    places: Sequence[int],
    answers: Sequence[int],
    vocab_size: int | None,
    capacity: int | None,
) -> AdaptedModel:
    inputs = _inputs(program)
    module = Program(program, [main, *(option.past for option in named)])
    value = inputs[main]
    if value.dtype not in (torch.float32, torch.int64, torch.int32):
        raise UnsupportedError(
            f"The input {main} is {value.dtype}; expected numbers in float32, or ids in int64 or int32. Convert "
            "the module with .float() before torch.export.export; a lower precision is asked for with --precision."
        )
    sizes: list[Any] = list(value.shape)
    lanes = None if isinstance(sizes[0], torch.SymInt) else int(sizes[0])
    timed = len(sizes) > 1 and isinstance(sizes[1], torch.SymInt)
    carried = [_carried(option, inputs[option.past], sizes[0]) for option in named]
    if lanes not in (None, 1):
        raise UnsupportedError(
            f"The program was exported for {lanes} streams at a time; export it for one, or for any."
        )
    rest = sizes[2 if timed else 1 :]
    opened = [size for size in rest if isinstance(size, torch.SymInt)]
    if opened:
        raise UnsupportedError(
            f"The input {main} has the shape {list(map(str, value.shape))}, with dynamic sizes besides those of the "
            "streams (axis 0) and of time (axis 1). Export it with these fixed."
        )
    if value.dtype in (torch.int64, torch.int32):
        if vocab_size is None:
            raise InputError(
                f"The input {main} takes ids, and a program does not say how many there are. Say it: --vocab-size N"
            )
        token = TensorSpec("tokens", tuple(map(int, rest)), "int64", None, 0, vocab_size - 1)
    else:
        token = TensorSpec("tokens", tuple(map(int, rest)), "float32")

    def call(module: Any, x: Tensor, states: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        given = module(x if x.is_floating_point() else x.to(value.dtype), *states)
        return [given[index] for index in answers], [given[place] for place in places]

    names = ["outputs"] if len(answers) == 1 else [f"outputs.{index}" for index in range(len(answers))]
    model = AdaptedModel(module, call, carried, token, names, timed, CHUNK, capacity)
    step = TorchStep(model, None, "The program", _ADVICE, "program")
    decision = _decision(program)
    if decision:  # one decision cannot hold for several streams
        step.lanes, step.why = 1, f"its operator {decision} decides by values of the stream"
    examine_model(model, step)
    return model


def _decision(program: ExportedProgram) -> str:
    """An operator that chooses or repeats a part of the program by values; "" where there is none."""
    operators = (torch.ops.higher_order.cond, torch.ops.higher_order.while_loop)
    graphs = [part.graph for part in program.graph_module.modules() if isinstance(part, torch.fx.GraphModule)]
    return next((node.name for graph in graphs for node in graph.nodes if node.target in operators), "")


def _inputs(program: ExportedProgram) -> dict[str, Tensor]:
    """The inputs of the program by name, with their (symbolic) shapes."""
    names = [spec.arg.name for spec in _given(program) if isinstance(spec.arg, TensorArgument)]
    return {
        node.name: node.meta["val"] for node in program.graph.nodes if node.name in names and node.op == "placeholder"
    }


def _check_sizes(path: Path, inputs: Mapping[str, Tensor]) -> None:
    """Raise `UnsupportedError` where an input is larger than any call takes: it costs nothing to say so in a file."""
    for name, value in inputs.items():
        shape: list[Any] = list(value.shape)
        nbytes = math.prod(size for size in shape if isinstance(size, int)) * value.element_size()
        if nbytes > LARGEST:
            raise UnsupportedError(
                f"{path}: the input {name} is {value.dtype}{shape}, {nbytes:,} bytes; a call takes at most {LARGEST:,} "
                "bytes of each. Was the file damaged? Export a smaller step."
            )


def _given(program: ExportedProgram) -> list[InputSpec]:
    """The arguments of the program, in the order of its nesting."""
    return [spec for spec in program.graph_signature.input_specs if spec.kind == InputKind.USER_INPUT]


def _written(program: ExportedProgram) -> list[str]:
    """Buffers that the program changes: by an output of its own, or by an operator that writes into its argument."""
    buffers = program.graph_signature.inputs_to_buffers
    found = dict.fromkeys(program.graph_signature.buffers_to_mutate.values())
    for node in program.graph.nodes:
        schema = getattr(node.target, "_schema", None)
        if schema is not None and schema.is_mutable and node.args and getattr(node.args[0], "name", "") in buffers:
            found[buffers[node.args[0].name]] = None
    return list(found)


def _tensors(program: ExportedProgram) -> list[int]:
    """The places of the outputs that are tensors; others, as a None, are always the same."""
    given = [spec for spec in program.graph_signature.output_specs if spec.kind == OutputKind.USER_OUTPUT]
    return [index for index, spec in enumerate(given) if isinstance(spec.arg, TensorArgument)]


def _read(program: ExportedProgram, name: str) -> bool:
    """Whether anything depends on an input."""
    return any(node.users for node in program.graph.nodes if node.name == name and node.op == "placeholder")


def _place(
    option: StateOption, inputs: dict[str, Tensor], constants: Mapping[str, object], names: Sequence[str]
) -> int:
    """Which output belongs to a state."""
    if option.past in constants:
        raise InputError(
            f"The argument {option.past} of the program was not a tensor but {constants[option.past]} when it was "
            "exported, and stays so. Export it with a tensor in its place."
        )
    if option.past not in inputs:
        close = difflib.get_close_matches(option.past, list(inputs), 1)
        raise InputError(
            f"The program has no input {option.past!r}; it has {_shown(inputs)}."
            + (f" Did you mean {close[0]}?" if close else "")
        )
    if option.present in names:
        return names.index(option.present)
    if option.present.isdigit() and int(option.present) < len(names):
        return int(option.present)
    raise InputError(
        f"The program has no output {option.present!r}; it has {names}, or by their places 0 .. {len(names) - 1}."
    )


def _carried(option: StateOption, value: Tensor, batch: int | torch.SymInt) -> Carried:
    """The state of an input: its lanes are where the size is that of the streams."""
    symbolic = isinstance(batch, torch.SymInt)
    sizes: list[Any] = list(value.shape)
    # Symbols are compared by their names: to compare them as numbers would be to guess them.
    alike = (
        i for i, size in enumerate(sizes) if isinstance(size, torch.SymInt) == symbolic and str(size) == str(batch)
    )
    axis = next(alike, None)
    opened = [i for i, size in enumerate(sizes) if isinstance(size, torch.SymInt) and i != axis]
    if opened:
        raise UnsupportedError(
            f"The state {option.past} has the shape {list(map(str, sizes))}: besides the streams, axis {opened[0]} is "
            "dynamic. A step has static shapes: carry a window of fixed length."
        )
    shape = tuple(1 if i == axis else int(size) for i, size in enumerate(sizes))
    # Made first, for it refuses dtypes that numpy has no name for.
    carried = Carried(state_name(option.past), torch.zeros(shape, dtype=value.dtype), axis)
    initial = option.initial(shape, str(value.dtype).removeprefix("torch."))
    return replace(carried, initial=torch.from_numpy(initial))


def _shown(inputs: dict[str, Tensor]) -> str:
    return ", ".join(f"{name} {list(map(str, value.shape))}" for name, value in inputs.items())
