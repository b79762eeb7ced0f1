"""The parity budgets: the one table that decides whether an artifact is the model."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from nsm.errors import InputError
from nsm.results import AcceptedBudget
from nsm.spec import StepSpec


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


def parse_budgets(texts: Iterable[str]) -> tuple[AcceptedBudget, ...]:
    """Parse values of `--budget`: NAME=VALUE or NAME=abs:VALUE.

    Raises:
        InputError: another form, a value that is not above 0, or two budgets of one tensor.
    """
    found = []
    for text in texts:
        name, equals, value = text.rpartition("=")
        absolute = value.startswith("abs:")
        try:
            limit = float(value.removeprefix("abs:"))
        except ValueError:
            limit = math.nan
        if not name or not equals or not 0.0 < limit < math.inf:
            raise InputError(
                "--budget expects NAME=VALUE or NAME=abs:VALUE with a value above 0, such as outputs=1e-3; given "
                f"{text!r}."
            )
        found.append(AcceptedBudget(name, limit, absolute))
    names = [item.tensor for item in found]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise InputError(f"--budget is given twice for {twice}. Give it once.")
    return tuple(found)


def check_budgets(accepted: Iterable[AcceptedBudget], spec: StepSpec) -> None:
    """Raise `InputError` if a budget is of a tensor that is no output and no floating-point state of the model."""
    known = [item.name for item in spec.entry("step").outputs]
    known += [state.name for state in spec.states if state.numpy_dtype.kind == "f"]
    for item in accepted:
        if item.tensor not in known:
            raise InputError(f"--budget names {item.tensor!r}; expected an output or a state: {', '.join(known)}.")
