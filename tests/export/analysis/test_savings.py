"""`nsm export --compact` and `--debug-outputs`: a smaller model, and a look inside, both checked like any other."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import nsm
from nsm.baselines import RecurrentLM
from nsm.bundle import Bundle
from nsm.export import pipeline
from nsm.export.analysis.savings import Savings
from nsm.export.cli import export as export_command
from nsm.export.options import ExportOptions
from nsm.export.pipeline import plan
from nsm.models.adaptive import AdaptiveNSM
from nsm.models.checkpoint import fingerprint, load_checkpoint
from nsm.runtimes.parity.budgets import find_budget
from nsm.runtimes.parity.comparison import compare
from nsm.utils.recorders import read_trace, record_model
from tests.export.helpers import invoke, refused, succeeded, the_json
from tests.small_models import CHUNK, make_model, make_sequences

pytestmark = pytest.mark.slow
SLOTS, ACTIVE = 24, 3


@pytest.fixture(scope="module")
def masked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of two layers with 24 slots each, of which 3 are active."""
    path = tmp_path_factory.mktemp("masked") / "masked.pt"
    nsm.save(make_model(num_states=SLOTS, initial_states=ACTIVE), path, samples=make_sequences(4, 10 * CHUNK))
    return path


@pytest.fixture(scope="module")
def compacted(masked: Path) -> tuple[Bundle, dict[str, Any]]:
    """The bundle of it, compacted and with debug outputs, and what the command said."""
    options = ("--compact", "--debug-outputs", "--num-samples", "2", "--golden-steps", "6", "--batch", "2", "--json")
    result = invoke("export", masked, "-t", "ort", "-o", masked.with_suffix(".nsm"), *options)
    succeeded(result)
    return Bundle(masked.with_suffix(".nsm")), the_json(result)


Compacted = tuple[Bundle, dict[str, Any]]


# -- compact ---------------------------------------------------------------------------------------------------------


def test_the_bundle_has_fewer_slots(compacted: Compacted, masked: Path) -> None:
    bundle, _ = compacted
    states = {state.name: state.shape for state in bundle.manifest.spec.states}
    for index in range(2):
        assert states[f"{index}.bank"][2] == ACTIVE
        assert states[f"{index}.mask"] == (2, ACTIVE)
    assert bundle.manifest.model["config"]["num_states"] == [ACTIVE, ACTIVE]
    assert load_checkpoint(masked).model.config["num_states"] == SLOTS


def test_it_passed_parity_and_has_a_fingerprint_of_its_own(compacted: Compacted, masked: Path) -> None:
    bundle, found = compacted
    (artifact,) = found["artifacts"]
    assert artifact["parity"]["status"] == "passed"
    checkpoint = load_checkpoint(masked)
    assert bundle.manifest.fingerprint != checkpoint.fingerprint
    assert bundle.manifest.fingerprint == fingerprint(nsm.compact(make_model(num_states=SLOTS, initial_states=ACTIVE)))
    succeeded(invoke("parity", bundle.path))


def test_it_answers_what_the_whole_model_answers(compacted: Compacted, masked: Path) -> None:
    model, tokens = load_checkpoint(masked).model, make_sequences(2, 5 * CHUNK + 3, seed=9)
    with nsm.open(compacted[0]) as session, torch.no_grad():
        expected = model(torch.from_numpy(tokens)).numpy()
        np.testing.assert_allclose(session.run(tokens)["outputs"], expected, rtol=1e-4, atol=1e-5)


