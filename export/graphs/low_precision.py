"""The graphs of a bundle in low precision, as a policy says."""

from __future__ import annotations

import shutil
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import onnx

from nsm.bundle import CALIBRATION, GRAPHS, Bundle
from nsm.errors import BundleDamagedError, UnsupportedError
from nsm.export.graphs.external_data import load_shared, save_shared
from nsm.quantization import (
    Calibration,
    Policy,
    Product,
    blocked,
    check_recurrent,
    dynamic,
    half,
    largest_weights,
    looked_up,
    products_of,
    static,
    unroll,
    weights_only,
)
from nsm.spec import StepSpec


@dataclass(frozen=True)
class Lowered:
    """The linear ops of `step`: those in low precision, and the others by name with the reason.

    Of products that share a matrix, as the steps of a recurrent layer do, the first.
    """

    low: tuple[Product, ...]
    kept: dict[str, str]

    def float_share(self, keys: Collection[str] = ()) -> float:
        """Share of the numbers in weights that the policy would quantise and that these products, by key, keep."""
        whole = sum(product.size for product in self.low)
        return sum(product.size for product in self.low if product.key in keys) / whole


def check_step(bundle: Bundle, target: str, precision: str, policy: Policy) -> None:
    """Raise `UnsupportedError` where all large weights of a bundle's `step` are inside of recurrent operators."""
    largest = largest_weights(_load(bundle.path, "step", policy))
    check_recurrent(largest, target, precision, policy, bundle.manifest.spec.entry("step").inputs[0].shape[1])


def products_of_step(directory: Path, policy: Policy) -> Lowered:
    """Apply a policy to the linear ops of a bundle's `step`.

    Raises:
        UnsupportedError: it leaves none to compute in low precision.
    """
    by_matrix: dict[str, Product] = {}
    for product in products_of(_load(directory, "step", policy), policy.operators):
        by_matrix.setdefault(product.key, product)
    low, kept = policy.chosen(list(by_matrix.values()))
    if all(product.operator == "Gather" for product in low):
        raise UnsupportedError(
            "The model has no product with constant weights that is large enough to gain from low precision. Keep fp32."
        )
    return Lowered(tuple(low), kept)


def write_graphs(
    directory: Path,
    folder: Path,
    spec: StepSpec,
    policy: Policy,
    calibration: Calibration | None,
    put_back: Collection[str] = (),
) -> None:
    """Write every entry of a bundle into `folder` in low precision, over one file of weights.

    Args:
        directory: of the bundle.
        folder: made anew.
        spec: of the model.
        policy: with a form other than "float".
        calibration: for the form "static".
        put_back: keys of products that stay float although the policy chooses them.

    Raises:
        BundleDamagedError: the calibration is of other products.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    graphs = {}
    for entry in spec.entries:
        model = _load(directory, entry.name, policy)
        low, _ = policy.chosen(products_of(model, policy.operators))
        chosen = [product for product in low if product.key not in put_back]
        tables = [product for product in chosen if product.operator == "Gather"]
        others = [product for product in chosen if product.operator != "Gather"]
        graphs[entry.name] = _lowered(looked_up(model, tables, policy.tables), others, policy, calibration)
    save_shared(graphs, folder, "weights.bin")


def _load(directory: Path, entry: str, policy: Policy) -> onnx.ModelProto:
    """A graph of a bundle, with products in the place of recurrent operators where that makes it faster.

    In the dynamic form it does, and ONNX Runtime has an operator for a whole LSTM. OpenVINO is faster with its own
    operators in float than with such products in int8.
    """
    model = load_shared(directory / GRAPHS / f"{entry}.onnx")
    if policy.form == "dynamic":
        unroll(model)
    return model


def _lowered(
    model: onnx.ModelProto, products: list[Product], policy: Policy, calibration: Calibration | None
) -> onnx.ModelProto:
    if policy.form == "static":
        assert calibration is not None
        missing = [product.node for product in products if product.key not in calibration.scales]
        if missing:
            raise BundleDamagedError(
                f"{CALIBRATION} has no scale for {missing[0]}: it was found on another model. Export the bundle again."
            )
        unsigned = calibration.unsigned if policy.unsigned else {}
        return static(model, products, calibration.scales, policy.guarded, unsigned)
    if policy.form == "half":
        return half(model, products, onnx.TensorProto.FLOAT16)
    if policy.form == "brain":
        return half(model, products, onnx.TensorProto.BFLOAT16)
    if policy.form == "dynamic":
        return dynamic(model, products, policy.guarded)
    return {"weights": weights_only, "blocked": blocked}[policy.form](model, products)
