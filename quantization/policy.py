"""The quantization of each precision on each target, and the ops kept in fp32, as a table."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Literal

from nsm.errors import UnsupportedError
from nsm.runtimes.opening import CPU_DOT

if TYPE_CHECKING:
    from nsm.quantization.linear_ops import LinearOp, Operator

Tables = Literal["int8", "fp16", "bf16"]
"""Storage of an embedding table: int8 with a scale per row, or half precision.

int8-weights is the precision with a small loss, and int8 rows would double the loss.
"""

LEVELS = 127
"""Largest int8 level; -128 is not used, so that the range is symmetric."""

SAFE_SUM = 128
"""Largest sum of weights of one sign in rows 2 i and 2 i + 1 of a column that no x86 processor saturates.

Without VNNI, backends use the instruction vpmaddubsw, which adds two products of an unsigned and a signed byte in
16 bits and saturates: 255 * (127 + 127) does, 255 * 128 does not. Backends do not prevent it. In
OpenVINO and ONNX Runtime the two are such neighbours, as `tests/export/builders/test_saturation.py` sees on older
processors.
"""

Scheme = Literal["backend", "static", "dynamic", "block-wise", "weight-only", "fp16", "bf16"]
"""Quantization scheme of the linear ops; see `nsm.quantization.rewrite`. "backend": the backend does it."""

SMALLEST = 16_384
"""Matrix size below which quantization costs more time than it saves."""

SMALLEST_TABLE = 262_144
"""Table size below which int8 precisions keep an embedding in fp32: it saves memory, but costs time."""

LONGEST = 16
"""Steps in a call above which a `GRU` or `RNN` stays one operator: its graph would be long, and start-up with it."""

LARGEST_HALF = 65_504.0
"""Largest number of fp16."""

# Scores decide which slot is written and read: a rounded score changes the memory of a stream. Their linear ops are
# separate and small, so keeping them in fp32 costs almost nothing.
_DECIDES = "router layer: always fp32"
_ALWAYS_FLOAT = (
    ("*.router.product/*", _DECIDES),
    ("*.lift.*", _DECIDES),
    # In int8 a quiet frequency drowns in the rounding of a loud one.
    ("*.fourier_transform/*", "it is a Fourier transform"),
)


@dataclass(frozen=True)
class Policy:
    """The quantization policy of a precision on a target.

    Args:
        scheme: quantization scheme of the linear ops.
        keep: patterns of the names of linear ops kept in fp32, with the reason.
        note: for the user.
        saturation_safe: whether matrices keep to `SAFE_SUM` if activations are int8 too, so that the artifact is right
            on processors without VNNI as well.
        asymmetric: whether calibrated activations may be asymmetric uint8, where that loses less.
        tables: dtype in which embedding tables are stored. Their rows are dequantized to float.
    """

    scheme: Scheme
    keep: tuple[tuple[str, str], ...] = _ALWAYS_FLOAT
    note: str = ""
    saturation_safe: bool = True
    asymmetric: bool = False
    tables: Tables = "int8"

    @property
    def operators(self) -> tuple[Operator, ...]:
        """Operators whose linear ops the scheme can quantize."""
        return ("MatMul", "LSTM", "Gather") if self.scheme == "dynamic" else ("MatMul", "Gather")

    def chosen(self, linear_ops: Sequence[LinearOp]) -> tuple[list[LinearOp], dict[str, str]]:
        """The linear ops to quantize, and the others by name with the reason; small sums need none."""
        low, kept = [], {}
        for linear_op in linear_ops:
            table = linear_op.operator == "Gather"
            smallest = SMALLEST_TABLE if table and self.scheme not in ("fp16", "bf16") else SMALLEST
            half = self.scheme == "fp16" or (table and self.tables == "fp16")
            why = next((why for pattern, why in self.keep if fnmatch.fnmatch(linear_op.node, pattern)), None)
            if why is not None:
                kept[linear_op.node] = why
            elif half and not linear_op.largest <= LARGEST_HALF:
                kept[linear_op.node] = f"its numbers reach {linear_op.largest:.3g}, and fp16 ends at {LARGEST_HALF:.0f}"
            elif linear_op.size >= smallest:
                low.append(linear_op)
            elif not linear_op.sums:
                kept[linear_op.node] = f"its {linear_op.shape[0]} x {linear_op.shape[1]} numbers are too few to gain"
        return low, kept


POLICIES: Mapping[tuple[str, str], Policy] = MappingProxyType(
    {
        ("openvino", "int8"): Policy("static", asymmetric=True),
        ("openvino", "int8-weights"): Policy(
            "weight-only",
            tables="fp16",
            note="OpenVINO quantizes the activations of these linear ops too, token by token, where it gains",
        ),
        ("openvino", "fp16"): Policy("backend", note="everything is computed in fp16, with a largest number of 65,504"),
        ("openvino", "bf16"): Policy("backend"),
        ("onnxruntime", "int8"): Policy(
            "dynamic",
            note="one activation scale for all lanes and tokens of a call: lanes are not independent of each other",
        ),
        ("onnxruntime", "int8-weights"): Policy(
            "block-wise", tables="fp16", note="uses the operator MatMulNBits of ONNX Runtime"
        ),
        ("mobile", "int8"): Policy(
            "dynamic",
            note="one activation scale for all lanes and tokens of a call: lanes are not independent of each other",
        ),
        # TensorRT refuses zero points, and has no look-up of bytes.
        ("tensorrt", "int8"): Policy("static", saturation_safe=False, tables="fp16"),
        ("tensorrt", "int8-weights"): Policy("weight-only", tables="fp16"),
        ("tensorrt", "fp16"): Policy("fp16", tables="fp16"),
        ("tensorrt", "bf16"): Policy("bf16", tables="bf16"),
        ("onnxruntime-cuda", "fp16"): Policy("fp16", tables="fp16"),
    }
)

_WHY_NOT: Mapping[tuple[str, str], str] = MappingProxyType(
    {
        ("onnxruntime", "fp16"): "ONNX Runtime converts linear ops in fp16 back to fp32 on a CPU. Use int8",
        ("onnxruntime", "bf16"): "ONNX Runtime has no linear ops in bf16 on a CPU. Use int8",
        # Every linear op is copied to the processor and back (microsoft/onnxruntime, issues 12229 and 24807).
        ("onnxruntime-cuda", "int8"): "ONNX Runtime has no kernels for int8 there. Use fp16, or the target tensorrt",
        ("onnxruntime-cuda", "int8-weights"): "it was not measured on a GPU yet. Use fp16, or the target tensorrt",
    }
)
"""Reasons why a target lacks a precision that similar targets have, with the alternative."""


def find_policy(target: str, precision: str, device: str | None = None) -> Policy | None:
    """The policy of a precision on a target; None for fp32. For the device "cpu-dot" matrices are not saturation-safe.

    Raises:
        UnsupportedError: the target does not compute in that precision.
    """
    if precision == "fp32":
        return None
    policy = POLICIES.get((target, precision))
    if policy is None:
        known = [name for where, name in POLICIES if where == target]
        reason = _WHY_NOT.get((target, precision))
        raise UnsupportedError(
            f"The target {target} is not built in {precision}{f': {reason}' if reason else ''}. It is built in: "
            f"{', '.join(['fp32', *known])}."
        )
    return replace(policy, saturation_safe=False) if device is not None and device.lower() == CPU_DOT else policy