def test_the_savings_are_counted(compacted: Compacted) -> None:
    bundle, found = compacted
    saved = found["compact"]
    assert set(saved) == {"target", "slots", "parameters", "state_bytes", "flops", "step_us"}
    assert saved["target"] == "onnxruntime"
    assert saved["slots"] == [2 * SLOTS, 2 * ACTIVE]
    large = make_model(num_states=SLOTS, initial_states=ACTIVE)
    assert saved["parameters"] == [
        sum(p.numel() for p in large.parameters()),
        sum(p.numel() for p in nsm.compact(large).parameters()),
    ]
    assert saved["state_bytes"] == [large.spec(1).state_nbytes, bundle.manifest.spec.state_nbytes // 2]
    for name in ("slots", "parameters", "state_bytes", "flops"):
        before, after = saved[name]
        assert before > after > 0, name
    assert min(saved["step_us"]) > 0


def test_people_get_a_table(
    compacted: Compacted, masked: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved = Savings("onnxruntime", (48, 6), (20_000, 15_000), (4000, 1000), (5e6, 4e6), (250.0, 200.0))
    monkeypatch.setattr(pipeline, "run", lambda *_: (compacted[0], None))
    monkeypatch.setattr(export_command, "_measure_savings", lambda *_: saved)
    shown = succeeded(invoke("export", masked, "-t", "ort", "-o", tmp_path / "new.nsm", "--compact"))
    lines = [line.split() for line in shown.splitlines()]
    assert ["compact", "before", "after", "saved"] in lines
    assert ["slots", "48", "6", "88%"] in lines
    assert ["parameters", "20,000", "15,000", "25%"] in lines
    assert ["us", "per", "step,", "onnxruntime", "250", "200", "20%"] in lines


def test_an_adaptive_model_keeps_what_its_own_sequences_use(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = AdaptiveNSM(
        vocab_size=20, state_dim=16, max_states=32, initial_states=4, num_heads=2, chunk_size=CHUNK, feed_forward=1.0
    )
    nsm.save(model, tmp_path / "model.pt", samples=make_sequences(4, 10 * CHUNK))
    planned = plan(tmp_path / "model.pt", ExportOptions(["onnx"], compact=True, output=tmp_path / "model.nsm"))
    assert planned.larger is not None
    assert planned.larger.fingerprint == fingerprint(model)
    expected = nsm.compact(model.eval(), [*planned.larger.calibration, *planned.larger.golden])
    assert planned.source.fingerprint == fingerprint(expected)
    assert all(4 <= count < 32 for count in planned.source.config["max_states"])
    assert plan(tmp_path / "model.pt", replace(planned.options, compact=False)).larger is None
    nsm.save(model, tmp_path / "bare.pt")
    result = invoke("export", tmp_path / "bare.pt", "-t", "onnx", "-o", tmp_path / "bare.nsm", "--compact")
    refused(result, 2, "give sequences, or save some with the model")


@pytest.mark.usefixtures("no_work")
def test_a_model_without_banks_is_refused(tmp_path: Path) -> None:
    nsm.save(RecurrentLM(20, 8, 1), tmp_path / "lstm.pt", samples=make_sequences(2, 40))
    result = invoke("export", tmp_path / "lstm.pt", "-t", "ort", "-o", tmp_path / "lstm.nsm", "--compact", "--json")
    refused(result, 3, "--compact removes slots of a bank; a RecurrentLM has none.")
    assert not (tmp_path / "lstm.nsm").exists()


@pytest.mark.usefixtures("no_work")
def test_a_hierarchy_is_refused(tmp_path: Path) -> None:
    nsm.save(make_model(hierarchy=(2,)), tmp_path / "levels.pt", samples=make_sequences(2, 40))
    result = invoke("export", tmp_path / "levels.pt", "-t", "ort", "-o", tmp_path / "levels.nsm", "--compact")
    refused(result, 2, "A hierarchy has banks of fixed sizes")


# -- debug outputs ---------------------------------------------------------------------------------------------------


def test_the_manifest_and_the_trace_have_the_routing(compacted: Compacted) -> None:
    bundle, _ = compacted
    spec, trace = bundle.manifest.spec, bundle.trace()
    outputs = {item.name: item.shape for item in spec.entry("step").outputs}
    routing = (2, CHUNK, 2, ACTIVE)
    assert outputs == {"outputs": (2, CHUNK, 5), "routing.0": routing, "routing.1": routing}
    assert [item.name for item in spec.entry("decode").outputs] == ["outputs"]
    assert set(trace.outputs) == set(outputs)
    for name in ("routing.0", "routing.1"):
        rows = trace.outputs[name]
        assert rows.shape == (2, 6, CHUNK, 2, ACTIVE)
        assert (rows >= 0).all()
        np.testing.assert_allclose(rows.sum(-1), 1.0, rtol=1e-5)
        assert rows.std() > 0.01


def test_the_backend_gives_the_routing_too(compacted: Compacted) -> None:
    bundle, _ = compacted
    trace = bundle.trace()
    with nsm.open(bundle) as session:
        outputs = session.step(trace.inputs["tokens"][:, 0])
    for name in ("routing.0", "routing.1"):
        np.testing.assert_allclose(outputs[name], trace.outputs[name][:, 0], rtol=1e-4, atol=1e-6)


def test_parity_looks_at_the_routing(compacted: Compacted) -> None:
    bundle, _ = compacted
    trace, budget = bundle.trace(), find_budget("fp32")
    wrong = replace(trace, outputs={**trace.outputs, "routing.1": np.roll(trace.outputs["routing.1"], 1, -1)})
    with nsm.open(bundle) as session:
        assert compare(trace, session, budget).passed
        report = compare(wrong, session, budget)
    assert not report.passed
    assert report.one_step.tensor == "routing.1"


@pytest.mark.usefixtures("no_work")
def test_a_model_without_routing_is_refused(tmp_path: Path) -> None:
    nsm.save(RecurrentLM(20, 8, 1), tmp_path / "lstm.pt", samples=make_sequences(2, 40))
    result = invoke("export", tmp_path / "lstm.pt", "-t", "ort", "-o", tmp_path / "lstm.nsm", "--debug-outputs")
    refused(result, 3, "--debug-outputs shows how tokens are routed", "RecurrentLM", "Leave it out.")
    assert not (tmp_path / "lstm.nsm").exists()


def test_a_bank_that_adapts_shows_its_masks_too(tmp_path: Path) -> None:
    """Of every token of calls of two chunks, so that a decision falls inside a call."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"state_dim": 16, "max_states": 6, "initial_states": 2, "num_layers": 1, "num_heads": 2}
    model = AdaptiveNSM(vocab_size=20, routing="sparsemax", chunk_size=CHUNK, routing_heads=2, **sizes)
    options: dict[str, Any] = {
        "debug_outputs": True,
        "tokens_per_call": 2 * CHUNK,
        "num_samples": 2,
        "golden_steps": 40,
    }
    bundle = nsm.export_model(model.eval(), ["onnxruntime", "openvino"], tmp_path / "adaptive.nsm", **options)
    assert [item.parity.status for item in bundle.manifest.artifacts] == ["passed", "passed"]
    masks = bundle.trace().outputs["mask.0"]
    assert masks.shape == (2, 40, 2 * CHUNK, 6)
    assert set(np.unique(masks)) == {0.0, 1.0}
    within = masks.reshape(2, 40, 2, CHUNK, 6)
    assert (within == within[:, :, :, :1]).all()
    assert (within[:, :, 0] != within[:, :, 1]).any()
    recording = record_model(model, bundle.trace().inputs["tokens"][0].ravel())
    np.testing.assert_array_equal(read_trace(bundle.trace()).layers[0].routable, recording.layers[0].routable)


def test_without_the_option_there_is_no_routing(bundle: Bundle) -> None:
    assert [item.name for item in bundle.manifest.spec.entry("step").outputs] == ["outputs"]
    assert set(bundle.trace().outputs) == {"outputs"}
