"""Whole models and sparse routing against the reference; test_layer.py compares single layers."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import cast

import pytest
import torch
from torch.testing import assert_close

import nsm
from nsm.models.simple import SimpleNSM
from nsm.modules import reference
from nsm.modules.layer import NSMLayer
from nsm.modules.reference import ReferenceLayer, run_stack
from tests.nsm.modules.layers import CHUNK, make_layer, random_tokens
from tests.nsm.variants import stir


@torch.no_grad()
@pytest.mark.parametrize("tokens", ["ids", "vectors"])
def test_a_whole_model_equals_its_reference(tokens: str) -> None:
    torch.manual_seed(0)
    form = {"vocab_size": 11} if tokens == "ids" else {"input_dim": 3}
    model = SimpleNSM(**form, d_model=8, state_dim=16, num_states=5, num_layers=3, chunk_size=CHUNK, output_dim=7)  # type: ignore[call-overload]
    stir(model)
    model.double()
    x = torch.randint(11, (2, 23)) if tokens == "ids" else torch.randn(2, 23, 3, dtype=torch.float64)
    layers = [cast("NSMLayer", layer) for layer in model.layers]
    expected = torch.stack([run_stack(model.embed, layers, model.head, lane) for lane in x])
    assert_close(model(x), expected, rtol=1e-7, atol=1e-9)


@torch.no_grad()
@pytest.mark.parametrize("routing", ["sparsemax", "entmax"])
def test_sparse_routing_equals_the_reference(routing: str) -> None:
    layer, tokens = make_layer(routing=routing, initial_states=4), random_tokens(1, 3 * CHUNK)
    stream = ReferenceLayer(layer)
    output, _ = layer(tokens)
    assert_close(output[0], stream.run(tokens[0]), rtol=1e-6, atol=1e-7)


def numbers(text: str) -> set[int]:
    """Of "(2), (3) and (5)" and "(7) - (9)"."""
    found: set[int] = set()
    for first, last in re.findall(r"\((\d+)\)(?: - \((\d+)\))?", text):
        found |= set(range(int(first), int(last or first) + 1))
    return found


LISTED = r"((?:\(\d+\)(?: - |, | and )?)+)"


def test_equations_are_numbered_from_one_and_all_are_computed() -> None:
    docstring, code = inspect.getsource(reference).split("from __future__")
    stated = [int(number) for number in re.findall(r"^ +\((\d+)\) ", docstring, re.M)]
    assert stated == list(range(1, 16))
    assert numbers(" ".join(re.findall(rf'(?:"""|# ){LISTED}', code))) == set(stated)


def test_the_fast_modules_cite_equations() -> None:
    found = {}
    for path in Path(nsm.modules.__file__).parent.rglob("*.py"):
        if cited := numbers(" ".join(re.findall(rf"[Ee]quations? {LISTED}", path.read_text()))):
            found[path.stem] = cited
    assert found["layer"] == set(range(1, 16))
    assert set(found) - {"layer"} == {
        "adaptation",
        "attention",
        "consolidation",
        "memory",
        "mixing",
        "propagator",
        "router",
    }
    assert set().union(*(cited for name, cited in found.items() if name != "layer")) == set(range(1, 16)) - {6}
