"""How many threads a session gives its backend where nobody says it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest

from nsm.bundle import Bundle
from nsm.manifest import EntryWork
from nsm.runtimes.backends import onnxruntime
from nsm.runtimes.base import Runtime
from nsm.runtimes.opening.artifacts import open_bundle
from nsm.runtimes.opening.threads import chosen_threads
from nsm.spec import StepSpec

SMALL = EntryWork(flops=2e6, nbytes=5e5)
MANY_PRODUCTS = EntryWork(flops=2e8, nbytes=5e5)
MANY_WEIGHTS = EntryWork(flops=2e6, nbytes=3e7)
NAN = float("nan")


@pytest.mark.parametrize(
    ("work", "threads"),
    [
        ({"step": SMALL}, 1),
        ({"step": SMALL, "decode": MANY_WEIGHTS}, 1),
        ({"step": MANY_PRODUCTS}, None),
        ({"step": MANY_WEIGHTS}, None),
        ({"decode": SMALL}, None),
        ({"step": EntryWork(NAN, NAN)}, None),
        ({}, None),
    ],
)
def test_only_a_step_that_is_known_to_be_small_has_one_thread(
    work: Mapping[str, EntryWork], threads: int | None
) -> None:
    assert chosen_threads(None, work) == threads
    assert chosen_threads(3, work) == 3


def test_an_export_says_what_every_entry_does(bundle: Bundle) -> None:
    work = bundle.manifest.work
    assert set(work) == {entry.name for entry in bundle.manifest.spec.entries}
    assert work["step"].flops > work["decode"].flops > 0
    weights = bundle.locate("graphs/weights.bin").stat().st_size
    assert 0.5 * weights < work["step"].nbytes < 10 * weights


@pytest.mark.parametrize(
    ("work", "asked", "given"),
    [(SMALL, None, 1), (SMALL, 2, 2), (MANY_PRODUCTS, None, None), (MANY_PRODUCTS, 1, 1), (None, None, None)],
)
def test_a_session_gives_its_backend_what_was_asked_for_or_what_fits(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, work: EntryWork | None, asked: int | None, given: int | None
) -> None:
    told: list[int | None] = []
    real = onnxruntime.load

    def load(files: Mapping[str, Path], spec: StepSpec, device: str, threads: int | None, precision: str) -> Runtime:
        told.append(threads)
        return real(files, spec, device, threads, precision)

    monkeypatch.setattr(onnxruntime, "load", load)
    bundle.manifest = replace(bundle.manifest, work={} if work is None else {"step": work})
    with open_bundle(bundle, "onnxruntime", threads=asked) as session:
        assert session.threads == given
    assert told == [given]
