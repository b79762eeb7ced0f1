"""How to add a backend, as CONTRIBUTING.md says it: a builder, a loader and a row, and every command knows it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

import nsm
from nsm.bundle import Bundle
from nsm.runtimes import targets
from tests.export.builders.numpy_target import ROW
from tests.export.helpers import invoke, refused, short, spoil, succeeded, the_json
from tests.small_models import make_sequences


@pytest.fixture(scope="module", autouse=True)
def _added() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(targets._ROWS, ROW.name, ROW)
        yield


@pytest.fixture
def made(checkpoint: Path, ready_graph: Callable[[float], None], tmp_path: Path) -> Path:
    """Exported for it."""
    ready_graph(1.0)
    succeeded(invoke(*short(checkpoint, tmp_path / "made.nsm", "-t", "np")))
    return tmp_path / "made.nsm"


def test_it_is_exported_and_compared(made: Path) -> None:
    artifact = Bundle(made).artifact("numpy")
    assert [record.path for record in artifact.files] == [
        f"numpy/{entry}.whole" for entry in ("step", "decode", "commit")
    ]
    assert (artifact.parity.status, artifact.notes) == ("passed", ("it is slow",))
    shown = succeeded(invoke("parity", made, "-t", "numpy", "--json"))
    assert '"passed": true' in shown
    inspected = the_json(invoke("inspect", made, "--json"))["artifacts"]
    assert [item["target"] for item in inspected] == ["numpy"]
    assert "numpy" in succeeded(invoke("inspect", made))


def test_it_streams_as_others_do(made: Path, exported: Path) -> None:
    tokens = make_sequences(2, 19)
    with nsm.open(made, "np") as session, nsm.open(exported, "onnx") as other:
        given, wanted = (opened.feed(tokens, [19, 4])["outputs"] for opened in (session, other))
        np.testing.assert_allclose(given, wanted, rtol=1e-4, atol=1e-6)
        other.restore(session.snapshot())
        given, wanted = (opened.feed(tokens, [5, 9])["outputs"] for opened in (session, other))
        np.testing.assert_allclose(given, wanted, rtol=1e-4, atol=1e-6)


# Run by Python whenever it starts: the row is in the table of other processes too, as if it had been written there.
_IN_OTHERS = """
from nsm.runtimes import targets
from tests.export.builders.numpy_target import ROW
targets._ROWS[ROW.name] = ROW
"""


def test_it_is_measured_and_run(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sitecustomize.py").write_text(_IN_OTHERS)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{Path(__file__).resolve().parents[3]}")
    (measured,) = the_json(invoke("bench", made, "-t", "numpy", "--steps", "10", "--json"))["results"]
    assert measured["target"] == "numpy"
    assert measured["latency_us"]["p50"] > 0
    assert the_json(invoke("run", made, "--output", tmp_path / "out.npz", "--json"))["target"] == "numpy"


def test_it_is_built_into_a_bundle_that_is_there(
    checkpoint: Path, ready_graph: Callable[[float], None], tmp_path: Path
) -> None:
    ready_graph(1.0)
    path = tmp_path / "there.nsm"
    succeeded(invoke(*short(checkpoint, path, "-t", "onnx")))
    (built,) = the_json(invoke("build", path, "-t", "numpy", "--json"))["artifacts"]
    assert built["parity"]["status"] == "passed"
    spoil(path)  # another model under this name
    refused(invoke("build", path, "-t", "numpy", "--force"), 5, "numpy")


def test_what_it_cannot_do_is_refused_by_its_name(made: Path, tmp_path: Path) -> None:
    refused(invoke("parity", made, "-t", "numpy", "--bisect"), 3, "numpy shows no intermediate results")
    refused(invoke("build", made, "-t", "numpy", "-p", "int8"), 3, "numpy is not built in int8")
    refused(invoke("bench", made, "-t", "pandas"), 2, "numpy (np)")
    assert "numpy" in the_json(invoke("doctor", "--json"))["targets"]
