"""`--state past=present[:init]`: the input and the output of a state, and its initial value."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from nsm.errors import InputError
from nsm.files import open_regular, read_npy
from nsm.trace import Array, read_arrays

ZEROS = "zeros"


@dataclass(frozen=True)
class StateOption:
    """One state, named by the user or found by a convention.

    Args:
        past: name of the input.
        present: name of the output, or its place among the outputs ("1").
        init: a .npy file with the value before the first step, of one stream; or "zeros".
        found: how it was found, for people.
        key: of a bundle's own file of initial values, which `init` is then: the value in it, for all its lanes.
        value: instead of `init`: the value before the first step, of one stream or several that start alike.
    """

    past: str
    present: str
    init: str = ZEROS
    found: str = "--state"
    key: str | None = None
    value: Array | None = None

    def initial(self, shape: tuple[int, ...], dtype: str) -> Array:
        """The value before the first step.

        Raises:
            InputError: the file cannot be read, or holds something else.
        """
        if self.value is not None:
            return _fitting(_first_lane(self.value, shape), shape, dtype, f"the default value of the input {self.past}")
        if self.init == ZEROS:
            return np.zeros(shape, dtype)
        try:
            if self.key is None:
                array = read_npy(Path(self.init))
            else:
                with open_regular(Path(self.init), "arrays") as file:
                    array = _first_lane(read_arrays(file)[self.key], shape)
        except Exception as error:  # on damaged files numpy and zipfile raise whatever they stumble over
            raise InputError(
                f"The initial value of the state {self.past} cannot be read from {self.init}: {error}. Expected a "
                ".npy file written by numpy.save, or the word zeros: --state PAST=PRESENT:FILE.npy"
            ) from error
        return _fitting(array, shape, dtype, f"the initial value of the state {self.past} in {self.init}")


def _fitting(array: Array, shape: tuple[int, ...], dtype: str, what: str) -> Array:
    if array.shape != shape or array.dtype.kind != np.dtype(dtype).kind or not np.isfinite(array).all():
        raise InputError(
            f"{what[0].upper()}{what[1:]} is {array.dtype}{list(array.shape)}; expected finite numbers, "
            f"{dtype}{list(shape)}: those of one stream."
        )
    return array.astype(dtype)


def _first_lane(array: Array, shape: tuple[int, ...]) -> Array:
    """One lane of a value for several, which all start alike."""
    for axis, size in enumerate(array.shape[: len(shape)]):
        if size != shape[axis] == 1:
            return array.take([0], axis)
    return array


def parse_states(texts: Iterable[str]) -> list[StateOption]:
    """The options as the command line gives them.

    Raises:
        InputError: one is no `past=present[:init]`, or a name stands twice.
    """
    found: list[StateOption] = []
    for text in texts:
        past, equals, rest = text.partition("=")
        # An output's name may hold colons (`while/Exit:0`), and an init is a file or a word.
        match = re.fullmatch(r"(.+):(zeros|[^:]+\.npy)", rest)
        present, init = match.groups() if match else (rest, ZEROS)
        if not past or not equals or not present:
            raise InputError(
                f"--state {text}: expected PAST=PRESENT or PAST=PRESENT:INIT, an input's name, the name or place of "
                "the output that the next step gets for it, and a .npy file or zeros. For instance: --state "
                "state=stateN"
            )
        found.append(StateOption(past, present, init))
    for what, names in (("input", [o.past for o in found]), ("output", [o.present for o in found])):
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise InputError(f"--state names the {what} {twice} twice; each belongs to one state.")
    return found


def parse_constants(texts: Iterable[str]) -> dict[str, str]:
    """`--constant NAME=VALUE`, by name.

    Raises:
        InputError: one is no such pair, or a name stands twice.
    """
    return _pairs(texts, "--constant", "NAME=VALUE, once for each input that never changes", "sr=16000")


def parse_shapes(texts: Iterable[str]) -> dict[str, str]:
    """`--shape NAME=SIZE,SIZE,...`, by name.

    Raises:
        InputError: one is no such pair, or a name stands twice.
    """
    return _pairs(texts, "--shape", "NAME=SIZES, once for each input with open axes", "input=batch,576")


def _pairs(texts: Iterable[str], option: str, expected: str, example: str) -> dict[str, str]:
    found: dict[str, str] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not name or not equals or not value or name in found:
            raise InputError(f"{option} {text}: expected {expected}. For instance: {option} {example}")
        found[name] = value
    return found
