"""Counters are found and moved on; where a model ends, and where a target departs, is found to the token."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from nsm.errors import RunError
from nsm.runtimes.limits.counters import Counters, observe, reach
from nsm.runtimes.limits.search import Limit, assumed_limit, find_limit
from nsm.runtimes.parity.budgets import BUDGETS
from nsm.spec import StepSpec
from nsm.trace import Array, Arrays
from tests.runtimes.counting import Step, counting_session, counting_spec, tokens_of

FP32 = BUDGETS["fp32"]
SCALAR = {"n": ("int64", ()), "h": ("float32", ())}


def counted(step: Step, spec: StepSpec) -> Counters:
    found, failed = observe(counting_session(step, spec), tokens_of(spec))
    assert found is not None
    assert failed is None
    return found


def ended(step: Step, spec: StepSpec) -> tuple[Counters | None, int | None]:
    return reach(counting_session(step, spec), counted(step, spec), tokens_of(spec)[0])


def remainder(growth: int, exact: bool = True) -> Step:
    """A phase of n % 1000; through float32 where it is not exact, as OpenVINO on the CPU."""

    def step(tokens: Array, state: Arrays) -> tuple[Array, Arrays]:
        n = state["n"]
        phase = (n if exact else n.astype(np.float32).astype(np.int64)) % 1000 / 1000
        h = np.tanh(0.5 * state["h"] + tokens.mean(1) + phase).astype(np.float32)
        return np.repeat(h[:, None, None], tokens.shape[1], 1), {"n": n + growth * tokens.shape[1], "h": h}

    return step


def table(size: int) -> Step:
    """Adds up rows of a table, one a token: IndexError behind the last."""
    rows = np.random.default_rng(1).standard_normal(size).astype(np.float32)

    def step(tokens: Array, state: Arrays) -> tuple[Array, Arrays]:
        places = state["n"][:, None] + np.arange(tokens.shape[1])
        outputs = tokens + rows[places]
        return outputs[..., None], {"n": state["n"] + tokens.shape[1], "h": outputs[:, -1]}

    return step


@pytest.mark.parametrize("length", [1, 4])
@pytest.mark.parametrize("growth", [1, 441])
def test_a_counter_is_found_with_its_growth(growth: int, length: int) -> None:
    spec = counting_spec(SCALAR, length=length)
    found = counted(remainder(growth), spec)
    assert set(found.growth) == {"n"}
    assert found.per_token() == {"n": growth}
    position = 10**9
    np.testing.assert_array_equal(found.at(position)["n"], [growth * position] * 2)
    np.testing.assert_array_equal(found.at(position)["h"], found.states["h"])
    assert found.furthest >= 7 * 24 * 3600 * 100 * length
    reached = found.reaching(2**24)
    assert found.at(reached)["n"].max() >= 2**24 > found.at(reached - length)["n"].max()


def falling(tokens: Array, state: Arrays) -> tuple[Array, Arrays]:
    return tokens[..., None], {"n": state["n"] - 1, "h": state["h"]}


def random_ids(tokens: Array, state: Arrays) -> tuple[Array, Arrays]:
    """The last token as an id: it rises and falls."""
    return tokens[..., None], {"n": (1000 * np.abs(tokens[:, 0])).astype(np.int64), "h": state["h"]}


@pytest.mark.parametrize("step", [falling, random_ids])
def test_what_does_not_grow_is_no_counter(step: Step) -> None:
    spec = counting_spec(SCALAR)
    assert observe(counting_session(step, spec), tokens_of(spec)) == (None, None)


def test_a_model_without_whole_numbers_is_not_run() -> None:
    spec = counting_spec({"h": ("float32", ())})
    session = counting_session(falling, spec)
    assert observe(session, tokens_of(spec)) == (None, None)
    assert session.runtime.calls == 0  # type: ignore[attr-defined]


def test_a_counter_that_grows_now_and_then_is_moved_by_its_largest_growth() -> None:
    def step(tokens: Array, state: Arrays) -> tuple[Array, Arrays]:
        n = state["n"] + 1
        return tokens[..., None], {"n": n, "hops": n // 2, "h": state["h"]}

    spec = counting_spec({**SCALAR, "hops": ("int64", ())})
    found = counted(step, spec)
    assert found.steady == {"n"}
    assert found.per_token() == {"n": 1}
    assert found.at(1000)["hops"].min() >= 500


@pytest.mark.parametrize(("size", "length"), [(3, 1), (8, 1), (9, 1), (100, 1), (100, 4), (102, 4), (70_000, 16)])
def test_the_end_of_a_table_is_found_to_the_token(size: int, length: int) -> None:
    spec = counting_spec(SCALAR, length=length)
    session, tokens = counting_session(table(size), spec), tokens_of(spec)
    counters, failed = observe(session, tokens)
    assert counters is not None
    capacity = counters.position if failed is not None else reach(session, counters, tokens[0])[1]
    assert capacity == size
    session.reset()
    for _ in range(capacity // length):
        session.step(tokens[0])
    with pytest.raises(RunError, match="failed"):
        session.step(tokens[0])


@pytest.mark.parametrize("size", [9, 1000, 100_000])
def test_the_place_in_a_ring_has_no_end(size: int) -> None:
    """Its value is never `size`, from where it would be an index that there is not."""
    rows = np.zeros(size, np.float32)

    def step(tokens: Array, state: Arrays) -> tuple[Array, Arrays]:
        return (tokens + rows[state["n"]][:, None])[..., None], {"n": (state["n"] + 1) % size, "h": state["h"]}

    assert ended(step, counting_spec(SCALAR)) == (None, None)


def test_a_ring_beside_a_counter_leaves_the_counter() -> None:
    def step(tokens: Array, state: Arrays) -> tuple[Array, Arrays]:
        after = {"place": (state["place"] + 1) % 100, "n": state["n"] + 1, "h": state["h"]}
        return tokens[..., None], after

    counters, capacity = ended(step, counting_spec({**SCALAR, "place": ("int64", ())}))
    assert capacity is None
    assert counters is not None
    assert set(counters.growth) == {"n"}


def test_a_position_that_stays_at_the_last_place_is_the_models_own_way() -> None:
    def step(tokens: Array, state: Arrays) -> tuple[Array, Arrays]:
        return tokens[..., None], {"n": np.minimum(state["n"] + 1, 63), "h": state["h"]}

    assert ended(step, counting_spec(SCALAR)) == (None, None)


def limit_of(reference: Step, target: Step, capacity: int | None = None, **changes: Any) -> Limit | None:
    spec = counting_spec(changes.pop("states", SCALAR), **changes)
    counters, _ = ended(reference, spec)
    assert counters is not None
    pair = counting_session(reference, spec), counting_session(target, spec)
    return find_limit(*pair, counters, tokens_of(spec)[0], FP32, capacity)


@pytest.mark.parametrize(("growth", "length"), [(441, 1), (1, 1), (441, 4)])
def test_a_target_that_rounds_is_limited_before_the_first_wrong_number(growth: int, length: int) -> None:
    limit = limit_of(remainder(growth), remainder(growth, exact=False), length=length)
    assert limit is not None
    first_wrong = 2**24 // growth
    assert first_wrong - 16 * length < limit.tokens <= first_wrong + length
    assert "is off by" in limit.cause


def test_a_target_that_is_exact_has_no_limit() -> None:
    assert limit_of(remainder(441), remainder(441)) is None


def test_integers_of_32_bits_are_a_limit() -> None:
    def narrow(tokens: Array, state: Arrays) -> tuple[Array, Arrays]:
        outputs, after = remainder(1)(tokens, state)
        return outputs, {**after, "n": np.minimum(after["n"], 2**31 - 1)}

    limit = limit_of(remainder(1), narrow)
    assert limit is not None
    assert 2**31 - 16 < limit.tokens < 2**31
    assert limit.cause == "state n is off by 1"


def test_a_fault_between_the_thresholds_is_searched_for() -> None:
    start = 5_000_000

    def late(tokens: Array, state: Arrays) -> tuple[Array, Arrays]:
        outputs, after = remainder(1)(tokens, state)
        return outputs + (state["n"] > start)[:, None, None], after

    limit = limit_of(remainder(1), late)
    assert limit is not None
    assert start - 8 < limit.tokens <= start + 1


def test_the_last_call_within_the_capacity_is_compared() -> None:
    def short(tokens: Array, state: Arrays) -> tuple[Array, Arrays]:
        outputs, after = table(100)(tokens, state)
        return outputs * np.where(state["n"] >= 90, 2, 1)[:, None, None], after

    assert limit_of(table(100), table(100), 100) is None
    limit = limit_of(table(100), short, 100)
    assert limit is not None
    assert 86 < limit.tokens <= 90


def test_a_target_that_raises_is_limited_before_it_does() -> None:
    def raises(tokens: Array, state: Arrays) -> tuple[Array, Arrays]:
        if (state["n"] >= 2**25).any():
            raise IndexError("no such place\nin a table")
        return remainder(1)(tokens, state)

    limit = limit_of(remainder(1), raises)
    assert limit is not None
    assert 2**25 - 16 < limit.tokens <= 2**25
    assert limit.cause == "the target fails: step failed: no such place"


def test_a_counter_ends_with_its_dtype() -> None:
    states = {"n": ("int32", ()), "h": ("float32", ())}

    def step(tokens: Array, state: Arrays) -> tuple[Array, Arrays]:
        return tokens[..., None], {"n": state["n"] + np.int32(1000), "h": state["h"]}

    counters, capacity = ended(step, counting_spec(states))
    assert capacity is None
    assert counters is not None
    assert counters.at(counters.furthest)["n"].max() <= 2**31 - 1 - 2000
    assert counters.furthest == (2**31 - 1) // 1000 - 2
    limit = limit_of(step, step, states=states)
    assert limit == Limit(counters.furthest + 1, "the state n is at the end of int32")


def test_what_cannot_be_compared_is_limited_where_float32_ends() -> None:
    limit = assumed_limit(counted(remainder(441), counting_spec(SCALAR)))
    assert limit.tokens == 2**24 // 441
    assert "not compared" in limit.cause
