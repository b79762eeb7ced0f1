"""Replace complex tensors of a torch.export program by `Pair`s of real tensors.

ONNX has no complex arithmetic. `nsm.export.capture.complex_operators` lists the replacement of each operator; an
operator without a replacement raises an error that names it.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from nsm.errors import UnsupportedError
from nsm.export.capture.complex_operators import Pair, operation_of
from nsm.export.capture.retrace import Retrace
from nsm.export.capture.source_line import line_of_node, module_of


def is_complex(node: fx.Node) -> bool:
    """Whether an operation of a program returns complex tensors."""
    return any(isinstance(value, Tensor) and value.is_complex() for value in pytree.tree_leaves(node.meta.get("val")))


class RealPairs(nn.Module):
    """Runs a program with real inputs and outputs without complex tensors; takes the program's flat inputs."""

    def __init__(self, program: ExportedProgram) -> None:
        super().__init__()
        self.program = program.module(check_guards=False)
        self._constants: dict[str, tuple[str, str]] = {}
        for node in self.program.graph.nodes:
            if node.op != "get_attr" or node.target in self._constants:
                continue
            owner, _, name = node.target.rpartition(".")
            holder = self.program.get_submodule(owner)
            value = getattr(holder, name)
            if isinstance(value, Tensor) and value.is_complex():
                names = (f"real_{len(self._constants)}", f"imag_{len(self._constants)}")
                self.register_buffer(names[0], value.detach().real.clone())
                self.register_buffer(names[1], value.detach().imag.clone())
                self._constants[node.target] = names
                delattr(holder, name)

    def forward(self, *flat: Tensor) -> tuple[Tensor, ...]:
        constants = {path: Pair(getattr(self, re), getattr(self, im)) for path, (re, im) in self._constants.items()}
        return tuple(pytree.tree_leaves(_Run(self.program, constants).retrace(*flat)))


class _Run(Retrace):
    def __init__(self, module: fx.GraphModule, constants: Mapping[str, Pair]) -> None:
        super().__init__(module)
        self._constants = constants

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        return self._constants[target] if target in self._constants else super().get_attr(target, args, kwargs)

    def run_node(self, n: fx.Node) -> Any:
        if n.op != "call_function" or n.target is operator.getitem:
            return super().run_node(n)
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        if not is_complex(n) and not any(isinstance(leaf, Pair) for leaf in pytree.tree_leaves((args, kwargs))):
            return super().run_node(n)
        name = str(n.target).removeprefix("aten.").split(".", 1)[0]
        operation = operation_of(name, n.target)
        if operation is None:
            raise _refusal(n)
        try:
            with fx.traceback.set_current_meta(_marked(n) if name.startswith("_fft") else n):
                return operation(*args, **kwargs)
        except Exception as error:  # arguments that the replacement does not support
            raise _refusal(n) from error


def _refusal(node: fx.Node) -> UnsupportedError:
    line, module = line_of_node(node), module_of(node)
    return UnsupportedError(
        f"The operator {str(node.target).removesuffix('.default')} on complex numbers"
        f"{f' in the module {module}' if module else ''} has no real-valued replacement; ONNX has no complex numbers"
        f"{f': {line}' if line else '. '}Compute it from the real and the imaginary part, torch.view_as_real(z), or "
        "from z.abs() and z.angle()."
    )


def _marked(node: fx.Node) -> Any:
    """Add a module `fourier_transform` to the node's path, so that quantization keeps its MatMuls in fp32."""
    stack = dict(node.meta.get("nn_module_stack") or {})
    path = list(stack.values())[-1][0] if stack else "model"
    return _Meta({**node.meta, "nn_module_stack": {**stack, "fourier": (f"{path}.fourier_transform", "")}}, node)


class _Meta:
    """Has the attributes of a node that `set_current_meta` reads."""

    def __init__(self, meta: dict[str, Any], node: fx.Node) -> None:
        self.meta, self.name, self.graph, self.op, self.target = meta, node.name, node.graph, node.op, node.target
