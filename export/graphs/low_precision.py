"""The graphs of a bundle in low precision, as a policy says."""

from __future__ import annotations

import shutil
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import onnx

from nsm.bundle import CALIBRATION, GRAPHS, WEIGHTS, Bundle, graph_file
from nsm.errors import BundleDamagedError, UnsupportedError
from nsm.export.graphs.external_data import load_shared, save_shared
from nsm.quantization import (
    Calibration,
    LinearOp,
    Policy,
    blocked,
    check_recurrent,
    dynamic,
    half,
    largest_weights,
    linear_ops_of,
    looked_up,
    static,
    unroll,
    weights_only,
)
from nsm.spec import StepSpec


@dataclass(frozen=True)
class Lowered:
    """The linear ops of `step`: those in low precision, and the others by name with the reason.

    Only the first of several linear ops with the same matrix, such as the steps of a recurrent layer, is listed.
    """

    low: tuple[LinearOp, ...]
    kept: dict[str, str]

    def fp32_share(self, keys: Collection[str] = ()) -> float:
        """Share of the quantizable weights that belongs to these linear ops, by key."""
        whole = sum(linear_op.size for linear_op in self.low)
        return sum(linear_op.size for linear_op in self.low if linear_op.key in keys) / whole


def check_step(bundle: Bundle, target: str, precision: str, policy: Policy) -> None:
    """Raise `UnsupportedError` where all large weights of a bundle's `step` are inside of recurrent operators."""
    largest = largest_weights(_load(bundle.path, "step", policy))
    check_recurrent(largest, target, precision, policy, bundle.manifest.spec.entry("step").inputs[0].shape[1])


def linear_ops_of_step(directory: Path, policy: Policy) -> Lowered:
    """Apply a policy to the linear ops of a bundle's `step`.

    Raises:
        UnsupportedError: it leaves none to compute in low precision.
    """
    by_matrix: dict[str, LinearOp] = {}
    for linear_op in linear_ops_of(_load(directory, "step", policy), policy.operators):
        by_matrix.setdefault(linear_op.key, linear_op)
    low, kept = policy.chosen(list(by_matrix.values()))
    if all(linear_op.operator == "Gather" for linear_op in low):
        raise UnsupportedError(
            "No linear op of the model has weights that are large enough to gain from low precision. Keep fp32."
        )
    return Lowered(tuple(low), kept)


def write_graphs(
    directory: Path,
    folder: Path,
    spec: StepSpec,
    policy: Policy,
    calibration: Calibration | None,
    excluded: Collection[str] = (),
) -> None:
    """Write every entry of a bundle into `folder` in low precision, over one file of weights.

    Args:
        directory: of the bundle.
        folder: made anew.
        spec: of the model.
        policy: with a scheme other than "backend".
        calibration: for the form "static".
        excluded: keys of linear ops that are kept in fp32 although the policy chooses them.

    Raises:
        BundleDamagedError: the calibration belongs to another model.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    graphs = {}
    for entry in spec.entries:
        model = _load(directory, entry.name, policy)
        low, _ = policy.chosen(linear_ops_of(model, policy.operators))
        chosen = [linear_op for linear_op in low if linear_op.key not in excluded]
        tables = [linear_op for linear_op in chosen if linear_op.operator == "Gather"]
        others = [linear_op for linear_op in chosen if linear_op.operator != "Gather"]
        graphs[entry.name] = _lowered(looked_up(model, tables, policy.tables), others, policy, calibration)
    save_shared(graphs, folder, WEIGHTS)


def _load(directory: Path, entry: str, policy: Policy) -> onnx.ModelProto:
    """A graph of a bundle, with recurrent operators rewritten as linear ops where that makes it faster.

    In the dynamic form it does, and ONNX Runtime has an operator for a whole LSTM. OpenVINO is faster with its own
    operators in fp32 than with linear ops in int8.
    """
    model = load_shared(directory / GRAPHS / graph_file(entry))
    if policy.scheme == "dynamic":
        unroll(model)
    return model


def _lowered(
    model: onnx.ModelProto, linear_ops: list[LinearOp], policy: Policy, calibration: Calibration | None
) -> onnx.ModelProto:
    if policy.scheme == "static":
        assert calibration is not None
        missing = [linear_op.node for linear_op in linear_ops if linear_op.key not in calibration.scales]
        if missing:
            raise BundleDamagedError(
                f"{CALIBRATION} has no scale for {missing[0]}: it was found on another model. Export the bundle again."
            )
        asymmetric = calibration.asymmetric if policy.asymmetric else {}
        return static(model, linear_ops, calibration.scales, policy.saturation_safe, asymmetric)
    if policy.scheme == "fp16":
        return half(model, linear_ops, onnx.TensorProto.FLOAT16)
    if policy.scheme == "bf16":
        return half(model, linear_ops, onnx.TensorProto.BFLOAT16)
    if policy.scheme == "dynamic":
        return dynamic(model, linear_ops, policy.saturation_safe)
    return {"weight-only": weights_only, "block-wise": blocked}[policy.scheme](model, linear_ops)
