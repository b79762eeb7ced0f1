"""`nsm run --prompt`: text from a bundle over bytes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import nsm
from nsm.export.cli.run import generation
from nsm.models.simple import SimpleNSM
from nsm.runtimes.generate.sampling import Sampler
from nsm.runtimes.session.session import Session
from tests.export.helpers import invoke, refused, succeeded, the_json
from tests.runtimes.fake import FakeRuntime, fake_initial, fake_session, fake_spec
from tests.small_models import CHUNK

LONG = 5 * CHUNK + 3
# Shorter than a chunk, a chunk, several of them, and letters of several bytes.
PROMPTS = ("a", "ROMEO: I", "It was a dark and stormy night;", "Zürich, 東京")


def written(bundle: Path, prompt: str, *options: str) -> dict[str, Any]:
    """The JSON object of a run."""
    result = invoke("run", bundle, "--prompt", prompt, *options, "--json")
    succeeded(result)
    return the_json(result)


@torch.no_grad()
def greedy(model: SimpleNSM, prompt: bytes, count: int) -> bytes:
    """What the PyTorch model goes on with, from the whole text anew for every byte."""
    text = list(prompt)
    for _ in range(count):
        outputs = model(torch.tensor([text]))
        assert isinstance(outputs, torch.Tensor)
        text.append(int(outputs[0, -1].argmax()))
    return bytes(text[len(prompt) :])


@pytest.mark.parametrize("prompt", PROMPTS)
def test_greedy_text_is_that_of_the_pytorch_model(prompt: str, byte_model: SimpleNSM, byte_bundle: Path) -> None:
    expected = greedy(byte_model, prompt.encode(), LONG).decode("ascii")
    assert len(set(expected)) > 3, "a text of one letter would prove little"
    facts = written(byte_bundle, prompt, "--temperature", "0", "--tokens", str(LONG))
    assert facts["text"] == expected


def test_the_json_says_what_was_made(byte_bundle: Path) -> None:
    facts = written(byte_bundle, "ab", "--tokens", "7")
    assert set(facts) == {"target", "prompt", "text", "tokens", "tokens_per_second"}
    assert (facts["target"], facts["prompt"], facts["tokens"]) == ("onnxruntime", "ab", 7)
    assert len(facts["text"]) == 7
    assert facts["tokens_per_second"] > 0


def test_the_text_follows_its_prompt_on_stdout(byte_bundle: Path) -> None:
    expected = written(byte_bundle, "Zürich", "--seed", "4", "--tokens", "30")["text"]
    shown = succeeded(invoke("run", byte_bundle, "--prompt", "Zürich", "--seed", "4", "--tokens", "30", "-t", "ort"))
    assert shown.startswith(f"Zürich{expected}\n\n7 bytes read, 30 generated on onnxruntime: ")


def test_200_tokens_are_the_default(byte_bundle: Path) -> None:
    assert written(byte_bundle, "a", "--seed", "0")["tokens"] == 200


def test_the_same_seed_writes_the_same_text(byte_bundle: Path) -> None:
    options = ("--tokens", "40", "--temperature", "2", "--top-p", "0.95", "--top-k", "50")
    first, again, other = (written(byte_bundle, "a", *options, "--seed", seed)["text"] for seed in ("1", "1", "2"))
    assert first == again
    assert first != other


def test_the_one_most_likely_token_is_the_greedy_one(byte_bundle: Path) -> None:
    kinds = (("--temperature", "0"), ("--top-k", "1"), ("--top-p", "1e-9"))
    texts = {written(byte_bundle, "a", "--tokens", "20", *options)["text"] for options in kinds}
    assert len(texts) == 1


@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("options", [("--temperature", "0"), ("--temperature", "1.5", "--seed", "3")], ids=["0", "1.5"])
def test_idle_lanes_change_nothing(
    prompt: str, options: Sequence[str], byte_bundle: Path, wide_byte_bundle: Path
) -> None:
    one, wide = (written(path, prompt, *options, "--tokens", str(LONG)) for path in (byte_bundle, wide_byte_bundle))
    assert one["text"] == wide["text"]


@pytest.mark.parametrize("as_json", [True, False])
def test_bytes_that_are_no_text_are_shown_as_such(as_json: bool, byte_bundle: Path) -> None:
    options = ("--temperature", "1e6", "--seed", "0", "--tokens", "60")
    if as_json:
        text = written(byte_bundle, "a", *options)["text"]
    else:
        text = succeeded(invoke("run", byte_bundle, "--prompt", "a", *options))
    assert "\N{REPLACEMENT CHARACTER}" in text


def test_a_prompt_that_is_no_utf8_is_read_as_its_bytes(byte_model: SimpleNSM, byte_bundle: Path) -> None:
    # As Python decodes the argument b"\xff\xfeab".
    prompt = b"\xff\xfeab".decode(errors="surrogateescape")
    facts = written(byte_bundle, prompt, "--temperature", "0", "--tokens", "20")
    assert facts["prompt"] == "\N{REPLACEMENT CHARACTER}" * 2 + "ab"
    assert facts["text"] == greedy(byte_model, b"\xff\xfeab", 20).decode("ascii")
    assert "4 bytes read, 3 made" in succeeded(invoke("run", byte_bundle, "--prompt", prompt, "--tokens", "3"))


def test_a_model_over_other_ids_is_refused(exported: Path) -> None:
    result = invoke("run", exported, "--prompt", "a", "--target", "onnxruntime")
    refused(
        result, 3, "256 ids in and 256 logits out. This model takes 20 ids and returns outputs of shape [5]", "--data"
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vectors": True}, "This model takes vectors and returns outputs of shape [5] per token."),
        ({"entries": ("step",)}, "fake has no entry `decode`"),
    ],
)
def test_vectors_and_models_that_see_ahead_are_refused(
    changes: dict[str, Any], message: str, byte_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = fake_spec(**changes)
    session = Session(FakeRuntime(spec), spec, fake_initial(spec), "f", "fake")
    monkeypatch.setattr(generation, "open_bundle", lambda *_, **__: session)
    refused(invoke("run", byte_bundle, "--prompt", "a"), 3, message)


class Spelling(torch.nn.Module):
    """A GRU cell over bytes that takes one token a call; it writes printable ASCII."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.embed = torch.nn.Embedding(256, 24)
        self.cell = torch.nn.GRUCell(24, 24)
        self.head = torch.nn.Linear(24, 256)
        with torch.no_grad():
            self.embed.weight *= 2.0
            self.head.weight *= 8.0
            self.head.bias[:32] = self.head.bias[127:] = -100.0

    def forward(self, ids: torch.Tensor, h: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        h = self.cell(self.embed(ids), h)
        return self.head(h), h


@torch.no_grad()
def spelled(model: Spelling, prompt: bytes, count: int) -> str:
    """What a loop over the module goes on with."""
    h, made, logits = torch.zeros(1, 24), bytearray(), torch.zeros(1, 256)
    for byte in prompt:
        logits, h = model(torch.tensor([byte]), h)
    for _ in range(count):
        made.append(int(logits[0].argmax()))
        logits, h = model(torch.tensor([made[-1]]), h)
    return made.decode("ascii")


@pytest.mark.parametrize("lanes", [1, 3])
@pytest.mark.parametrize("target", ["onnxruntime", "openvino"])
def test_a_model_that_takes_one_token_a_call_goes_on_with_a_text(lanes: int, target: str, tmp_path: Path) -> None:
    model = Spelling().eval()
    step = nsm.as_step(model, states=[torch.zeros(1, 24)], vocab_size=256)
    nsm.export_model(step, target, tmp_path / "spelling.nsm", batch=lanes, golden_steps=8)
    expected = spelled(model, "Zürich".encode(), 60)
    assert len(set(expected)) > 3, "a text of one letter would prove little"
    facts = written(tmp_path / "spelling.nsm", "Zürich", "--temperature", "0", "--tokens", "60")
    assert facts["text"] == expected


def test_lanes_that_cannot_rest_all_have_the_text() -> None:
    """As in an .onnx of several lanes without the input valid: lane 0 answers as it does alone."""
    session, alone = fake_session(fake_spec(3, valid=False)), fake_session(fake_spec(1))
    entry = generation._single(session)
    logits = generation._prefill(session, entry, np.array([1, 2, 3]))
    outputs = alone.run([1, 2, 3])["outputs"]
    for token in generation._continue(session, entry, logits, 9, Sampler(temperature=0.0)):
        assert token == int(outputs[-1].argmax())
        outputs = alone.run([token])["outputs"]
    assert session.offsets.tolist() == [(3 + 8) % 4] * 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--prompt", ""), "--prompt is empty"),
        (("--prompt", "a", "--tokens", "0"), "--tokens must be at least 1; given 0"),
        (("--prompt", "a", "--data", "x.npy"), "--data and --output"),
        (("--prompt", "a", "--output", "x.npz"), "--data and --output"),
        (("--prompt", "a", "--temperature", "-1"), "temperature is 0 or more"),
        (("--prompt", "a", "--top-k", "0"), "top_k is at least 1"),
        (("--prompt", "a", "--top-p", "1.5"), "top_p is a probability"),
        (("--prompt", "a", "--seed", "-1"), "seed is 0 or more"),
        (("--prompt", "a", "--target", "openvino"), "holds no artifact for 'openvino'"),
    ],
)
@pytest.mark.parametrize("as_json", [(), ("--json",)], ids=["text", "json"])
def test_what_does_not_fit_is_refused(
    options: Sequence[str], message: str, as_json: Sequence[str], byte_bundle: Path
) -> None:
    refused(invoke("run", byte_bundle, *options, *as_json), 2, message)


def test_without_a_prompt_sequences_are_fed(byte_bundle: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "ids.npy", np.arange(20))
    (summary,) = the_json(invoke("run", byte_bundle, "--data", tmp_path / "ids.npy", "--json"))["sequences"]
    assert summary["tokens"] == 20
