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
    from nsm.quantization.linear_ops import Operator, Product

Tables = Literal["int8", "half", "brain"]
"""How a table's numbers are kept: with a scale for each row, or rounded to half precision.

int8-weights is the precision with a small loss, and int8 rows would double the loss.
"""

LEVELS = 127
"""Largest number that an int8 stands for; -128 is left out, so that the range is symmetric."""

SAFE_SUM = 128
"""Largest sum of the numbers of a sign in rows 2 i and 2 i + 1 of a column whose products are right on every x86.

Without VNNI, backends use the instruction vpmaddubsw, which adds two products of an unsigned and a signed byte in
16 bits and saturates: 255 * (127 + 127) does, 255 * 128 does not. Backends do not prevent it. In
OpenVINO and ONNX Runtime the two are such neighbours, as `tests/export/builders/test_saturation.py` sees on older
processors.
"""

Form = Literal["float", "static", "dynamic", "blocked", "weights", "half", "brain"]
"""Quantization of the linear ops; see `nsm.quantization.rewrite`. "float": the backend lowers the precision itself."""

SMALLEST = 16_384
"""Numbers of a matrix below which quantising costs more time than it saves."""

SMALLEST_TABLE = 262_144
"""Numbers of a table of embeddings below which int8 precisions leave it: less room costs time, and saves none."""

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
    """The form of a precision on a target.

    Args:
        form: of the products.
        keep: patterns of the names of linear ops kept in fp32, with the reason.
        note: for the user.
        guarded: whether matrices keep to `SAFE_SUM`, where activations are int8 too: an artifact for processors is
            right on those without VNNI as well.
        unsigned: whether calibrated activations may be asymmetric uint8, where that loses less.
        tables: dtype in which embedding tables are stored. Their rows are dequantized to float.
    """

    form: Form
    keep: tuple[tuple[str, str], ...] = _ALWAYS_FLOAT
    note: str = ""
    guarded: bool = True
    unsigned: bool = False
    tables: Tables = "int8"

    @property
    def operators(self) -> tuple[Operator, ...]:
        """Those whose products the form has a way for."""
        return ("MatMul", "LSTM", "Gather") if self.form == "dynamic" else ("MatMul", "Gather")

    def chosen(self, products: Sequence[Product]) -> tuple[list[Product], dict[str, str]]:
        """The products to quantise, and the others by name with the reason; small sums have no need of one."""
        low, kept = [], {}
        for product in products:
            table = product.operator == "Gather"
            smallest = SMALLEST_TABLE if table and self.form not in ("half", "brain") else SMALLEST
            half = self.form == "half" or (table and self.tables == "half")
            why = next((why for pattern, why in self.keep if fnmatch.fnmatch(product.node, pattern)), None)
            if why is not None:
                kept[product.node] = why
            elif half and not product.largest <= LARGEST_HALF:
                kept[product.node] = f"its numbers reach {product.largest:.3g}, and fp16 ends at {LARGEST_HALF:.0f}"
            elif product.size >= smallest:
                low.append(product)
            elif not product.sums:
                kept[product.node] = f"its {product.shape[0]} x {product.shape[1]} numbers are too few to gain"
        return low, kept


POLICIES: Mapping[tuple[str, str], Policy] = MappingProxyType(
    {
        ("openvino", "int8"): Policy("static", unsigned=True),
        ("openvino", "int8-weights"): Policy(
            "weights",
            tables="half",
            note="OpenVINO quantises the activations of these products too, token by token, where it gains",
        ),
        ("openvino", "fp16"): Policy("float", note="all of it is computed in fp16, whose numbers end at 65,504"),
        ("openvino", "bf16"): Policy("float"),
        ("onnxruntime", "int8"): Policy(
            "dynamic",
            note="one activation scale for all lanes and tokens of a call: lanes are not independent of each other",
        ),
        ("onnxruntime", "int8-weights"): Policy(
            "blocked", tables="half", note="uses the operator MatMulNBits of ONNX Runtime"
        ),
        ("mobile", "int8"): Policy(
            "dynamic",
            note="one activation scale for all lanes and tokens of a call: lanes are not independent of each other",
        ),
        # TensorRT refuses zero points, and has no look-up of bytes.
        ("tensorrt", "int8"): Policy("static", guarded=False, tables="half"),
        ("tensorrt", "int8-weights"): Policy("weights", tables="half"),
        ("tensorrt", "fp16"): Policy("half", tables="half"),
        ("tensorrt", "bf16"): Policy("brain", tables="brain"),
        ("onnxruntime-cuda", "fp16"): Policy("half", tables="half"),
    }
)

_WHY_NOT: Mapping[tuple[str, str], str] = MappingProxyType(
    {
        ("onnxruntime", "fp16"): "ONNX Runtime turns such products back into fp32 on a processor. Take int8",
        ("onnxruntime", "bf16"): "ONNX Runtime has no such products on a processor. Take int8",
        # Every product is copied to the processor and back (microsoft/onnxruntime, issues 12229 and 24807).
        ("onnxruntime-cuda", "int8"): "ONNX Runtime has no kernels for int8 there. Take fp16, or the target tensorrt",
        ("onnxruntime-cuda", "int8-weights"): "it was not measured on a GPU yet. Take fp16, or the target tensorrt",
    }
)
"""Reasons why a target lacks a precision that similar targets have, with the alternative."""


def find_policy(target: str, precision: str, device: str | None = None) -> Policy | None:
    """The policy of a precision on a target; None for fp32. For the device "cpu-dot" matrices are not guarded.

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
    return replace(policy, guarded=False) if device is not None and device.lower() == CPU_DOT else policy
