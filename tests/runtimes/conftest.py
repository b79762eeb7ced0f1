from __future__ import annotations

from collections.abc import Iterator

import pytest

from nsm.bundle import Bundle
from nsm.runtimes.opening import open_bundle
from nsm.runtimes.session import Session
from tests.runtimes.fake import (
    fake_session,
)


@pytest.fixture(params=["fake", "onnx", "onnxruntime", "openvino"])
def session(request: pytest.FixtureRequest) -> Iterator[Session]:
    """A fresh session with two lanes over ids: the fake, and every target that runs on a CPU."""
    if request.param == "fake":
        yield fake_session()
        return
    bundle: Bundle = request.getfixturevalue("bundle")
    with open_bundle(bundle, request.param, threads=1) as opened:
        yield opened
