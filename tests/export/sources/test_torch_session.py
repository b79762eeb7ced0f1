from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import nsm
from nsm.baselines import RecurrentLM
from nsm.bundle import Bundle
from nsm.errors import ConfigError, RunError, StreamError
from nsm.export.cli.bench.bundle import lane_tokens
from nsm.export.sources.torch_session import compiled_session, load_matching, model_session, reference, torch_threads
from nsm.models.simple import SimpleNSM
from tests.small_models import CHUNK, make_model, make_sequences


def test_the_reference_answers_what_the_artifact_answers(exported: Path, checkpoint: Path) -> None:
    tokens = lane_tokens(Bundle(exported))
    with nsm.open(exported, "onnxruntime") as session, nsm.reference(checkpoint, batch=2) as wanted:
        assert (wanted.target, wanted.effective_precision) == ("pytorch", "fp32")
        for _ in range(2):
            session.reset()
            wanted.reset()
            for piece, counts in zip(tokens, ([8, 8], [3, 0], [5, 8], [8, 2]), strict=False):
                outputs, expected = (one.feed(piece, counts)["outputs"] for one in (session, wanted))
                np.testing.assert_allclose(outputs, expected, rtol=1e-4, atol=1e-5)
                assert session.offsets.tolist() == wanted.offsets.tolist()
            state = wanted.read_state()
            for name, value in session.read_state().items():
                np.testing.assert_allclose(value, state[name], rtol=1e-4, atol=1e-5, err_msg=name)


def test_it_is_the_model_itself_bit_by_bit(model: SimpleNSM) -> None:
    tokens = make_sequences(1, 5 * CHUNK + 3)
    with reference(model) as session, torch.no_grad():
        given = np.concatenate([session.feed(part)["outputs"] for part in np.split(tokens, [3, 21], 1)], 1)
        wanted = model(torch.from_numpy(tokens)).numpy()
        np.testing.assert_allclose(given, wanted, rtol=1e-5, atol=1e-6)
        session.reset()
        step = session.step(tokens[:, :CHUNK])["outputs"]
        np.testing.assert_array_equal(step, model.step(torch.from_numpy(tokens[:, :CHUNK]), model.initial_state(1))[0])


@pytest.mark.parametrize("trained", ["all of it", "a part", "nothing"])
def test_the_callers_model_stays_in_its_mode(trained: str) -> None:
    model = make_model()
    part = list(model.modules())[-1]
    if trained != "nothing":
        (model if trained == "all of it" else part).train()
    modes = {name: module.training for name, module in model.named_modules()}
    tokens = make_sequences(1, CHUNK)
    with reference(model) as session:
        assert {name: module.training for name, module in model.named_modules()} == modes
        given = session.step(tokens)["outputs"]
    model.eval()
    with torch.no_grad():
        np.testing.assert_array_equal(given, model.step(torch.from_numpy(tokens), model.initial_state(1))[0])


def test_a_model_without_commit_is_a_stream_too() -> None:
    torch.manual_seed(0)
    model = RecurrentLM(20, 8, 1).eval()
    tokens = make_sequences(2, 20)
    with reference(model, batch=2) as session:
        given = np.concatenate([session.decode(tokens[:, i : i + 1])["outputs"] for i in range(20)], 1)
    with torch.no_grad():
        wanted = model(torch.from_numpy(tokens)).numpy()
    np.testing.assert_allclose(given, wanted, rtol=1e-5, atol=1e-6)


def test_in_double_it_says_so_and_is_closer(model_factory: type) -> None:
    exact = model_factory().double()
    session = model_session(exact, exact.spec(1), "exact")
    assert session.effective_precision == "fp64"
    assert session.step(make_sequences(1, CHUNK))["outputs"].dtype == np.float64


def test_the_reference_runs_in_double_and_in_nothing_coarser(model_factory: type) -> None:
    with nsm.reference(model_factory().double()) as session:
        assert session.effective_precision == "fp64"
    for dtype in (torch.float16, torch.bfloat16):
        with pytest.raises(ConfigError, match=rf"in float32; its weight \S+ is {dtype}\. .*model\.float\(\)"):
            nsm.reference(model_factory().to(dtype))


def test_a_closed_or_failing_model_is_an_error_of_ours(model: SimpleNSM, monkeypatch: pytest.MonkeyPatch) -> None:
    session = reference(model)

    def broken(*_: object) -> None:
        raise ValueError("no such thing")

    monkeypatch.setattr(model, "call", broken)
    with pytest.raises(RunError, match=r"(?s)PyTorch failed while it ran step: .*no such thing"):
        session.step(make_sequences(1, CHUNK))
    session.close()
    with pytest.raises(StreamError, match="The session is closed"):
        session.step(make_sequences(1, CHUNK))
    for look in (session.read_state, session.snapshot, session.reset, session.is_fresh):
        with pytest.raises(StreamError, match="The session is closed"):
            look()


def test_a_model_that_is_not_causal_has_no_single_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda call, **_: call)
    model = make_model(causal=False)
    tokens = make_sequences(1, 2 * CHUNK).reshape(2, 1, CHUNK)
    session = compiled_session(model, model.spec(1), "x", tokens)
    assert not session.spec.has("decode")
    with torch.no_grad():
        wanted = model(torch.from_numpy(tokens[0])).numpy()
    np.testing.assert_allclose(session.step(tokens[0])["outputs"], wanted, rtol=1e-5, atol=1e-6)


def test_the_model_of_a_bundle_is_known_by_its_fingerprint(exported: Path, checkpoint: Path) -> None:
    assert isinstance(load_matching(checkpoint, Bundle(exported)), SimpleNSM)


@pytest.mark.parametrize(("count", "used"), [(3, 3), (None, 1)])
def test_threads_are_put_back(count: int | None, used: int) -> None:
    assert torch.get_num_threads() == 1
    with torch_threads(count):
        assert torch.get_num_threads() == used
    assert torch.get_num_threads() == 1


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_the_compiled_model_answers_the_same(exported: Path, model: SimpleNSM) -> None:
    bundle = Bundle(exported)
    tokens, spec = lane_tokens(bundle), bundle.manifest.spec
    eager, compiled = model_session(model, spec, "x"), compiled_session(model, spec, "x", tokens)
    for piece in tokens[:3]:
        np.testing.assert_allclose(compiled.step(piece)["outputs"], eager.step(piece)["outputs"], rtol=1e-4, atol=1e-5)
        single = piece[:, :1]
    for _ in range(CHUNK):
        np.testing.assert_allclose(
            compiled.decode(single)["outputs"], eager.decode(single)["outputs"], rtol=1e-4, atol=1e-5
        )
