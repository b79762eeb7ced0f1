"""LSTMs with projections, and models that compute with complex numbers, exported and streamed against a plain loop."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn

import nsm
from nsm.adapters.model import AdaptedModel
from nsm.bundle import Bundle
from tests.export.helpers import quantization_of

pytestmark = pytest.mark.filterwarnings("ignore")  # what torch says of its own deprecated parts

TOKENS = 90


@torch.no_grad()
def by_hand(module: nn.Module, start: Sequence[Tensor], tokens: Tensor, axis: int = 0) -> np.ndarray[Any, Any]:
    """Outputs [B, T, ...] of a module that takes one token at a time, with nothing of this project."""
    states = [torch.cat([value] * len(tokens), axis) for value in start]
    outputs = []
    for index in range(tokens.shape[1]):
        output, *states = module(tokens[:, index], *states)
        outputs.append(output)
    return torch.stack(outputs, 1).numpy()


def assert_streams(step: AdaptedModel, tokens: Tensor, wanted: np.ndarray[Any, Any], path: Path) -> Bundle:
    """Both targets give what was wanted, in uneven pieces."""
    bundle = nsm.export_model(step, ["onnxruntime", "openvino"], path, samples=tokens.numpy(), batch=2, golden_steps=8)
    for target in ("onnxruntime", "openvino"):
        with nsm.open(path, target=target) as session:
            pieces = [session.run(piece.numpy())["outputs"] for piece in tokens.split([5, 1, TOKENS - 6], 1)]
        np.testing.assert_allclose(np.concatenate(pieces, 1), wanted, rtol=1e-4, atol=5e-6)
    return bundle


def operators(bundle: Bundle, entry: str = "step") -> list[str]:
    graph = onnx.load(str(bundle.path / "graphs" / f"{entry}.onnx"), load_external_data=False).graph
    return [node.op_type for node in graph.node]


# -- LSTMs with projections -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options", [{"num_layers": 2, "proj_size": 3}, {"proj_size": 1, "batch_first": True, "bias": False}]
)
def test_an_lstm_with_projections_streams(options: dict[str, Any], tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = nn.LSTM(5, 8, **options)
    tokens = torch.randn(2, TOKENS, 5)
    with torch.no_grad():
        wanted = module(tokens if module.batch_first else tokens.transpose(0, 1))[0]
    step = nsm.as_step(module, chunk_size=4)
    shapes = [list(state.initial.shape) for state in step.carried]
    assert shapes == [[module.num_layers, 1, module.proj_size], [module.num_layers, 1, 8]]
    outputs = (wanted if module.batch_first else wanted.transpose(0, 1)).numpy()
    bundle = assert_streams(step, tokens, outputs, tmp_path / "m.nsm")
    assert not {"LSTM", "Loop", "Scan"} & {*operators(bundle), *operators(bundle, "decode")}


class Mixed(nn.Module):
    """One token; an LSTM with projections behind one without."""

    def __init__(self) -> None:
        super().__init__()
        self.plain = nn.LSTM(5, 6)
        self.projected = nn.LSTM(6, 8, proj_size=3)

    def forward(self, x: Tensor, *states: Tensor) -> tuple[Tensor, ...]:
        y, first = self.plain(x[None], states[:2])
        y, second = self.projected(y, states[2:])
        return (y[0], *first, *second)


def test_only_the_lstm_with_projections_is_taken_apart(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module, tokens = Mixed().eval(), torch.randn(2, TOKENS, 5)
    start = [torch.zeros(1, 1, size) for size in (6, 6, 3, 8)]
    step = nsm.as_step(module, [nsm.Carried(n, v, 1) for n, v in zip("abcd", start, strict=True)], token_shape=(5,))
    bundle = assert_streams(step, tokens, by_hand(module, start, tokens, 1), tmp_path / "m.nsm")
    assert operators(bundle).count("LSTM") == 1


# -- complex numbers --------------------------------------------------------------------------------------------------


class Spectrum(nn.Module):
    """Magnitudes of a sliding window [B, 2 N], and a GRU over them."""

    def __init__(self, size: int, magnitude: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.magnitude = magnitude
        self.memory = nn.GRUCell(size + 1, 8)

    def forward(self, x: Tensor, past: Tensor, h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        h = self.memory(torch.log1p(self.magnitude(torch.cat([past, x], 1))), h)
        return h * 2, x + 0, h


class Mask(nn.Module):
    """Speech enhancement: a complex mask on the spectrum of a window, and overlap-add; the window is a state."""

    window: Tensor

    def __init__(self, size: int) -> None:
        super().__init__()
        self.register_buffer("window", torch.hann_window(2 * size).sqrt())
        self.head = nn.Linear(2 * size + 2, 2 * size + 2)

    def forward(self, x: Tensor, past: Tensor, tail: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        z = torch.fft.rfft(torch.cat([past, x], 1) * self.window, norm="ortho")
        mask = torch.tanh(self.head(torch.view_as_real(z).flatten(1))).unflatten(1, (-1, 2))
        y = torch.fft.irfft(z * torch.view_as_complex(mask), norm="ortho") * self.window
        return y[:, : x.shape[1]] + tail, x + 0, y[:, x.shape[1] :] + 0


class Diagonal(nn.Module):
    """A linear recurrence with a complex, diagonal matrix, whose state is carried as pairs [B, 4, 2]."""

    def __init__(self) -> None:
        super().__init__()
        self.logs = nn.Parameter(torch.complex(torch.linspace(-1, -0.1, 4), torch.linspace(0, 2, 4)))
        self.inward = nn.Parameter(torch.randn(4, 3, dtype=torch.complex64))
        self.outward = nn.Parameter(torch.randn(3, 4, dtype=torch.complex64))

    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        z = torch.exp(self.logs) * torch.view_as_complex(h) + x.to(torch.complex64) @ self.inward.T
        return (z @ self.outward.T).real, torch.view_as_real(z)


MODELS: dict[str, tuple[Callable[[], nn.Module], list[Tensor], int]] = {
    "rfft, magnitudes": (
        lambda: Spectrum(16, lambda u: torch.fft.rfft(u).abs()),
        [torch.zeros(1, 16), torch.zeros(1, 8)],
        16,
    ),
    "stft": (
        lambda: Spectrum(
            16,
            lambda u: torch.stft(u, 32, 16, window=torch.hann_window(32), center=False, return_complex=True).abs()[
                ..., 0
            ],
        ),
        [torch.zeros(1, 16), torch.zeros(1, 8)],
        16,
    ),
    "rfft, powers": (
        lambda: Spectrum(20, lambda u: torch.view_as_real(torch.fft.rfft(u)).square().sum(-1)),
        [torch.zeros(1, 20), torch.zeros(1, 8)],
        20,
    ),
    "complex mask": (lambda: Mask(24), [torch.zeros(1, 24)] * 2, 24),
    "complex mask, long": (lambda: Mask(480), [torch.zeros(1, 480)] * 2, 480),
    "diagonal": (Diagonal, [torch.zeros(1, 4, 2)], 3),
}


@pytest.mark.parametrize("name", MODELS)
def test_complex_numbers_stream_in_pairs(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    make, start, width = MODELS[name]
    module, tokens = make().eval(), torch.randn(2, TOKENS, width)
    bundle = assert_streams(
        nsm.as_step(module, [value.clone() for value in start], token_shape=(width,)),
        tokens,
        by_hand(module, start, tokens),
        tmp_path / "m.nsm",
    )
    assert not {"DFT", "STFT"} & set(operators(bundle))


def test_the_matrix_of_a_transform_stays_fp32(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = Spectrum(128, lambda u: torch.fft.rfft(u).abs())
    module.memory = nn.GRUCell(129, 64)
    step = nsm.as_step(module, [torch.zeros(1, 128), torch.zeros(1, 64)], token_shape=(128,))
    options: dict[str, Any] = {"precision": "int8", "allow_slower": True, "golden_steps": 8, "num_samples": 2}
    bundle = nsm.export_model(step, "onnxruntime", tmp_path / "m.nsm", **options)
    kept = quantization_of(bundle.manifest.artifacts[0]).kept_in_fp32
    assert kept["module.fourier_transform/MatMul"] == "it is a Fourier transform"
    assert "module.memory/MatMul" not in kept
