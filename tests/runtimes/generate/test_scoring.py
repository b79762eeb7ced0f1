from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from nsm.errors import InputError
from nsm.runtimes.generate import scoring
from nsm.runtimes.generate.scoring import predicts, score
from nsm.runtimes.session.session import Session
from nsm.trace import Array
from tests.runtimes.fake import CHUNK, OUTPUTS, WIDTH, FakeRuntime, fake_initial, fake_session, fake_spec


@pytest.fixture(autouse=True)
def _short_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scoring, "PIECE", CHUNK)


def predictor() -> tuple[Session, FakeRuntime]:
    """A fake that answers ids with logits for the next one."""
    spec = fake_spec()
    entries = []
    for entry in spec.entries:
        inputs = tuple(replace(i, maximum=OUTPUTS - 1) if i.name == "tokens" else i for i in entry.inputs)
        entries.append(replace(entry, inputs=inputs))
    spec = replace(spec, entries=tuple(entries))
    runtime = FakeRuntime(spec)
    return Session(runtime, spec, fake_initial(spec), "f", "fake"), runtime


@pytest.mark.parametrize("place", [0, CHUNK - 1, CHUNK, 2 * CHUNK, 3 * CHUNK - 1])
@pytest.mark.parametrize("bad", [OUTPUTS, 99, -1])
def test_an_id_outside_the_vocabulary_is_refused_before_anything_is_fed(place: int, bad: int) -> None:
    """Also the first one of a piece, which is looked up in the logits of the piece before."""
    session, runtime = predictor()
    assert predicts(session)
    sequence = np.arange(3 * CHUNK) % OUTPUTS
    assert score(session, sequence)["tokens"] == 3 * CHUNK
    runtime.called.clear()
    sequence[place] = bad
    with pytest.raises(InputError, match=rf"tokens must lie in 0 \.\. {OUTPUTS - 1}"):
        score(session, sequence)
    assert not runtime.called


def test_vectors_are_checked_as_a_whole() -> None:
    session = fake_session(fake_spec(vectors=True))
    sequence = np.ones((3 * CHUNK, WIDTH))
    assert score(session, sequence)["tokens"] == 3 * CHUNK
    before = session.read_state()
    sequence[2 * CHUNK + 1, 0] = np.nan
    with pytest.raises(InputError, match=f"token {2 * CHUNK + 1} of lane 0 is NaN"):
        score(session, sequence)
    assert session.read_state()["lane.count"].tolist() == before["lane.count"].tolist()


@pytest.mark.parametrize("sequence", [np.zeros(0, int), np.zeros((4, 2), int)], ids=["empty", "vectors"])
def test_a_sequence_of_another_shape_is_refused(sequence: Array) -> None:
    with pytest.raises(InputError, match=r"takes sequences of shape \['T'\]; given"):
        score(fake_session(), sequence)
    with pytest.raises(InputError, match=r"at least two tokens; the sequence has 1"):
        score(predictor()[0], np.zeros(1, int))
