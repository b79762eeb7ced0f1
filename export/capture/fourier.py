"""Discrete Fourier transforms of constant length as MatMuls with constant matrices.

TensorRT has no `DFT`, and OpenVINO converts a one-sided `DFT` incorrectly; every target has a fast MatMul. A long
transform is split into two shorter transforms, whose lengths are factors of its length, to keep the matrices small [1].

[1] W. M. Gentleman, G. Sande, "Fast Fourier transforms: for fun and profit", 1966.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

LONGEST = 512
"""Longest transform that is one MatMul; a longer transform is split if its length has factors."""

Parts = tuple[Tensor, Tensor]


def transform(real: Tensor, imag: Tensor | None, axis: int, inverse: bool = False, count: int | None = None) -> Parts:
    """Transform a complex or real tensor along an axis, without normalisation.

    Args:
        real, imag: real and imaginary part, of equal shapes; an `imag` of None means zero.
        axis: axis to transform.
        inverse: compute the inverse transform.
        count: number of frequencies to return, from the first; None for all.

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
    """Compute `aten._fft_r2c`: transform the last axis first; `onesided` keeps its first half."""
    *others, last = axes
    length = math.prod(real.shape[axis] for axis in axes)
    parts = transform(real, None, last, count=real.shape[last] // 2 + 1 if onesided else None)
    for axis in others:
        parts = transform(*parts, axis)
    return _normalised(parts, normalization, length)


def complex_to_complex(parts: Parts, axes: Sequence[int], normalization: int, forward: bool) -> Parts:
    """Compute `aten._fft_c2c`."""
    length = math.prod(parts[0].shape[axis] for axis in axes)
    for axis in axes:
        parts = transform(*parts, axis, not forward)
    return _normalised(parts, normalization, length)


def complex_to_real(parts: Parts, axes: Sequence[int], normalization: int, last_size: int) -> Tensor:
    """Compute `aten._fft_c2r` of a one-sided spectrum, with `last_size // 2 + 1` values on its last axis."""
    *others, last = axes
    for axis in others:
        parts = transform(*parts, axis, inverse=True)
    real, imag = (part.movedim(last, -1) for part in _narrowed(parts, last, last_size // 2 + 1))
    made = _from_half(real, imag, last_size) if _factor(last_size) == last_size else _mirrored(real, imag, last_size)
    length = last_size * math.prod(parts[0].shape[axis] for axis in others)
    return _normalised((made.movedim(-1, last), made), normalization, length)[0]


def overlap_add(frames: Tensor, sizes: Sequence[int], axis: int, size: int, step: int) -> Tensor:
    """Compute `aten.unfold_backward`: overlap-add of frames [..., F, ..., size], as in `torch.istft`.

    Args:
        frames: F frames on `axis`, the samples of each frame on the last axis.
        sizes: shape of the result.
        axis: axis of the result along which the frames are added.
        size: samples of a frame.
        step: distance between the starts of two frames, in samples.
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
    """Multiply [..., N / 2 + 1] by the matrix of the inverse transform, which also counts the mirrored half."""
    half = real.shape[-1]
    cos, sin = _waves(np.outer(np.arange(half), np.arange(length)), length, inverse=True)
    twice = np.full((half, 1), 2, np.float32)
    twice[_own_images(length)] = 1
    return torch.cat([real, imag], -1) @ torch.from_numpy(np.concatenate([twice * cos, -twice * sin]))


def _mirrored(real: Tensor, imag: Tensor, length: int) -> Tensor:
    """Append the conjugate mirror image to [..., N / 2 + 1], and compute the inverse transform."""
    mirror = torch.arange((length - 1) // 2, 0, -1)
    own = torch.ones(real.shape[-1])
    own[_own_images(length)] = 0
    imag = imag * own
    real = torch.cat([real, real.index_select(-1, mirror)], -1)
    imag = torch.cat([imag, -imag.index_select(-1, mirror)], -1)
    return transform(real, imag, -1, inverse=True)[0]


def _own_images(length: int) -> list[int]:
    """Return the indices of a spectrum that are their own mirror images; they are real."""
    return [0] if length % 2 else [0, length // 2]


def _product(real: Tensor, imag: Tensor | None, inverse: bool, count: int) -> Parts:
    """Multiply [..., N] by the first `count` columns of the matrix of the transform."""
    length = real.shape[-1]
    cos, sin = _waves(np.outer(np.arange(length), np.arange(count)), length, inverse)
    if imag is None:
        made = real @ torch.from_numpy(np.concatenate([cos, sin], 1))
    else:
        matrix = np.concatenate([np.concatenate([cos, sin], 1), np.concatenate([-sin, cos], 1)])
        made = torch.cat([real, imag], -1) @ torch.from_numpy(matrix)
    return made[..., :count], made[..., count:]


def _in_two(real: Tensor, imag: Tensor | None, first: int, inverse: bool) -> Parts:
    """Compute a transform of length A B: transforms of length A, twiddle factors, transforms of length B."""
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
    """Return the real and imaginary part of exp(-2 pi i turns / length), or of its conjugate for the inverse."""
    angles = 2 * np.pi * (turns % length) / length
    sign = 1 if inverse else -1
    return np.cos(angles).astype(np.float32), (sign * np.sin(angles)).astype(np.float32)


def _factor(length: int) -> int:
    """Return the largest factor of a length up to its root, or the length if it is short or prime."""
    if length <= LONGEST:
        return length
    factors = [size for size in range(2, math.isqrt(length) + 1) if length % size == 0]
    return max(factors, default=length)


def _narrowed(parts: Parts, axis: int, size: int) -> Parts:
    """Cut an axis to `size` values, or pad it with zeros."""
    given = parts[0].shape[axis]
    if given < size:
        missing = list(parts[0].shape)
        missing[axis] = size - given
        real, imag = (torch.cat([part, part.new_zeros(missing)], axis) for part in parts)
        return real, imag
    return parts[0].narrow(axis, 0, size), parts[1].narrow(axis, 0, size)


def _normalised(parts: Parts, normalization: int, length: int) -> Parts:
    """Normalise: 0 does nothing, 1 divides by the root of the length, 2 by the length."""
    if normalization == 0:
        return parts
    scale = 1 / (math.sqrt(length) if normalization == 1 else length)
    return parts[0] * scale, parts[1] * scale
