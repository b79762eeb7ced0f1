from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import pytest

from nsm.errors import InputError
from nsm.results import Ratio
from nsm.runtimes.bench.rounds import BLOCK, ROUNDS, SETTLE, bench, not_faster, paired_ratio
from nsm.trace import Array
from tests.runtimes.fake import CHUNK, ENTRIES, VOCABULARY, WIDTH, fake_session, fake_spec

LANES = 2
TOKENS = np.random.default_rng(0).integers(0, VOCABULARY, (3, LANES, CHUNK))
MILLI = 1e-3


class Clock:
    """What stands in for time.perf_counter."""

    now = 0.0


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(time, "perf_counter", lambda: clock.now)
    return clock


class Player:
    """Something steppable whose calls take what they are told to, and that writes down what is called.

    `step` and `decode` give the seconds of a call from how many there were since the reset.
    """

    def __init__(
        self,
        clock: Clock,
        step: Callable[[int], float] = lambda _: MILLI,
        decode: Callable[[int], float] = lambda _: MILLI,
        name: str = "a",
        log: list[str] | None = None,
        decodes: bool = True,
    ) -> None:
        self.spec = fake_spec(entries=ENTRIES if decodes else ("step",))
        self.given: list[tuple[str, Array]] = []
        self.name = name
        self._clock = clock
        self._seconds = {"step": step, "decode": decode}
        self._log = [] if log is None else log
        self._calls = 0

    def reset(self) -> None:
        self._calls = 0
        self._log.append(f"{self.name}: reset")

    def step(self, tokens: Array) -> None:
        self._call("step", tokens)

    def decode(self, tokens: Array) -> None:
        self._call("decode", tokens)

    def _call(self, entry: str, tokens: Array) -> None:
        self.given.append((entry, tokens))
        self._log.append(f"{self.name}: {entry}")
        self._clock.now += self._seconds[entry](self._calls)
        self._calls += 1


# -- turns -----------------------------------------------------------------------------------------------------------


def test_every_round_begins_with_another_session() -> None:
    log: list[str] = []
    players = [Player(Clock(), name=name, log=log, decodes=False) for name in "abc"]
    bench(players, ROUNDS * 4, TOKENS)
    turns = [line[0] for line in log if line.endswith("reset")]
    assert "".join(turns) == "abc" + "abc" + "bca" + "cab" + "abc" + "bca"


def test_a_turn_is_a_fresh_stream_of_steps_and_then_whole_chunks_of_single_tokens() -> None:
    log: list[str] = []
    count = 3 * CHUNK + 1
    bench([Player(Clock(), log=log)], ROUNDS * count, TOKENS)
    turn = [
        "reset",
        *["step"] * (SETTLE + count),
        "reset",
        *["decode"] * SETTLE,
        "reset",
        *["decode"] * 3 * CHUNK,
    ]
    assert [line.removeprefix("a: ") for line in log] == turn * (ROUNDS + 1)


