from __future__ import annotations

import inspect
import pickle
from pathlib import Path

import pytest

from nsm import errors
from nsm.errors import BuildError, NsmError

CLASSES = [item for item in vars(errors).values() if inspect.isclass(item) and issubclass(item, NsmError)]

# The table of exit codes in the documentation of the command line.
CODES = {
    "InputError": 2,
    "ConfigError": 2,
    "CheckpointError": 2,
    "SnapshotError": 2,
    "StreamError": 2,
    "NotCopyableError": 2,
    "OutputExistsError": 2,
    "UnsupportedError": 3,
    "MissingDependencyError": 3,
    "DeviceUnavailableError": 3,
    "BuildError": 4,
    "RunError": 4,
    "NonFiniteError": 4,
    "ParityError": 5,
    "SlowerError": 7,
    "BundleError": 6,
    "BundleDamagedError": 6,
    "BundleVersionError": 6,
}


def test_every_error_but_the_root_is_in_the_table() -> None:
    assert {item.__name__ for item in CLASSES} - {"NsmError"} == set(CODES)
    assert NsmError.exit_code not in (0, *CODES.values())


@pytest.mark.parametrize("name", CODES)
def test_an_error_knows_its_exit_code_and_keeps_its_message(name: str) -> None:
    kind = getattr(errors, name)
    error = kind("what was given, what was expected, what to do")
    assert isinstance(error, NsmError)
    assert error.exit_code == CODES[name]
    assert str(error) == "what was given, what was expected, what to do"
    assert kind.__doc__


def test_a_kind_of_error_has_the_exit_code_of_its_kind() -> None:
    for item in CLASSES:
        for base in item.__bases__:
            if issubclass(base, NsmError) and base is not NsmError:
                assert item.exit_code == base.exit_code


def test_a_failed_build_names_its_log() -> None:
    error = BuildError("The parser refused the graph.", Path("out/build.log"))
    assert error.log == Path("out/build.log")
    assert str(error) == "The parser refused the graph.\nThe builder's log: out/build.log"
    assert BuildError("The parser refused the graph.").log is None


@pytest.mark.parametrize("kind", [errors.InputError, errors.StreamError, errors.NonFiniteError])
def test_an_error_names_its_lanes(kind: type[errors.InputError] | type[errors.NonFiniteError]) -> None:
    assert kind("wrong").lanes == ()
    error = pickle.loads(pickle.dumps(kind("wrong", iter([1, 3]))))
    assert (str(error), error.lanes) == ("wrong", (1, 3))
