"""Step: the interface of a foreign step for the examination; Keeps: further access to a Python module."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from nsm.spec import TensorSpec
from nsm.trace import Arrays

Results = tuple[Arrays, Arrays]
"""Outputs [B, K, ...] and states [B, ...] by name."""


@dataclass(frozen=True)
class Advice:
    """Remedies for faults, in the words of one way in.

    Args:
        samples: where made-up tokens give no finite numbers.
        length: where a length is built in.
        lanes: where streams are mixed.
        state: where something is kept from call to call.
        random: where random numbers are drawn.
        offline: how to have the step compared with the model's own forward.
        departs: where the step departs from it.
    """

    samples: str
    length: str
    lanes: str
    state: str
    random: str
    offline: str
    departs: str = ""


class Step(Protocol):
    """A foreign step: step(inputs, state) -> (outputs, state'), numpy arrays with the lanes first.

    Attributes:
        kind: its name in messages.
        inputs: one lane and one token of each, the main one first.
        outputs: names, the main one first.
        timed: whether a call takes any number of tokens; else it takes one.
        chunk: tokens of a usual call; 1 where it is not timed.
        lanes: the only number of streams side by side, None for any number.
        why: the reason, where `lanes` is 1.
        size: how many numbers the weights have.
        capacity: declared number of tokens per stream, if any.
        advice: remedies for faults.
    """

    @property
    def kind(self) -> str: ...
    @property
    def inputs(self) -> Sequence[TensorSpec]: ...
    @property
    def outputs(self) -> Sequence[str]: ...
    @property
    def timed(self) -> bool: ...
    @property
    def chunk(self) -> int: ...
    @property
    def lanes(self) -> int | None: ...
    @property
    def why(self) -> str: ...
    @property
    def size(self) -> int: ...
    @property
    def capacity(self) -> int | None: ...
    @property
    def advice(self) -> Advice: ...

    def initial(self, lanes: int) -> Arrays:
        """The states before the first token, [lanes, ...] by name."""
        ...

    def __call__(self, inputs: Mapping[str, object], state: Arrays) -> Results:
        """One call over inputs [B, K, *token]. The results are the caller's own.

        Raises:
            ConfigError, UnsupportedError: it fails; says on which shapes and why.
        """
        ...

    def suspects(self) -> list[str]:
        """Parts that make a stream depend on others, a phrase each."""
        ...

    def offline(self, inputs: Arrays) -> Arrays | None:
        """The main output [1, T, ...] of whole sequences [1, T, *token] by its name; None where nobody gave a way."""
        ...


@runtime_checkable
class Keeps(Protocol):
    """A step of Python, which may keep something between calls that is neither an argument nor a result."""

    def kept(self) -> Mapping[str, str]:
        """A digest of each buffer, tensor and number that it holds, by name."""
        ...

    def scramble(self, names: Sequence[str]) -> bool:
        """Overwrite the named values with ones that no model has; False if that is impossible."""
        ...

    def put_back(self) -> None:
        """Restore the values from the beginning of the examination."""
        ...

    def lend(self, names: Sequence[str]) -> None:
        """From now on, put these back after every call: they are written before they are read."""
        ...

    def drawn(self, inputs: Arrays, state: Arrays) -> list[str] | None:
        """Which modules draw random numbers in a call that its results depend on; None where none are drawn."""
        ...

    def written(self) -> list[str]:
        """Arguments that calls so far wrote into. It handed copies, and goes on doing so where there are any."""
        ...