@pytest.mark.parametrize("steps", [10, 33, ROUNDS * BLOCK, ROUNDS * BLOCK + 1, 20 * BLOCK + 7])
def test_as_many_calls_are_timed_as_were_asked_for_in_blocks_that_are_alike(steps: int) -> None:
    log: list[str] = []
    progress: list[tuple[int, int]] = []
    bench([Player(Clock(), log=log, decodes=False)], steps, TOKENS, lambda done, total: progress.append((done, total)))
    blocks = [len(block.split()) // 2 - SETTLE for block in " ".join(log).split("a: reset")[2:]]
    assert sum(blocks) == steps
    assert max(blocks) <= BLOCK
    assert max(blocks) - min(blocks) <= 1
    assert len(blocks) >= ROUNDS
    assert progress == [(index + 1, len(blocks)) for index in range(len(blocks))]


def test_real_inputs_are_taken_round_and_round() -> None:
    player = Player(Clock())
    bench([player], 4 * ROUNDS, TOKENS)
    turn = player.given[: len(player.given) // (ROUNDS + 1)]
    steps = [tokens for entry, tokens in turn if entry == "step"][SETTLE:]
    decodes = [tokens for entry, tokens in turn if entry == "decode"][SETTLE:]
    assert (len(steps), len(decodes)) == (4, CHUNK)
    for index, tokens in enumerate(steps):
        np.testing.assert_array_equal(tokens, TOKENS[index % 3])
    for index, tokens in enumerate(decodes):
        np.testing.assert_array_equal(tokens, TOKENS[0][:, index : index + 1])


def test_vectors_are_given_as_single_tokens_too(clock: Clock) -> None:
    player = Player(clock)
    vectors = np.random.default_rng(0).standard_normal((3, LANES, CHUNK, WIDTH)).astype(np.float32)
    bench([player], 4 * CHUNK * ROUNDS, vectors)
    turn = player.given[: len(player.given) // (ROUNDS + 1)]
    decodes = np.concatenate([tokens for entry, tokens in turn if entry == "decode"][SETTLE:], 1)
    stream = np.concatenate(list(vectors), 1)
    np.testing.assert_array_equal(decodes, np.concatenate([stream, stream[:, :CHUNK]], 1))


# -- numbers ---------------------------------------------------------------------------------------------------------


def test_times_are_those_of_the_calls_and_in_the_order_of_the_sessions(clock: Clock) -> None:
    fast, slow = bench([Player(clock), Player(clock, lambda _: 4 * MILLI, decodes=False)], 60, TOKENS)
    assert [fast.p50_us, fast.p90_us, fast.p99_us, fast.call_us] == pytest.approx([1000] * 4)
    assert [slow.p50_us, slow.p90_us, slow.p99_us, slow.call_us] == pytest.approx([4000] * 4)
    assert fast.rounds_us == pytest.approx([1000] * ROUNDS)
    assert fast.tokens_per_second == pytest.approx(LANES * CHUNK / MILLI)
    assert fast.decode is not None
    assert fast.decode.tokens_per_second == pytest.approx(LANES / MILLI)
    assert slow.decode is None


def test_calls_at_the_beginning_of_a_turn_do_not_count(clock: Clock) -> None:
    cold = Player(clock, lambda calls: 1.0 if calls < SETTLE else MILLI)
    (latency,) = bench([cold], 100, TOKENS)
    assert latency.p99_us == pytest.approx(1000)


def test_percentiles_are_those_of_all_timed_calls(clock: Clock) -> None:
    (latency,) = bench([Player(clock, lambda calls: (calls - SETTLE + 1) * MILLI)], ROUNDS * 20, TOKENS)
    wanted = np.quantile(np.tile(np.arange(1, 21), ROUNDS), (0.5, 0.9, 0.99)) * 1000
    assert [latency.p50_us, latency.p90_us, latency.p99_us] == pytest.approx(wanted)
    assert latency.rounds_us == pytest.approx([10_500] * ROUNDS)


def test_the_time_of_a_single_token_has_its_share_of_the_commits(clock: Clock) -> None:
    committing = Player(clock, decode=lambda calls: (9 if calls % CHUNK == CHUNK - 1 else 1) * MILLI)
    (latency,) = bench([committing], 20 * CHUNK, TOKENS)
    decode = latency.decode
    assert decode is not None
    assert decode.p50_us == pytest.approx(1000)
    assert decode.p99_us == pytest.approx(9000)
    assert decode.call_us == pytest.approx((CHUNK - 1 + 9) / CHUNK * 1000)
    assert decode.rounds_us == pytest.approx([decode.call_us] * len(decode.rounds_us))
    assert decode.tokens_per_second == pytest.approx(LANES / decode.call_us * 1e6)


def test_a_real_session_can_be_measured_from_wherever_it_stands() -> None:
    session = fake_session()
    session.step(TOKENS[0], [1, 1])
    (latency,) = bench([session], 20, TOKENS)
    assert 0 < latency.p50_us <= latency.p90_us <= latency.p99_us
    assert latency.tokens_per_second == pytest.approx(LANES * CHUNK / latency.p50_us * 1e6)
    assert latency.decode is not None
    assert latency.decode.p50_us > 0


# -- ratios ----------------------------------------------------------------------------------------------------------


def test_a_ratio_is_taken_within_each_round(clock: Clock) -> None:
    """On a machine that slows down from round to round by far more than the two differ."""
    turns = 0

    class Slowed(Player):
        def reset(self) -> None:
            nonlocal turns
            super().reset()
            turns += 1

    def load() -> float:
        return (1 + (turns - 1) // 2) * MILLI  # both turns of a round are equally slow

    def seconds(factor: float) -> Callable[[int], float]:
        return lambda _: factor * load()

    players = [Slowed(clock, seconds(factor), decodes=False) for factor in (1.0, 1.25)]
    first, second = bench(players, 100, TOKENS)
    assert max(first.rounds_us) > 2 * min(first.rounds_us)
    ratio = paired_ratio(second.rounds_us, first.rounds_us)
    assert [ratio.low, ratio.median, ratio.high] == pytest.approx([1.25] * 3)


def test_a_ratio_has_an_interval_that_holds_the_truth_about_as_often_as_it_says() -> None:
    generator = np.random.default_rng(1)
    held = []
    for _ in range(300):
        machine = generator.lognormal(0, 1, 20)
        a, b = (machine * generator.lognormal(0, 0.1, 20) for _ in range(2))
        ratio = paired_ratio(1.1 * a, b)
        assert ratio.low <= ratio.median <= ratio.high
        held.append(ratio.low <= 1.1 <= ratio.high)
    assert 0.9 <= np.mean(held) <= 0.99


def test_the_interval_is_narrower_with_more_rounds() -> None:
    noise = np.random.default_rng(2).lognormal(0, 0.1, (2, 400))
    few, many = (paired_ratio(noise[0, :count], noise[1, :count]) for count in (20, 400))
    assert many.high - many.low < (few.high - few.low) / 2


def test_a_ratio_is_the_same_every_time_and_inverts() -> None:
    a, b = np.random.default_rng(3).lognormal(0, 0.2, (2, 11))
    ratio = paired_ratio(a, b)
    assert ratio == paired_ratio(list(a), list(b))
    inverse = paired_ratio(b, a)
    assert [1 / inverse.high, 1 / inverse.median, 1 / inverse.low] == pytest.approx(
        [ratio.low, ratio.median, ratio.high]
    )
    assert paired_ratio([2.0, 4.0], [1.0, 2.0]) == Ratio(2.0, 2.0, 2.0)


@pytest.mark.parametrize(
    ("a", "b"), [([1.0, 2.0], [1.0, 2.0, 3.0]), ([1.0], [1.0]), ([], []), ([[1.0, 2.0]], [[1.0, 2.0]])]
)
def test_rounds_that_do_not_pair_are_refused(a: list[float], b: list[float]) -> None:
    with pytest.raises(InputError, match="times of the same rounds of both, at least 2; given shapes"):
        paired_ratio(a, b)


@pytest.mark.parametrize("wrong", [0.0, -1.0, float("nan"), float("inf")])
def test_times_that_are_none_are_refused(wrong: float) -> None:
    with pytest.raises(InputError, match="needs times above 0"):
        paired_ratio([1.0, 2.0], [1.0, wrong])


# -- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [9, 0, -1])
def test_too_few_steps_are_refused(steps: int) -> None:
    with pytest.raises(InputError, match=f"at least 10 steps; given {steps}"):
        bench([fake_session()], steps, TOKENS)


def test_a_benchmark_without_inputs_or_sessions_is_refused() -> None:
    with pytest.raises(InputError, match="given 1 sessions and inputs for 0 steps"):
        bench([fake_session()], 10, TOKENS[:0])
    with pytest.raises(InputError, match="given 0 sessions and inputs for 3 steps"):
        bench([], 10, TOKENS)


GAIN, LOSS, UNSURE = Ratio(1.5, 1.4, 1.6), Ratio(0.5, 0.4, 0.6), Ratio(0.98, 0.9, 1.1)


@pytest.mark.parametrize(
    ("step", "decode", "short"),
    [
        (GAIN, None, []),
        (GAIN, GAIN, []),
        (GAIN, UNSURE, []),  # no difference was found
        (GAIN, LOSS, ["decode"]),
        (UNSURE, GAIN, ["step"]),  # it has to gain
        (Ratio(1.0, 0.9, 1.1), None, ["step"]),
        (LOSS, LOSS, ["step", "decode"]),
    ],
)
def test_low_precision_gains_in_step_and_does_not_pay_in_decode(
    step: Ratio, decode: Ratio | None, short: list[str]
) -> None:
    given = {"step": step, "decode": decode}
    assert not_faster(step, decode) == {entry: given[entry] for entry in short}
