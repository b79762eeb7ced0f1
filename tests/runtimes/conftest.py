from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import pytest

from nsm.bundle import Bundle
from nsm.runtimes.opening.artifacts import open_bundle
from nsm.runtimes.session.session import Session
from tests.runtimes.fake import (
    fake_session,
)
from tests.runtimes.streams import VARIANTS, Exported, Exporter, Opener, export_variant


@pytest.fixture(params=["fake", "onnx", "onnxruntime", "openvino"])
def session(request: pytest.FixtureRequest) -> Iterator[Session]:
    """A fresh session with two lanes over ids: the fake, and every target that runs on a CPU."""
    if request.param == "fake":
        yield fake_session()
        return
    bundle: Bundle = request.getfixturevalue("bundle")
    with open_bundle(bundle, request.param, threads=1) as opened:
        yield opened


@pytest.fixture(scope="session")
def exporter(tmp_path_factory: pytest.TempPathFactory) -> Exporter:
    """Exports a variant, for so many lanes (default: its own), once."""

    @cache
    def made(name: str, lanes: int) -> Exported:
        return export_variant(name, lanes, tmp_path_factory.mktemp("streams"))

    def asked(name: str, lanes: int | None = None) -> Exported:
        return made(name, VARIANTS[name].lanes if lanes is None else lanes)

    return asked


@pytest.fixture(scope="session")
def opener(exporter: Exporter) -> Opener:
    """Opens a variant on a target, once; the session is reset."""

    @cache
    def opened(name: str, target: str, lanes: int | None) -> tuple[Exported, Session]:
        exported = exporter(name, lanes)
        return exported, exported.open(target)

    def fresh(name: str, target: str, lanes: int | None = None) -> tuple[Exported, Session]:
        exported, session = opened(name, target, lanes)
        session.reset()
        return exported, session

    return fresh
