"""Programs in training mode, and with random numbers: named, with the module and what to do; exit code 3."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from nsm.errors import UnsupportedError
from nsm.export.sources.program_training import check_eval_mode
from tests.export.helpers import invoke, refused

pytestmark = pytest.mark.filterwarnings("ignore")  # what torch says of its own deprecated parts


class Part(nn.Module):
    """x [2, 5, 6] through one layer."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        made = self.layer(x)
        first: Tensor = made[0] if isinstance(made, tuple) else made
        return first


class Attention(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.scaled_dot_product_attention(x, x, x, dropout_p=0.1 if self.training else 0.0)


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "Dropout": nn.Dropout,
    "Dropout1d": nn.Dropout1d,
    "AlphaDropout": nn.AlphaDropout,
    "RReLU": nn.RReLU,
    "BatchNorm1d": lambda: nn.BatchNorm1d(5),
    "InstanceNorm1d": lambda: nn.InstanceNorm1d(5, track_running_stats=True),
    "LSTM": lambda: nn.LSTM(6, 6, 2, dropout=0.1),
    "GRU": lambda: nn.GRU(6, 6, 2, dropout=0.1),
    "Attention": Attention,
}
# Taken apart, these draw numbers by an operator that does not say what for.
DRAWN = ("Dropout1d", "AlphaDropout")
# And of these torch leaves the dropout out.
LEFT_OUT = ("LSTM", "GRU")


def program(layer: nn.Module, decomposed: bool) -> ExportedProgram:
    made = torch.export.export(Part(layer).train(layer.training), (torch.randn(2, 5, 6),))
    return made.run_decompositions() if decomposed else made


@pytest.mark.parametrize("decomposed", [False, True], ids=["as exported", "decomposed"])
@pytest.mark.parametrize("name", LAYERS)
def test_training_mode_is_named_with_its_module(name: str, decomposed: bool) -> None:
    check_eval_mode(program(LAYERS[name]().eval(), decomposed), "m.pt2")
    if decomposed and name in LEFT_OUT:
        check_eval_mode(program(LAYERS[name]().train(), decomposed), "m.pt2")
        return
    with pytest.raises(UnsupportedError) as caught:
        check_eval_mode(program(LAYERS[name]().train(), decomposed), "m.pt2")
    told = str(caught.value)
    assert f" in the module layer ({name})" in told
    if decomposed and name in DRAWN:
        assert told.startswith("m.pt2 draws random numbers: aten.bernoulli")
    else:
        assert told.startswith("m.pt2 was exported in training mode: aten.")
        assert told.endswith("Call module.eval() before torch.export.export.")


@pytest.mark.parametrize("layer", [nn.Dropout(0.0), nn.LSTM(6, 6), nn.InstanceNorm1d(5), nn.LayerNorm(6)])
def test_training_mode_without_an_effect_is_fine(layer: nn.Module) -> None:
    check_eval_mode(program(layer.train(), False), "m.pt2")


def test_many_are_not_all_named() -> None:
    with pytest.raises(UnsupportedError, match=r"aten\.dropout in the module layer\.2 \(Dropout\), and 2 more\. Call"):
        check_eval_mode(program(nn.Sequential(*(nn.Dropout() for _ in range(5))).train(), False), "m.pt2")


def test_a_batch_norm_without_statistics_is_named_in_eval_mode_too() -> None:
    layer = nn.BatchNorm1d(5, track_running_stats=False).eval()
    with pytest.raises(UnsupportedError, match=r"^m\.pt2 normalizes over the streams of a call.*layer \(BatchNorm1d\)"):
        check_eval_mode(program(layer, False), "m.pt2")


class Noise(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + torch.randn_like(x)


def test_random_numbers_are_named_with_their_line() -> None:
    with pytest.raises(UnsupportedError) as caught:
        check_eval_mode(program(Noise().eval(), False), "m.pt2")
    told = str(caught.value)
    assert told.startswith(f"m.pt2 draws random numbers: aten.randn_like in the module layer (Noise): {__file__}:")
    assert "in forward:\n    return x + torch.randn_like(x)\nOutputs of a stream have to be repeatable." in told


class Step(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(3, 3)
        self.drop = nn.Dropout(0.2)

    def forward(self, x: Tensor, h: Tensor | None) -> tuple[Tensor, Tensor]:
        h = torch.tanh(self.drop(self.mix(x)) + (0 if h is None else h))
        return h * 2, h


def test_a_file_is_refused_before_it_runs(tmp_path: Path) -> None:
    path = tmp_path / "m.pt2"
    torch.export.save(torch.export.export(Step().train(), (torch.zeros(1, 3), torch.zeros(1, 3))), path)
    result = invoke("export", path, "--state", "h=1", "-t", "onnx", "-o", tmp_path / "m.nsm")
    refused(result, 3, f"{path} was exported in training mode: aten.dropout in the module drop (Dropout). Call")


def test_an_argument_that_was_none_is_told(tmp_path: Path) -> None:
    path = tmp_path / "m.pt2"
    torch.export.save(torch.export.export(Step().eval(), (torch.zeros(1, 3), None)), path)
    result = invoke("export", path, "--state", "h=1", "-t", "onnx", "-o", tmp_path / "m.nsm")
    refused(result, 2, "The argument h of the program was not a tensor but None when it was exported")
