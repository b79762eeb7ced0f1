"""Discrete Fourier transforms of constant length as MatMuls with constant matrices.

TensorRT has no `DFT`, and OpenVINO converts a one-sided one incorrectly. Every target multiplies matrices fast. A long
transform is split into two shorter ones, of the factors of its length, which keeps the matrices small [1].

[1] W. M. Gentleman, G. Sande, "Fast Fourier transforms: for fun and profit", 1966.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

LONGEST = 512
"""Length of a transform above which it is made of two shorter ones, where it has factors."""

Parts = tuple[Tensor, Tensor]


def transform(real: Tensor, imag: Tensor | None, axis: int, inverse: bool = False, count: int | None = None) -> Parts:
    """The first `count` numbers of the transform of a complex or real tensor along an axis, not normalised.

    Returns:
        The real and the imaginary part.
    """
    length = real.shape[axis]
    count = length if count is None else count
    real = real.movedim(axis, -1)
    imag = None if imag is None else imag.movedim(axis, -1)
    first = _factor(length)
    if first == length:
        re, im = _product(real, imag, inverse, count)
    else:
        re, im = (part[..., :count] for part in _in_two(real, imag, first, inverse))
    return re.movedim(-1, axis), im.movedim(-1, axis)


def real_to_complex(real: Tensor, axes: Sequence[int], normalization: int, onesided: bool) -> Parts:
    """`aten._fft_r2c`: the last axis first, of which `onesided` keeps the first half."""
    *others, last = axes
    length = math.prod(real.shape[axis] for axis in axes)
    parts = transform(real, None, last, count=real.shape[last] // 2 + 1 if onesided else None)
    for axis in others:
        parts = transform(*parts, axis)
    return _normalised(parts, normalization, length)


def complex_to_complex(parts: Parts, axes: Sequence[int], normalization: int, forward: bool) -> Parts:
    """`aten._fft_c2c`."""
    length = math.prod(parts[0].shape[axis] for axis in axes)
    for axis in axes:
        parts = transform(*parts, axis, not forward)
    return _normalised(parts, normalization, length)


def complex_to_real(parts: Parts, axes: Sequence[int], normalization: int, last_size: int) -> Tensor:
    """`aten._fft_c2r`: of a spectrum whose last axis has the first half, `last_size // 2 + 1` numbers."""
    *others, last = axes
    for axis in others:
        parts = transform(*parts, axis, inverse=True)
    real, imag = (part.movedim(last, -1) for part in _narrowed(parts, last, last_size // 2 + 1))
    made = _from_half(real, imag, last_size) if _factor(last_size) == last_size else _mirrored(real, imag, last_size)
    length = last_size * math.prod(parts[0].shape[axis] for axis in others)
    return _normalised((made.movedim(-1, last), made), normalization, length)[0]


def overlap_add(frames: Tensor, sizes: Sequence[int], axis: int, size: int, step: int) -> Tensor:
    """`aten.unfold_backward`: the sum of frames [..., F, ..., size], each at its place, as in `torch.istft`.

    Args:
        frames: F on `axis`, the samples of a frame on the last axis.
        sizes: of the result, in which `axis` has the frames, each `step` after the other.
    """
    axis = axis % len(sizes)
    total = frames.new_zeros(list(sizes))
    behind = len(sizes) - 1 - axis
    for index, frame in enumerate(frames.unbind(axis)):
        start = index * step
        gaps = [0, 0] * behind + [start, sizes[axis] - start - size]
        total = total + torch.constant_pad_nd(frame.movedim(-1, axis), gaps)
    return total


def _from_half(real: Tensor, imag: Tensor, length: int) -> Tensor:
    """[..., N / 2 + 1] times the matrix of the inverse transform, in which the other half is counted too."""
    half = real.shape[-1]
    cos, sin = _waves(np.outer(np.arange(half), np.arange(length)), length, inverse=True)
    twice = np.full((half, 1), 2, np.float32)
    twice[_own_images(length)] = 1
    return torch.cat([real, imag], -1) @ torch.from_numpy(np.concatenate([twice * cos, -twice * sin]))


def _mirrored(real: Tensor, imag: Tensor, length: int) -> Tensor:
    """The inverse transform of [..., N / 2 + 1] and of its mirror image, which is conjugate."""
    mirror = torch.arange((length - 1) // 2, 0, -1)
    own = torch.ones(real.shape[-1])
    own[_own_images(length)] = 0
    imag = imag * own
    real = torch.cat([real, real.index_select(-1, mirror)], -1)
    imag = torch.cat([imag, -imag.index_select(-1, mirror)], -1)
    return transform(real, imag, -1, inverse=True)[0]


def _own_images(length: int) -> list[int]:
    """The places of a spectrum that are their own mirror images, where it is real."""
    return [0] if length % 2 else [0, length // 2]


def _product(real: Tensor, imag: Tensor | None, inverse: bool, count: int) -> Parts:
    """[..., N] times the first columns of the matrix of the transform."""
    length = real.shape[-1]
    cos, sin = _waves(np.outer(np.arange(length), np.arange(count)), length, inverse)
    if imag is None:
        made = real @ torch.from_numpy(np.concatenate([cos, sin], 1))
    else:
        matrix = np.concatenate([np.concatenate([cos, sin], 1), np.concatenate([-sin, cos], 1)])
        made = torch.cat([real, imag], -1) @ torch.from_numpy(matrix)
    return made[..., :count], made[..., count:]


def _in_two(real: Tensor, imag: Tensor | None, first: int, inverse: bool) -> Parts:
    """A transform of length A B: those of length A, a rotation, and those of length B."""
    length = real.shape[-1]
    second = length // first
    shape = (*real.shape[:-1], first, second)
    columns = (real.reshape(shape), None if imag is None else imag.reshape(shape))
    re, im = transform(*columns, -2, inverse)
    cos, sin = map(torch.from_numpy, _waves(np.outer(np.arange(first), np.arange(second)), length, inverse))
    re, im = transform(re * cos - im * sin, re * sin + im * cos, -1, inverse)
    flat = (*real.shape[:-1], length)
    return re.transpose(-1, -2).reshape(flat), im.transpose(-1, -2).reshape(flat)


def _waves(turns: np.ndarray, length: int, inverse: bool) -> tuple[np.ndarray, np.ndarray]:
    """Real and imaginary part of exp(-2 pi i turns / length); of the inverse without the sign."""
    angles = 2 * np.pi * (turns % length) / length
    sign = 1 if inverse else -1
    return np.cos(angles).astype(np.float32), (sign * np.sin(angles)).astype(np.float32)


def _factor(length: int) -> int:
    """The factor of a length next to its root; the length itself where that is short, or prime."""
    if length <= LONGEST:
        return length
    factors = [size for size in range(2, math.isqrt(length) + 1) if length % size == 0]
    return max(factors, default=length)


def _narrowed(parts: Parts, axis: int, size: int) -> Parts:
    """The first numbers along an axis; zeros where it has fewer."""
    given = parts[0].shape[axis]
    if given < size:
        missing = list(parts[0].shape)
        missing[axis] = size - given
        real, imag = (torch.cat([part, part.new_zeros(missing)], axis) for part in parts)
        return real, imag
    return parts[0].narrow(axis, 0, size), parts[1].narrow(axis, 0, size)


def _normalised(parts: Parts, normalization: int, length: int) -> Parts:
    """0: as it is; 1: divided by the root of the length; 2: by the length."""
    if normalization == 0:
        return parts
    scale = 1 / (math.sqrt(length) if normalization == 1 else length)
    return parts[0] * scale, parts[1] * scale
