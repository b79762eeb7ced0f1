"""States of foreign ONNX graphs: found by their names, shown, carried; and what is odd about them is told."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import helper

import nsm
from nsm.errors import InputError
from nsm.export.sources.onnx.source import load_onnx
from nsm.export.sources.state_names import find_orphans, find_states
from tests.export.foreign_graphs import HALF, PLAIN, Ports, leaky, write
from tests.export.helpers import invoke, succeeded, the_json


def two_states(path: Path, whole: bool = True) -> Path:
    """States h and c of one shape; where it is not whole, each step starts from a c of zeros."""
    nodes = [
        *leaky()[:2],
        helper.make_node("Mul", ["c", "half"], ["less"]),
        helper.make_node("Add", ["less", "hn"], ["cn"]),
    ]
    nodes.append(helper.make_node("Sub", ["hn", "cn"], ["y"]))
    inputs: Ports = {**PLAIN[0], **({"c": ["batch", 3]} if whole else {})}
    constants = {**HALF, **({} if whole else {"c": np.zeros((1, 3), np.float32)})}
    return write(path, nodes, inputs, {**PLAIN[1], "cn": ["batch", 3]}, constants)


def test_a_state_that_comes_out_and_never_goes_in_is_refused(tmp_path: Path) -> None:
    path = two_states(tmp_path / "m.onnx", whole=False)
    with pytest.raises(
        InputError, match=r"gives cn: .*which no input takes in \(the states are h=hn\).*--state INPUT=cn"
    ):
        load_onnx(path)
    two_states(path)
    assert list(load_onnx(path).config["states"]) == ["h", "c"]
    assert load_onnx(path, constants={"c": "0"}).config["outputs"] == ["y", "cn"], "whoever says so knows it"


@pytest.mark.parametrize(
    ("output", "telling"),
    [
        ("hn", True),
        ("h_n", True),
        ("cn", True),
        ("stateN", True),
        ("present.0.key", True),
        ("present_state.0.bank", True),
        ("r_att_cache", True),
        ("new_cached_key_0", True),
        ("conv_cache_out", True),
        ("cache_0_out", True),
        ("encoder_out", False),
        ("output", False),
        ("y", False),
        ("new_tokens", False),
        ("state", False),
    ],
)
def test_outputs_that_only_a_state_is_called_like(output: str, telling: bool) -> None:
    assert find_orphans(["logits", output]) == [output] * telling


def test_states_that_are_paired_otherwise_than_their_names_say_are_told_loudly(tmp_path: Path) -> None:
    """It may be meant so: names are conventions. But nothing else would show it, for the reference is wired so too."""
    path, output = two_states(tmp_path / "m.onnx"), tmp_path / "m.nsm"
    options = ("-t", "ort", "--num-samples", "2", "--golden-steps", "4", "-o", output)
    for json in ((), ("--json",)):
        result = invoke("export", path, "--state", "h=cn", "--state", "c=hn", *options, *json, "--force")
        succeeded(result)
        told = " ".join(result.stderr.split())
        assert "state h: input h, output cn" in told
        assert "WARNING: --state pairs h with cn; by their names h goes with hn and c goes with cn." in told
        assert "WARNING: --state pairs c with hn; by their names c goes with cn and h goes with hn." in told
        assert told.index("WARNING") < (told.index("Building") if not json else len(told))
    result = invoke("export", path, "--state", "h=hn", "--state", "c=cn", *options, "--force")
    succeeded(result)
    assert "WARNING" not in result.stderr
    assert load_onnx(path).messages[-1].severity == "info"


@pytest.mark.parametrize(
    ("past", "present"),
    [
        ("att_cache", "r_att_cache"),  # WeNet
        ("cached_key_0", "new_cached_key_0"),  # icefall
        ("embed_states", "new_embed_states"),
        ("processed_lens", "new_processed_lens"),
        ("state", "stateN"),  # Silero
        ("past_key_values.0.key", "present.0.key"),  # decoders of Hugging Face
        ("h0", "hn"),
        ("conv_cache", "conv_cache_out"),
        ("state_in", "state_out"),
    ],
)
def test_the_names_that_people_give_to_states(past: str, present: str) -> None:
    (found,) = find_states(["x", past], ["y", present])
    assert (found.past, found.present) == (past, present)


def window_of(past: str, present: str, x: str, number: int) -> list[onnx.NodeProto]:
    """A window of four rows: the oldest goes, and the new one comes."""
    return [
        helper.make_node("Slice", [past, "one", "end", "one"], [f"kept{number}"]),
        helper.make_node("Concat", [f"kept{number}", x], [present], axis=1),
    ]


def decoder(path: Path) -> tuple[Path, dict[str, str]]:
    """Attention over the window of keys and values of two layers, as decoders with a fixed cache have it."""
    pairs, nodes, x = {}, [], "x"
    for layer in range(2):
        names = {role: (f"past_key_values.{layer}.{role}", f"present.{layer}.{role}") for role in ("key", "value")}
        for number, (past, present) in enumerate(names.values(), 2 * layer):
            nodes += window_of(past, present, x, number)
            pairs[past] = present
        nodes += [
            helper.make_node("Transpose", [names["key"][1]], [f"keys{layer}"], perm=[0, 2, 1]),
            helper.make_node("MatMul", [x, f"keys{layer}"], [f"scores{layer}"]),
            helper.make_node("Softmax", [f"scores{layer}"], [f"weights{layer}"], axis=-1),
            helper.make_node("MatMul", [f"weights{layer}", names["value"][1]], [f"read{layer}"]),
            helper.make_node("Add", [f"read{layer}", x], [f"x{layer}"]),
        ]
        x = f"x{layer}"
    nodes.append(helper.make_node("Identity", [x], ["logits"]))
    return cached(path, nodes, pairs, "logits"), pairs


def convolution(path: Path) -> tuple[Path, dict[str, str]]:
    """Sums over the last rows, twice, as streaming encoders have them."""
    pairs = {"cache_first": "new_cache_first", "cache_second": "new_cache_second"}
    nodes = [
        *window_of("cache_first", "new_cache_first", "x", 0),
        helper.make_node("ReduceMean", ["new_cache_first", "one"], ["mean"]),
        helper.make_node("Tanh", ["mean"], ["hidden"]),
        *window_of("cache_second", "new_cache_second", "hidden", 1),
        helper.make_node("ReduceMax", ["new_cache_second", "one"], ["y"]),
    ]
    return cached(path, nodes, pairs, "y"), pairs


def cached(path: Path, nodes: list[onnx.NodeProto], pairs: dict[str, str], answer: str) -> Path:
    window: Sequence[int | str | None] = ["batch", 4, 3]
    inputs: Ports = {"x": ["batch", 1, 3], **dict.fromkeys(pairs, window)}
    outputs: Ports = {answer: ["batch", 1, 3], **dict.fromkeys(pairs.values(), window)}
    return write(path, nodes, inputs, outputs, {"one": np.array([1]), "end": np.array([4])})


@pytest.mark.parametrize("make", [decoder, convolution])
def test_caches_of_others_are_found_shown_and_carried(
    make: Callable[[Path], tuple[Path, dict[str, str]]], tmp_path: Path
) -> None:
    """By their names alone, through the whole path."""
    path, pairs = make(tmp_path / "m.onnx")
    options = ("-t", "ort", "--batch", "2", "--num-samples", "2", "--golden-steps", "6", "-o", tmp_path / "m.nsm")
    result = invoke("export", path, *options, "--json")
    succeeded(result)
    assert the_json(result)["artifacts"][0]["parity"]["status"] == "passed"
    told = " ".join(result.stderr.split())
    for past, present in pairs.items():
        assert f"input {past}, output {present}, float32[1, 4, 3], lanes on axis 0, starts from zeros; found by" in told
    x = np.random.default_rng(0).standard_normal((2, 9, 1, 3)).astype(np.float32)
    plain, states = ort.InferenceSession(str(path)), dict.fromkeys(pairs, np.zeros((2, 4, 3), np.float32))
    with nsm.open(tmp_path / "m.nsm") as session:
        (given,) = session.run(x).values()
        held = session.read_state()
    for place in range(9):
        wanted, *after = plain.run(None, {"x": x[:, place], **states})
        states = dict(zip(pairs, after, strict=True))
        np.testing.assert_allclose(given[:, place], wanted, rtol=1e-5, atol=1e-6)
    assert len(held) == len(states)
    for name, value in states.items():
        np.testing.assert_allclose(held[name.removeprefix("past_key_values.")], value, rtol=1e-5, atol=1e-6)
