"""Experiments on whole streams: until all buffers are full, repeated; hidden values; which states are read."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from nsm.adapters.validate.step import Keeps
from nsm.adapters.validate.subject import Skipped, Subject, Trace, difference, shown
from nsm.errors import ConfigError, NsmError, UnsupportedError
from nsm.results import Message
from nsm.trace import Array, Arrays

CALLS, CALLS_OF_LARGE = 64, 52
"""Calls of the shortest trace: a Python counter may change the behaviour at call 50."""
AFTER = 16
"""Tokens that are run when nothing fills any more, so that a ring wraps around."""
WORK = 1e10
"""Numbers that weights and states may be read in all while states fill."""
FEWEST, MOST = 128, 1024
"""Tokens that a trace may take at most, of a large model and of a small one."""


def fill(subject: Subject) -> None:
    """Run until all states are filled: rings, caches, masks, and values that depend on them."""
    step, start = subject.step, subject.start()
    numbers = step.size + 4 * sum(value.size for value in start.values())
    most = int(np.clip(WORK / max(numbers, 1), FEWEST, MOST))
    fresh = {name: np.ones(value.shape, bool) for name, value in start.items()}
    sizes: list[int] = []
    outputs: list[Arrays] = []
    states: dict[int, Arrays] = {}
    early, state, token, filled, enough = (start, 0), start, 0, 0, False
    calls = CALLS_OF_LARGE if subject.large else CALLS
    for size in _sizes(subject.chunk, calls):
        if not subject.fits(token, size):
            break
        try:
            given, state = subject.alone(subject.tokens(0, token, size), state)
        except NsmError as error:
            _end(subject, token, state, error)
            break
        sizes.append(size)
        token += size
        if len(sizes) <= calls:
            outputs.append(given)
            if len(sizes) in (1, 8, calls):
                states[len(sizes)] = state
        if len(sizes) == 3:
            early = (state, token)
        for name, left in fresh.items():
            still = left & (state[name] == start[name])
            if not np.array_equal(still, left):
                fresh[name], filled = still, token
        full = not any(left.any() for left in fresh.values())
        enough = token >= filled + AFTER if full else _stalled(token, filled)
        if len(sizes) >= calls and (enough or token >= most):
            break
    filling = () if enough else tuple(name for name, left in fresh.items() if left.any())
    if filling and subject.fits(token, subject.chunk):
        subject.messages.append(
            Message(
                f"the states {shown(filling)} are still filling after {token} tokens, where the examination ends. The "
                "step was not examined with full states. Compare longer streams: --golden-steps",
                "warning",
            )
        )
    # Other experiments go on from here: where the stream ends before that, from earlier.
    room = AFTER + 3 * subject.chunk
    further = _further(subject, state, token, room)
    late = (state, token) if subject.reach is None else _earlier(subject, sizes, max(0, subject.reach - room))
    subject.trace = Trace(tuple(sizes[:calls]), tuple(outputs), states, early, late, filled, further)


def _further(subject: Subject, state: Arrays, token: int, room: int) -> int:
    """How many tokens a stream takes, up to `room` more; sets the reach where it ends."""
    end = token + room
    while token < end and subject.fits(token, 1):
        size = subject.chunk if subject.fits(token, subject.chunk) else 1
        try:
            _, state = subject.alone(subject.tokens(0, token, size), state)
        except NsmError as error:
            _end(subject, token, state, error)
            break
        token += size
    return token


def _end(subject: Subject, token: int, state: Arrays, error: NsmError) -> None:
    """Set the reach where a stream fails, if an integer state counts, as the position in a table does; else raise."""
    start = subject.start()
    if not any(value.dtype.kind in "iu" and bool((state[name] > value).any()) for name, value in start.items()):
        raise error
    subject.reach = token
    cause = str(error.__cause__ or error)
    subject.messages.append(
        Message(
            f"{subject.step.kind} fails after {token} tokens of a stream, where a table or cache ends "
            f"({cause.splitlines()[0] if cause else type(error).__name__}). It was examined up to there."
        )
    )


def _earlier(subject: Subject, sizes: list[int], most: int) -> tuple[Arrays, int]:
    """The state after up to `most` tokens, in calls of the same sizes: so that there is room for more."""
    state, token = subject.start(), 0
    for size in sizes:
        if token + size > most:
            break
        _, state = subject.alone(subject.tokens(0, token, size), state)
        token += size
    return state, token


def _sizes(chunk: int, calls: int) -> Iterator[int]:
    """Tokens of one call after the other: mostly one at first, then whole calls."""
    for call in range(calls - 8):
        yield chunk if call % 16 == 15 else 1
    while True:
        yield chunk


def _stalled(token: int, filled: int) -> bool:
    """Whether nothing changed for as long as the stream had run before, so that nothing further will."""
    return token - filled >= max(CALLS, filled)


def kept(subject: Subject) -> Skipped | None:
    """Nothing is kept that is neither an argument nor a result: buffers, attributes, objects in attributes."""
    step = subject.step
    if not isinstance(step, Keeps):
        return Skipped("a graph keeps nothing to itself")
    before, now = subject.kept, step.kept()
    changed = [name for name in {**before, **now} if before.get(name) != now.get(name)]
    if not changed:
        return None
    if not _overwritten(subject, step, changed):
        hint = "; ".join(step.suspects())
        raise UnsupportedError(
            f"{step.kind} keeps its attributes {shown(changed)} from one call to the next, which no exported graph "
            f"does. {f'{hint}. ' if hint else ''}{step.advice.state}"
        )
    subject.lent = changed
    step.lend(changed)
    subject.messages.append(
        Message(
            f"{step.kind} writes its attributes {shown(changed)} before it reads them in every call: they are no state."
        )
    )
    return None


def _overwritten(subject: Subject, keeps: Keeps, names: list[str]) -> bool:
    """Whether calls give the same, and leave the same in `names`, whatever was there before."""
    assert subject.trace is not None
    trace = subject.trace
    calls = [(subject.start(), 0, 1), (*trace.early, subject.chunk), (*trace.late, 1)]
    for state, token, size in calls:
        if not subject.fits(token, size):
            continue
        inputs = subject.tokens(0, token, size)
        wanted, left = subject.alone(inputs, state), keeps.kept()
        try:
            if not keeps.scramble(names):
                return False
            given = subject.alone(inputs, state)
        except NsmError:  # it failed on a value that it should not have read
            keeps.put_back()
            return False
        after = keeps.kept()
        if difference(given, wanted) or any(after.get(name) != left.get(name) for name in names):
            keeps.put_back()
            return False
    return True


def repeat(subject: Subject) -> None:
    """The same stream gives the same once more, call by call."""
    step, trace = subject.step, subject.trace
    assert trace is not None
    for call, (outputs, state) in enumerate(subject.run(0, 0, trace.sizes, subject.start())):
        found = difference((outputs, state), (trace.outputs[call], trace.states.get(call + 1, state)))
        if not found:
            continue
        if isinstance(step, Keeps) and _again(subject):
            cause = "It keeps something that is no attribute of the module either (a global, a closure)."
        else:
            cause = "It draws random numbers (dropout exported in train mode, rand in forward), or keeps something."
        raise UnsupportedError(
            f"{step.kind} gives another {found} at call {call + 1} when the same stream is run again from its "
            f"beginning. {cause} {step.advice.state}"
        )


def _again(subject: Subject) -> bool:
    """Whether a call made twice gives the same."""
    one, two = (subject.alone(subject.tokens(0, 0, 1), subject.start()) for _ in range(2))
    return not difference(one, two)


def read(subject: Subject) -> None:
    """Every state is read: another value of it changes an output or a state."""
    assert subject.trace is not None
    start, late = (subject.start(), 0), subject.trace.late
    unread = [
        name
        for name in start[0]
        if not any(_matters(subject, *moment, name, late[0][name]) for moment in (start, subject.trace.early, late))
    ]
    if unread:
        raise ConfigError(
            f"{subject.step.kind} never reads its states {shown(unread)}: whatever is in them, outputs and states are "
            "the same. Are states and arguments in the same order? A state that the model does not need is left out; "
            "what is only looked at from outside is an output. Where an exporter is given one tensor for two "
            "arguments, it may take them for one: export again with a tensor of its own for each."
        )


def _matters(subject: Subject, state: Arrays, token: int, name: str, other: Array) -> bool:
    """Whether another value of a state changes any result of a call, bit by bit."""
    inputs = subject.tokens(0, token, 1)
    wanted = subject.alone(inputs, state)
    try:
        given = subject.alone(inputs, {**state, name: _another(state[name], other)})
    except NsmError:  # an integer out of its range
        return True
    return any(not np.array_equal(part[key], old[key]) for part, old in zip(given, wanted, strict=True) for key in old)


def _another(value: Array, other: Array) -> Array:
    """A value that differs everywhere; of integers one that the stream has, where there is one."""
    if value.dtype.kind == "b":
        return ~value
    if value.dtype.kind != "f":
        return other if not np.array_equal(other, value) else (value + 1).astype(value.dtype)
    scale = max(float(np.abs(value).max(initial=0)), 1.0)
    random = np.random.default_rng(0).standard_normal(value.shape)
    return (value + scale * np.where(random < 0, random - 0.1, random + 0.1)).astype(value.dtype)
