"""Which operators of a PyTorch model hold its large weights."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, fx, nn

_OPERATORS = {"aten.lstm.input": "LSTM", "aten.gru.input": "GRU"}


def largest_weights(module: nn.Module) -> dict[str, int]:
    """Numbers in the largest matrix of each kind of operator: "LSTM", "GRU", and "" for linear ops.

    Tables of embeddings are left out, and kernels of convolutions.
    """
    largest: dict[str, int] = {}
    for kind, weight in _matrices(module):
        largest[kind] = max(largest.get(kind, 0), weight.numel())
    return largest


def _matrices(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    inside = {
        id(weight) for part in module.modules() if isinstance(part, fx.GraphModule) for weight in part.parameters()
    }
    for part in module.modules():
        if isinstance(part, fx.GraphModule):
            yield from _of_graph(part)
        elif not isinstance(part, nn.Embedding):
            for weight in part.parameters(recurse=False):
                if weight.dim() == 2 and id(weight) not in inside:
                    yield _kind(part), weight


def _kind(part: nn.Module) -> str:
    """An LSTM with projections is exported as its steps, as an `nn.RNN` is."""
    if isinstance(part, nn.GRU):
        return "GRU"
    return "LSTM" if isinstance(part, nn.LSTM) and not part.proj_size else ""


def _of_graph(part: fx.GraphModule) -> Iterator[tuple[str, Tensor]]:
    """The matrices of a traced program, by the operators that take them."""
    weights = dict(part.named_parameters())
    for node in part.graph.nodes:
        for source in node.all_input_nodes if str(node.target) != "aten.embedding.default" else ():
            weight = weights.get(str(source.target)) if source.op == "get_attr" else None
            if weight is not None and weight.dim() == 2:
                yield _OPERATORS.get(str(node.target), ""), weight
