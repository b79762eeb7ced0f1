"""The parity budgets: the one table that decides whether an artifact is the model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from nsm.errors import InputError


@dataclass(frozen=True)
class Budget:
    """Limits of a precision. Errors are relative; a limit applies to the worst tensor, states included.

    Args:
        one_step_p99: 99th percentile of the one-step error.
        free_run_p99: 99th percentile of the free-run error.
        agreement: minimum share of tokens with the reference's argmax; excused changes count as agreement.
        kl_mean, kl_p999: mean and 99.9th percentile of KL(reference || target), in nats.
    """

    precision: str
    one_step_p99: float
    free_run_p99: float
    agreement: float
    kl_mean: float
    kl_p999: float


# fp32: rounding of a few 1e-7 per operation, summed over the linear ops of a chunk and up to ten layers, stays under
# 1e-5 in one step; a non-expansive state may accumulate ten steps of it. KL is about half the squared logit error.
# fp16 rounds by 5e-4, bf16 by 4e-3 in each linear op, and int8 by a 254th of the range; the KL follows from the logit
# error. The state stays fp32 in all of them, so a stream forgets these errors instead of accumulating them.
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
    """Return the budget of a precision.

    Raises:
        InputError: the precision has no budget.
    """
    if precision not in BUDGETS:
        raise InputError(f"No parity budget for the precision {precision!r}; expected one of: {', '.join(BUDGETS)}.")
    return BUDGETS[precision]
