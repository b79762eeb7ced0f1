"""Fourier transforms as products, against torch's own in double precision."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from nsm.export.capture import fourier
from nsm.export.capture.fourier import LONGEST

LENGTHS = (1, 2, 3, 8, 15, 128, 320, 400, LONGEST, LONGEST + 1, 521, 960, 1024, 1536, 4096)
TOLERANCE = 1e-6
"""Relative to the largest number; torch's own transforms in float32 reach 2e-7."""


def random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(shape[-1]))


def assert_equal(given: tuple[Tensor, Tensor], wanted: Tensor) -> None:
    made = torch.complex(given[0].double(), given[1].double())
    assert given[0].dtype == torch.float32
    assert made.shape == wanted.shape
    assert float((made - wanted).abs().max()) <= TOLERANCE * float(wanted.abs().max())


@pytest.mark.parametrize("length", LENGTHS)
def test_a_real_signal(length: int) -> None:
    x = random(2, length)
    assert_equal(fourier.real_to_complex(x, [1], 0, True), torch.fft.rfft(x.double()))
    assert_equal(fourier.real_to_complex(x, [1], 1, False), torch.fft.fft(x.double(), norm="ortho"))


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("forward", [True, False])
def test_a_complex_signal(length: int, forward: bool) -> None:
    x = torch.complex(random(3, length), random(2, 3, length)[1])
    parts = fourier.complex_to_complex((x.real, x.imag), [1], 0, forward)
    wanted = torch.fft.fft(x.to(torch.complex128)) if forward else torch.fft.ifft(x.to(torch.complex128)) * length
    assert_equal(parts, wanted)


@pytest.mark.parametrize("length", LENGTHS)
def test_back_from_half_a_spectrum(length: int) -> None:
    """Its first number, and that of half the sampling rate, are real; what else is given there is ignored."""
    half = length // 2 + 1
    x = torch.complex(random(2, half), random(3, half)[1:])
    made = fourier.complex_to_real((x.real, x.imag), [1], 2, length)
    wanted = torch.fft.irfft(x.to(torch.complex128), n=length)
    assert float((made - wanted).abs().max()) <= TOLERANCE * float(wanted.abs().max())


@pytest.mark.parametrize("axes", [[0], [2], [0, 2], [2, 0, 1]])
@pytest.mark.parametrize("normalization", [0, 1, 2])
def test_axes_and_norms(axes: list[int], normalization: int) -> None:
    norm = ("backward", "ortho", "forward")[normalization]
    x = random(4, 5, 6)
    parts = fourier.real_to_complex(x, axes, normalization, True)
    assert_equal(parts, torch.fft.rfftn(x.double(), dim=axes, norm=norm))
    back = fourier.complex_to_real(parts, axes, normalization, x.shape[axes[-1]])
    other = ("forward", "ortho", "backward")[normalization]
    wanted = torch.fft.irfftn(torch.complex(*parts).to(torch.complex128), [x.shape[a] for a in axes], axes, other)
    torch.testing.assert_close(back, wanted.float() * 1.0, rtol=1e-5, atol=1e-5)


def test_a_spectrum_that_is_too_short_ends_in_zeros() -> None:
    x = torch.complex(random(2, 3), random(3, 3)[1:])
    made = fourier.complex_to_real((x.real, x.imag), [1], 2, 16)
    torch.testing.assert_close(made, torch.fft.irfft(x, n=16), rtol=1e-5, atol=1e-6)


def test_long_transforms_have_small_matrices() -> None:
    """The numbers of all constants of a transform of length 4096: two of length 64, and a rotation."""
    program = torch.export.export(_Transform(), (torch.zeros(1, 4096),))
    assert sum(value.numel() for value in program.constants.values()) <= 2 * 2 * 2 * 64 * 64 + 2 * 4096


class _Transform(torch.nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return fourier.real_to_complex(x, [1], 0, True)


def test_frames_are_added_where_they_overlap() -> None:
    frames = random(2, 5, 8)
    made = fourier.overlap_add(frames, (2, 20), 1, 8, 3)
    torch.testing.assert_close(made, torch.ops.aten.unfold_backward(frames, [2, 20], 1, 8, 3))
    columns = frames.movedim(1, 0)  # [F, B, size] -> [20, B]
    made = fourier.overlap_add(columns, (20, 2), 0, 8, 3)
    torch.testing.assert_close(made, torch.ops.aten.unfold_backward(columns, [20, 2], 0, 8, 3))
