"""Trace a traced graph again; each operation keeps its original module and line of code."""

from __future__ import annotations

from typing import Any

from torch import fx


class Retrace(fx.Interpreter):
    """Runs a graph of torch.export operation by operation, inside another `torch.export.export`."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.extra_traceback = False  # do not append fx's traceback to error messages

    def retrace(self, *leaves: Any) -> Any:
        """Return the flat results of the graph for its flat arguments."""
        with fx.traceback.preserve_node_meta():
            return self.run(*leaves, enable_io_processing=False)

    def run_node(self, n: fx.Node) -> Any:
        with fx.traceback.set_current_meta(n):
            return super().run_node(n)


def move_modules(graph: fx.Graph, prefix: str) -> None:
    """Prepend a prefix to the module paths of a graph's operations."""
    for node in graph.nodes:
        stack = node.meta.get("nn_module_stack")
        if stack:
            moved = {key: (f"{prefix}.{path}".rstrip("."), kind) for key, (path, kind) in stack.items()}
            node.meta["nn_module_stack"] = moved
