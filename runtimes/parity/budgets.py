"""The parity budgets: the one table that decides whether an artifact is the model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from nsm.errors import InputError


@dataclass(frozen=True)
class Budget:
    """Limits of a precision. Errors are relative; a limit holds for the worst tensor, states included.

    Args:
        one_step_p99: 99th percentile of the one-step error.
        free_run_p99: 99th percentile of the free-run error.
        agreement: least share of tokens with the reference's argmax, excused argmax changes not counted against it.
        kl_mean, kl_p999: mean and 99.9th percentile of KL(reference || target), in nats.
    """

    precision: str
    one_step_p99: float
    free_run_p99: float
    agreement: float
    kl_mean: float
    kl_p999: float


# fp32: rounding of a few 1e-7 per operation, summed over a chunk's products and up to ten layers, stays under 1e-5
# in one step; a non-expansive state may add up to ten steps' worth of it. KL is about half the squared logit error.
# Half precision rounds by 5e-4 (fp16) or 4e-3 (bf16) in each product, int8 by a 254th of the range; the KL follows from
# the logit error. The state stays fp32 in all of them, so a stream forgets these errors instead of adding them up.
BUDGETS: Mapping[str, Budget] = MappingProxyType(
    {
        budget.precision: budget
        for budget in (
            Budget("fp32", 1e-5, 1e-4, 1.0, 1e-8, 1e-6),
            Budget("fp16", 2e-3, 1e-2, 0.999, 1e-4, 1e-3),
            Budget("bf16", 1.5e-2, 5e-2, 0.99, 1e-3, 1e-2),
            Budget("int8-weights", 1e-2, 3e-2, 0.99, 1e-3, 1e-2),
            Budget("int8", 3e-2, 1e-1, 0.97, 1e-2, 1e-1),
        )
    }
)


def find_budget(precision: str) -> Budget:
    """The budget of a precision.

    Raises:
        InputError: there is none.
    """
    if precision not in BUDGETS:
        raise InputError(
            f"There is no parity budget for precision {precision!r}; there is one for: {', '.join(BUDGETS)}."
        )
    return BUDGETS[precision]
