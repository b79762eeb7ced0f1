"""Compare OpenVINO's key-value cache with the ring buffer of the transformer in compare.py.

python examples/stateful_cache.py

OpenVINO can keep a growing cache inside the compiled model (`MakeStateful`) and fuse it with the attention that reads
it. The script runs the same weights with both caches, in turns in one process: 16 new tokens per call, around N tokens
of context. It compares the outputs of both first.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import cast

import click
import compare
import numpy as np
import openvino as ov
import torch
from numpy.typing import NDArray
from openvino import opset13 as opset
from openvino import properties as props
from openvino._offline_transformations import apply_make_stateful_transformation
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional

import nsm
from nsm.baselines import TransformerLayer, TransformerLM

Tokens = NDArray[np.int64]
CHUNK = 16


class Growing(nn.Module):
    """The transformer with a concatenated cache, in a form that OpenVINO can fuse."""

    def __init__(self, model: TransformerLM, fused: bool) -> None:
        super().__init__()
        self.model = model
        self.fused = fused

    def forward(self, tokens: Tensor, beam: Tensor, *past: Tensor) -> tuple[Tensor, ...]:
        model, length, seen = self.model, tokens.shape[1], past[0].shape[2]
        time = torch.arange(length) + seen
        cos, sin = model.coarse[torch.div(time, model.stride, rounding_mode="trunc")].chunk(2, -1)
        more_cos, more_sin = model.fine[time % model.stride].chunk(2, -1)
        cos, sin = cos * more_cos - sin * more_sin, sin * more_cos + cos * more_sin
        visible = torch.arange(length + seen)[None] <= time[:, None]
        hidden = model.embed(tokens)
        present: list[Tensor] = []
        for index, layer in enumerate(cast("list[TransformerLayer]", list(model.layers))):
            parts = layer.qkv(layer.norm(hidden)).view(1, length, 3, layer.heads, -1).permute(2, 0, 3, 1, 4)
            query, key = (_rotate(part, cos, sin) for part in (parts[0], parts[1]))
            before = past[2 * index : 2 * index + 2]
            if self.fused:  # the plugin's fusion requires a beam selection before the concatenation
                before = tuple(part.index_select(0, beam) for part in before)
            key = torch.cat([before[0], key], 2)
            value = torch.cat([before[1], parts[2]], 2)
            present += [key, value]
            attended = functional.scaled_dot_product_attention(query, key, value, visible[None, None])
            hidden = hidden + layer.out(attended.transpose(1, 2).flatten(2))
            hidden = hidden + layer.feed_forward(layer.forward_norm(hidden))
        return (model.head(hidden), *present)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    one, other = x.chunk(2, -1)
    return torch.cat([one * cos - other * sin, other * cos + one * sin], -1)


def compiled(model: TransformerLM, fused: bool) -> ov.CompiledModel:
    """Compile the transformer with a growing cache as a stateful model in fp32."""
    heads, _, width = model.shape
    empty = [torch.zeros(1, heads, 3, width) for _ in range(2 * len(model.layers))]
    tokens = torch.zeros(1, CHUNK, dtype=torch.int64)
    converted = ov.convert_model(
        Growing(model, fused), example_input=(tokens, torch.zeros(1, dtype=torch.int32), *empty)
    )
    names = {}
    for index, (given, made) in enumerate(zip(converted.inputs[2:], converted.outputs[1:], strict=True)):
        given.get_tensor().set_names({f"past{index}"})
        made.get_tensor().set_names({f"present{index}"})
        given.get_node().set_partial_shape(ov.PartialShape([1, heads, -1, width]))
        names[f"past{index}"] = f"present{index}"
    converted.inputs[0].get_node().set_partial_shape(ov.PartialShape([1, -1]))
    converted.validate_nodes_and_infer_types()
    apply_make_stateful_transformation(converted, names)
    for operation in converted.get_ops():
        if operation.get_type_name() == "ReadValue":
            operation.set_arguments([opset.constant(np.zeros((1, heads, 0, width), np.float32)).output(0)])
    converted.validate_nodes_and_infer_types()
    config = {props.hint.inference_precision(): ov.Type.f32, props.hint.kv_cache_precision(): ov.Type.f32}
    return cast("ov.CompiledModel", ov.compile_model(converted, "CPU", config))


class Grow:
    """Calls the stateful model."""

    def __init__(self, request: ov.InferRequest) -> None:
        self.request = request

    def __call__(self, tokens: Tokens) -> NDArray[np.float32]:
        return np.array(self.request.infer([tokens, np.zeros(1, np.int32)])[0])


def timed(call: Callable[[Tokens], object], tokens: Tokens) -> float:
    """Return the microseconds per call."""
    started = time.perf_counter()
    for piece in np.split(tokens, tokens.shape[1] // CHUNK, 1):
        call(piece)
    return float((time.perf_counter() - started) / (tokens.shape[1] // CHUNK) * 1e6)


@click.command()
@click.option("--contexts", default="512,1024,2048,4096", show_default=True)
@click.option("--rounds", default=9, show_default=True)
@click.option("--fused/--unfused", default=True, help="Fuse the cache with the attention.")
def main(contexts: str, rounds: int, fused: bool) -> None:
    """Compare both caches in a transformer of width 384 with 4 layers."""
    table = Table("context", "ring us", "OpenVINO's cache us", "ratio to ring", box=None)
    for context in (int(text) for text in contexts.split(",")):
        torch.manual_seed(0)
        model = TransformerLM(compare.BYTES, 384, 4, 8, context).eval()
        grow = Grow(compiled(model, fused).create_infer_request())
        generator = np.random.default_rng(0)
        # The timed calls lie around `context`, so the growing cache has that length on average.
        tokens = generator.integers(0, compare.BYTES, (1, context + 256))
        with tempfile.TemporaryDirectory() as folder:
            bundle = compare.make_bundle(model, "openvino", Path(folder) / "ring.nsm")
            with nsm.open(bundle, target="openvino") as session:
                wanted = session.run(tokens[:, :128])["outputs"]
                given = np.concatenate([grow(piece) for piece in np.split(tokens[:, :128], 8, 1)], 1)
                np.testing.assert_allclose(given, wanted, atol=1e-4)
                ratios, both = [], []
                for _ in range(rounds):
                    grow.request.reset_state()
                    grow(tokens[:, : context - 256])
                    mine = timed(session.step, tokens[:, -512:])
                    theirs = timed(grow, tokens[:, -512:])
                    both.append((mine, theirs))
                    ratios.append(theirs / mine)
        ring, growing = np.median(both, 0)
        low, middle, high = np.quantile(ratios, (0.25, 0.5, 0.75))
        table.add_row(str(context), f"{ring:.0f}", f"{growing:.0f}", f"{middle:.2f}x ({low:.2f}-{high:.2f})")
    Console().print(table)


if __name__ == "__main__":
    main()
