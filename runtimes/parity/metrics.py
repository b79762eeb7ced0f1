"""Parity measures: small functions of the results of reference and target."""

from __future__ import annotations

import numpy as np

from nsm.trace import Array


def relative_error(given: Array, wanted: Array, usual: float) -> float:
    """Return ||given - wanted|| / max(||wanted||, usual).

    NaN if there is nothing to compare, infinite if the target is not finite.
    """
    if not wanted.size:
        return float("nan")
    with np.errstate(invalid="ignore"):  # inf - inf
        difference = float(np.linalg.norm(given.astype(np.float64).ravel() - wanted.astype(np.float64).ravel()))
    if not np.isfinite(difference):
        return float("inf")
    scale = max(float(np.linalg.norm(wanted.astype(np.float64))), usual)
    return difference / scale if scale else (0.0 if difference == 0.0 else float("inf"))


def absolute_error(given: Array, wanted: Array) -> float:
    """Return the largest absolute difference; NaN if there is nothing to compare, infinite if it is not finite."""
    if not wanted.size:
        return float("nan")
    with np.errstate(invalid="ignore"):  # inf - inf
        difference = float(np.abs(given.astype(np.float64) - wanted).max())
    return difference if np.isfinite(difference) else float("inf")


def slot_errors(given: Array, wanted: Array) -> Array:
    """Per active slot, ||S - S'|| / max(||S||, 0.01 * rms of the active ones); [slots]."""
    norms = np.linalg.norm(wanted.astype(np.float64), axis=-1)
    scale = np.maximum(norms, 0.01 * np.sqrt(np.mean(norms**2)))
    with np.errstate(invalid="ignore", divide="ignore"):  # inf - inf, 0 / 0
        difference = np.linalg.norm(given.astype(np.float64) - wanted, axis=-1)
        result: Array = np.where(difference == 0.0, 0.0, difference / scale)
    return np.where(np.isnan(result), np.inf, result)


def rms_norm(value: Array) -> float:
    """Root mean square, over streams and steps, of the norm over the other axes."""
    if value.dtype.kind != "f" or not value.size:
        return 0.0
    flat = value.reshape(*value.shape[:2], -1).astype(np.float64)
    return float(np.sqrt(np.mean(np.sum(flat**2, -1))))


def kl_divergence(reference: Array, target: Array) -> Array:
    """KL(softmax(reference) || softmax(target)) over the last axis, in nats."""
    log_p, log_q = _log_softmax(reference), _log_softmax(target)
    result: Array = np.maximum(np.sum(np.exp(log_p) * (log_p - log_q), -1), 0.0)  # rounding may leave -1e-17
    return result


def _log_softmax(logits: Array) -> Array:
    shifted = logits - logits.max(-1, keepdims=True)
    result: Array = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return result


def quantile(values: Array, q: float) -> float:
    """Return the next higher value at a quantile: interpolation would turn infinity into NaN."""
    known = values[~np.isnan(values)]
    return float(np.quantile(known, q, method="higher")) if known.size else float("nan")


def mean(values: Array) -> float:
    """Return the mean of the values that are not NaN; NaN if all are."""
    known = values[~np.isnan(values)]
    return float(known.mean()) if known.size else float("nan")


def gain(free_run: Array, one_step: Array) -> float:
    """Return median free-run error / median one-step error, over samples with both errors.

    NaN if no sample has both, or if single steps have no error.
    """
    both = ~(np.isnan(free_run) | np.isnan(one_step))
    single = quantile(one_step[both], 0.5)
    return quantile(free_run[both], 0.5) / single if single else float("nan")


def probed_error(given: Array, wanted: Array) -> tuple[float, float]:
    """Norms of the difference and of the expected values of intermediate results.

    Entries where both hold the same fill value (infinite, or beyond 1e30, as for masked scores) count in
    neither. The difference is infinite where only one of them is finite, or one is NaN.
    """
    with np.errstate(invalid="ignore", over="ignore"):
        filled = ((np.abs(wanted) > 1e30) | np.isinf(wanted)) & (given == wanted)
        difference = np.where(filled, 0.0, given.astype(np.float64) - wanted)
        size = float(np.linalg.norm(difference))
        scale = float(np.linalg.norm(np.where(filled, 0.0, wanted.astype(np.float64))))
    return (size if np.isfinite(size) else float("inf")), (scale if np.isfinite(scale) else float("inf"))
