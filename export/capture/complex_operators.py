"""Tables of complex operators and their replacements on `Pair`s of real tensors."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from nsm.export.capture import fourier


@dataclass(frozen=True)
class Pair:
    """A complex tensor: its real and its imaginary part, of equal shapes."""

    real: Tensor
    imag: Tensor


def operation_of(name: str, target: Any) -> Callable[..., Any] | None:
    """Return the replacement of a torch operator for `Pair`s by its name without `aten.`, or None."""
    return _OPERATIONS.get(name) or (partial(_by_parts, target) if name in _BY_PARTS else None)


# -- operators of one part --------------------------------------------------------------------------------------------

_BY_PARTS = frozenset(
    "as_strided cat clone cumsum detach diagonal embedding expand flip gather index index_select mean neg permute "  # noqa: SIM905
    "repeat roll select select_scatter slice slice_scatter split split_with_sizes squeeze stack sum t transpose tril "
    "triu unbind unfold unsqueeze view where".split()
)
"""Operators that apply to the real and to the imaginary part separately."""


def _by_parts(target: Any, *args: Any, **kwargs: Any) -> Any:
    def imaginary(value: Any) -> Any:
        if isinstance(value, Tensor) and value.is_floating_point():
            return torch.zeros_like(value)  # a real operand; conditions and indices are not floats
        return value.imag if isinstance(value, Pair | complex) else value

    def real(value: Any) -> Any:
        return value.real if isinstance(value, Pair | complex) else value

    re, im = (target(*pytree.tree_map(part, args), **pytree.tree_map(part, kwargs)) for part in (real, imaginary))
    if isinstance(re, Tensor):
        return Pair(re, im)
    return [Pair(one, two) for one, two in zip(re, im, strict=True)]


# -- arithmetic -------------------------------------------------------------------------------------------------------


def _parts(value: Any) -> tuple[Any, Any]:
    """Return the real and imaginary part; the imaginary part is None for a real value."""
    return (value.real, value.imag) if isinstance(value, Pair | complex) else (value, None)


def _joined(re: Any, im: Any) -> Pair:
    """Broadcast two parts to a pair; one of them may be a number."""
    tensor = re if isinstance(re, Tensor) else im
    re, im = (part if isinstance(part, Tensor) else torch.full_like(tensor, part) for part in (re, im))
    re, im = torch.broadcast_tensors(re, im)
    return Pair(re, im)


def _add(a: Any, b: Any, alpha: float = 1) -> Pair:
    (ar, ai), (br, bi) = _parts(a), _parts(b)
    if alpha != 1:
        br, bi = alpha * br, None if bi is None else alpha * bi
    imag = [part for part in (ai, bi) if part is not None]
    return _joined(ar + br, imag[0] + imag[1] if len(imag) == 2 else imag[0])


def _sub(a: Any, b: Any, alpha: float = 1) -> Pair:
    return _add(a, b, -alpha)


def _product_of(multiply: Callable[[Any, Any], Any]) -> Callable[..., Pair]:
    """Return the complex version of `multiply`, which must be linear in both factors."""

    def product(a: Any, b: Any, *others: Any, **named: Any) -> Pair:
        def times(x: Any, y: Any) -> Any:
            return multiply(x, y, *others, **named)

        (ar, ai), (br, bi) = _parts(a), _parts(b)
        if bi is None:
            return _joined(times(ar, br), times(ai, br))
        if ai is None:
            return _joined(times(ar, br), times(ar, bi))
        return Pair(times(ar, br) - times(ai, bi), times(ar, bi) + times(ai, br))

    return product


_mul = _product_of(operator.mul)


def _conj(z: Any) -> Pair:
    return Pair(z.real, -z.imag)


def _div(a: Any, b: Any) -> Pair:
    if not isinstance(b, Pair | complex):
        return Pair(a.real / b, a.imag / b)
    size = b.real * b.real + b.imag * b.imag
    return _mul(a, _joined_or_number(b.real / size, -b.imag / size))


def _joined_or_number(re: Any, im: Any) -> Pair | complex:
    return Pair(re, im) if isinstance(re, Tensor) else complex(re, im)


def _abs(z: Pair) -> Tensor:
    return (z.real * z.real + z.imag * z.imag).sqrt()


def _angle(z: Pair) -> Tensor:
    return torch.atan2(z.imag, z.real)


def _polar(size: Tensor, angle: Tensor) -> Pair:
    return Pair(size * angle.cos(), size * angle.sin())


def _sqrt(z: Pair) -> Pair:
    size = _abs(z)
    large = ((size + z.real.abs()) / 2).sqrt()  # the larger part; division gives the other without cancellation
    small = z.imag.abs() / torch.where(large > 0, 2 * large, torch.ones_like(large))
    real, imag = torch.where(z.real < 0, small, large), torch.where(z.real < 0, large, small)
    return Pair(real, torch.where(z.imag < 0, -imag, imag))


def _pow(z: Any, exponent: Any) -> Any:
    if isinstance(z, Pair) and isinstance(exponent, int) and 1 <= exponent <= 8:
        made: Any = z
        for _ in range(exponent - 1):
            made = _mul(made, z)
        return made
    # Otherwise z^w = exp(w log z).
    base = Pair(_abs(z).log(), _angle(z)) if isinstance(z, Pair) else torch.log(torch.as_tensor(z))
    return _exp(
        _mul(base, exponent)
        if isinstance(exponent, Pair | complex)
        else Pair(base.real * exponent, base.imag * exponent)
    )


def _exp(z: Pair) -> Pair:
    return _polar(z.real.exp(), z.imag)


def _sgn(z: Pair) -> Pair:
    size = _abs(z)
    safe = torch.where(size > 0, size, torch.ones_like(size))
    return Pair(z.real / safe, z.imag / safe)


def _linear(x: Any, weight: Any, bias: Any = None) -> Pair:
    made = _product_of(torch.nn.functional.linear)(x, weight)
    return made if bias is None else _add(made, bias)


def _conv1d(x: Any, weight: Any, bias: Any = None, *others: Any) -> Pair:
    made = _product_of(lambda x, weight: torch.conv1d(x, weight, None, *others))(x, weight)
    return made if bias is None else _add(made, _by_parts(torch.ops.aten.unsqueeze.default, bias, -1))


def _einsum(equation: str, factors: list[Any], path: Any = None) -> Pair:
    if len(factors) == 1:
        return cast(Pair, _by_parts(torch.ops.aten.einsum.default, equation, factors, path=path))
    return _product_of(lambda a, b: torch.einsum(equation, a, b))(*factors)


# -- making, converting, comparing ------------------------------------------------------------------------------------


def _number(value: Any) -> tuple[float, float]:
    return complex(value).real, complex(value).imag


def _filled(make: Callable[..., Tensor]) -> Callable[..., Pair]:
    """Return a function that fills a complex constant with `make`; its last positional argument is the number."""

    def fill(*args: Any, dtype: Any = None, **_others: Any) -> Pair:
        *shape, value = args
        kind = (dtype or torch.complex64).to_real()
        re, im = (
            make(*(item.real if isinstance(item, Pair) else item for item in shape), part, dtype=kind)
            for part in _number(value)
        )
        return Pair(re, im)

    return fill


def _fill(z: Pair, value: Any) -> Pair:
    if isinstance(value, int | float | complex):
        return _filled(torch.full_like)(z, value)
    re, im = _parts(value)
    return Pair(re.expand_as(z.real), torch.zeros_like(z.imag) if im is None else im.expand_as(z.imag))


def _to(z: Any, *args: Any, dtype: Any = None, **_others: Any) -> Any:
    dtype = dtype or next((item for item in args if isinstance(item, torch.dtype)), None)
    if dtype is None:
        return z
    if not dtype.is_complex:
        return z.real.to(dtype)
    kind = dtype.to_real()
    return (
        Pair(z.real.to(kind), z.imag.to(kind))
        if isinstance(z, Pair)
        else Pair(z.to(kind), torch.zeros_like(z, dtype=kind))
    )


def _masked_fill(z: Any, mask: Tensor, value: Any) -> Pair:
    (re, im), (vr, vi) = _parts(z), _parts(value)
    im = torch.zeros_like(re) if im is None else im
    return Pair(re.masked_fill(mask, vr), im.masked_fill(mask, 0 if vi is None else vi))


def _padded(z: Pair, sizes: list[int], value: Any = 0) -> Pair:
    re, im = _number(value)
    return Pair(torch.constant_pad_nd(z.real, sizes, re), torch.constant_pad_nd(z.imag, sizes, im))


def _padded_by(z: Pair, sizes: list[int], mode: str = "constant", value: Any = None) -> Pair:
    if mode == "constant":
        return _padded(z, sizes, value or 0)
    return Pair(*(torch.nn.functional.pad(part, sizes, mode) for part in (z.real, z.imag)))


def _eq(a: Any, b: Any) -> Tensor:
    (ar, ai), (br, bi) = _parts(a), _parts(b)
    return cast(Tensor, (ar == br) & ((0 if ai is None else ai) == (0 if bi is None else bi)))


def _of_halves(x: Tensor) -> Pair:
    re, im = x.unbind(-1)
    return Pair(re, im)


def _spectrum(x: Tensor, axes: list[int], normalization: int, onesided: bool) -> Pair:
    return Pair(*fourier.real_to_complex(x, axes, normalization, onesided))


_OPERATIONS: dict[str, Callable[..., Any]] = {
    "add": _add,
    "sub": _sub,
    "rsub": lambda a, b, alpha=1: _sub(b, a, alpha),
    "mul": _mul,
    "div": _div,
    "reciprocal": lambda z: _div(1 + 0j, z),
    "square": lambda z: _mul(z, z),
    "pow": _pow,
    "exp": _exp,
    "log": lambda z: Pair(_abs(z).log(), _angle(z)),
    "sqrt": _sqrt,
    "abs": _abs,
    "angle": _angle,
    "sgn": _sgn,
    **dict.fromkeys(("conj", "_conj", "_conj_physical"), _conj),
    **dict.fromkeys(("resolve_conj", "resolve_neg"), lambda z: z),
    "real": lambda z: z.real,
    "imag": lambda z: z.imag,
    "view_as_real": lambda z: torch.stack([z.real, z.imag], -1),
    "view_as_complex": _of_halves,
    "complex": Pair,
    "polar": _polar,
    "mm": _product_of(torch.mm),
    "bmm": _product_of(torch.bmm),
    "mv": _product_of(torch.mv),
    "dot": _product_of(torch.dot),
    "outer": _product_of(torch.outer),
    "matmul": _product_of(torch.matmul),
    "einsum": _einsum,
    "linear": _linear,
    "conv1d": _conv1d,
    "addmm": lambda bias, a, b: _add(_product_of(torch.mm)(a, b), bias),
    "linalg_vector_norm": lambda z, *args, **named: torch.linalg.vector_norm(_abs(z), *args, **named),
    "full": _filled(torch.full),
    "full_like": _filled(torch.full_like),
    "scalar_tensor": _filled(torch.scalar_tensor),
    "fill": _fill,
    "copy": _fill,
    "_assert_tensor_metadata": lambda *_args, **_named: None,  # describes the complex tensor, not the pair
    "zeros": lambda size, **named: _filled(torch.full)(size, 0, **named),
    "ones": lambda size, **named: _filled(torch.full)(size, 1, **named),
    "zeros_like": lambda z, **named: _filled(torch.full_like)(z, 0, **named),
    "ones_like": lambda z, **named: _filled(torch.full_like)(z, 1, **named),
    "to": _to,
    "_to_copy": _to,
    "masked_fill": _masked_fill,
    "constant_pad_nd": _padded,
    "pad": _padded_by,
    "eq": _eq,
    "ne": lambda a, b: ~_eq(a, b),
    "_fft_r2c": _spectrum,
    "_fft_c2c": lambda z, *args: Pair(*fourier.complex_to_complex((z.real, z.imag), *args)),
    "_fft_c2r": lambda z, *args: fourier.complex_to_real((z.real, z.imag), *args),
}
"""Operators by name, on `Pair`s, real tensors and numbers."""

OPERATORS = frozenset(_OPERATIONS) | _BY_PARTS
"""Names of the operators that are rewritten for pairs of real tensors."""
