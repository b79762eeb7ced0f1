from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import nsm
from nsm.baselines import RecurrentLM
from nsm.bundle import Bundle
from nsm.export.bench_command import lane_tokens
from nsm.export.torch_stream import TorchStream, compiled_stream, load_matching, torch_threads
from nsm.models.simple import SimpleNSM
from tests.conftest import CHUNK, make_sequences


def test_a_stream_in_pytorch_answers_what_the_artifact_answers(exported: Path, model: SimpleNSM) -> None:
    bundle = Bundle(exported)
    tokens = lane_tokens(bundle)
    stream = TorchStream(model, bundle.manifest.spec)
    with nsm.open(exported, "onnxruntime") as session:
        for _ in range(2):
            session.reset()
            stream.reset()
            pieces = [(entry, tokens[index]) for index, entry in enumerate(("step", "decode", "decode", "step"))]
            for entry, piece in pieces:
                parts = [piece] if entry == "step" else np.split(piece, CHUNK, 1)
                for part in parts:
                    wanted = getattr(session, entry)(part)["outputs"]
                    given = getattr(stream, entry)(part)["outputs"]
                    np.testing.assert_allclose(given, wanted, rtol=1e-4, atol=1e-5)


def test_a_model_without_commit_is_a_stream_too() -> None:
    torch.manual_seed(0)
    model = RecurrentLM(20, 8, 1).eval()
    stream = TorchStream(model, model.spec(2))
    tokens = make_sequences(2, 20)
    given = np.concatenate([stream.decode(tokens[:, index : index + 1])["outputs"] for index in range(20)], 1)
    with torch.no_grad():
        wanted = model(torch.from_numpy(tokens)).numpy()
    np.testing.assert_allclose(given, wanted, rtol=1e-5, atol=1e-6)


def test_a_model_that_is_not_causal_has_no_single_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.conftest import make_model

    monkeypatch.setattr(torch, "compile", lambda call, **_: call)
    model = make_model(causal=False)
    tokens = make_sequences(1, 2 * CHUNK).reshape(2, 1, CHUNK)
    stream = compiled_stream(model, model.spec(1), tokens)
    assert not stream.spec.has("decode")
    with torch.no_grad():
        wanted = model(torch.from_numpy(tokens[0])).numpy()
    np.testing.assert_allclose(stream.step(tokens[0])["outputs"], wanted, rtol=1e-5, atol=1e-6)


def test_the_model_of_a_bundle_is_known_by_its_fingerprint(exported: Path, checkpoint: Path) -> None:
    assert isinstance(load_matching(checkpoint, Bundle(exported)), SimpleNSM)


@pytest.mark.parametrize(("count", "used"), [(3, 3), (None, 1)])
def test_threads_are_put_back(count: int | None, used: int) -> None:
    assert torch.get_num_threads() == 1
    with torch_threads(count):
        assert torch.get_num_threads() == used
    assert torch.get_num_threads() == 1


@pytest.mark.slow
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_the_compiled_model_answers_the_same(exported: Path, model: SimpleNSM) -> None:
    bundle = Bundle(exported)
    tokens = lane_tokens(bundle)
    eager, compiled = TorchStream(model, bundle.manifest.spec), compiled_stream(model, bundle.manifest.spec, tokens)
    for piece in tokens[:3]:
        np.testing.assert_allclose(compiled.step(piece)["outputs"], eager.step(piece)["outputs"], rtol=1e-4, atol=1e-5)
        single = piece[:, :1]
    for _ in range(CHUNK):
        np.testing.assert_allclose(
            compiled.decode(single)["outputs"], eager.decode(single)["outputs"], rtol=1e-4, atol=1e-5
        )
