"""Complex numbers in pairs of real tensors, operator by operator, against torch's own complex arithmetic."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from nsm.errors import UnsupportedError
from nsm.export.capture import complex_operators, complex_pairs
from nsm.export.capture.complex_pairs import is_complex
from nsm.export.capture.program import capture
from nsm.export.capture.rewrite import rewritten

pytestmark = pytest.mark.filterwarnings("ignore")  # what torch says of its own deprecated parts

SHAPE = (2, 6)
KERNEL = torch.complex(torch.linspace(-1, 1, 24).reshape(4, 6), torch.linspace(1, 0.5, 24).reshape(4, 6))


class Expression(nn.Module):
    """Operations on two complex numbers, which are made from four real ones."""

    kernel: Tensor

    def __init__(self, make: Callable[..., Tensor | list[Tensor]]) -> None:
        super().__init__()
        self.make = make
        self.register_buffer("kernel", KERNEL)
        self.weight = nn.Parameter(KERNEL[:2, :2].clone())

    def forward(self, a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> list[Tensor]:
        z, w = torch.complex(a, b), torch.complex(c, d)
        made = self.make(z, w, self)
        parts = made if isinstance(made, list) else [made]
        return [torch.view_as_real(part) if part.is_complex() else part for part in parts]


def _written(z: Tensor, value: Any) -> Tensor:
    z = z.clone()
    z[:, 1] = value
    z *= 2
    return z


def _part_written(z: Tensor, w: Tensor) -> Tensor:
    z = z.clone()
    z[:, 1:3] = w[:, :2]
    return z


ORDER = torch.tensor([[5, 4, 3, 2, 1, 0]] * 2)
OPERATORS: dict[str, Callable[..., Tensor]] = {
    "add": lambda z, w, m: z + w,
    "add a number": lambda z, w, m: z + (2 - 1j),
    "add a real tensor": lambda z, w, m: z.real + w,
    "add scaled": lambda z, w, m: torch.add(z, w, alpha=3),
    "subtract": lambda z, w, m: z - w,
    "subtract from a number": lambda z, w, m: 1 - z,
    "multiply": lambda z, w, m: z * w,
    "multiply by a number": lambda z, w, m: z * 1j,
    "multiply a real tensor by a number": lambda z, w, m: z.real * (1 + 2j),
    "multiply by a real tensor": lambda z, w, m: w.imag * z,
    "broadcast": lambda z, w, m: z[:, :1] + w * m.weight[0, 0],
    "divide": lambda z, w, m: z / w,
    "divide by a number": lambda z, w, m: z / (1 + 2j),
    "divide by a real tensor": lambda z, w, m: z / (2 + w.real.abs()),
    "divide a number": lambda z, w, m: 1 / z,
    "divide a real tensor": lambda z, w, m: z.real / w,
    "reciprocal": lambda z, w, m: z.reciprocal(),
    "negate": lambda z, w, m: -z,
    "conjugate": lambda z, w, m: z.conj() * w,
    "conjugate, resolved": lambda z, w, m: z.conj().resolve_conj(),
    "conjugate, physical": lambda z, w, m: torch.conj_physical(z),
    "real and imaginary part": lambda z, w, m: z.real - w.imag,
    "square": lambda z, w, m: z.square(),
    "power": lambda z, w, m: z**3,
    "a fractional power": lambda z, w, m: z**0.5,
    "a complex power": lambda z, w, m: z ** (0.5 + 1j),
    "the power of a number": lambda z, w, m: torch.pow(2.0, z),
    "to the power of a tensor": lambda z, w, m: z**w,
    "exp": lambda z, w, m: z.exp(),
    "log": lambda z, w, m: z.log(),
    "sqrt": lambda z, w, m: z.sqrt(),
    "abs": lambda z, w, m: z.abs(),
    "angle": lambda z, w, m: z.angle(),
    "sgn": lambda z, w, m: z.sgn() + torch.zeros_like(w).sgn(),
    "norm": lambda z, w, m: torch.linalg.vector_norm(z, dim=1),
    "polar": lambda z, w, m: torch.polar(z.abs(), w.angle()),
    "pairs": lambda z, w, m: torch.view_as_complex(torch.view_as_real(z).flip(-1)),
    "matmul": lambda z, w, m: z @ m.kernel.T,
    "matmul of a cast tensor": lambda z, w, m: z @ m.kernel.real.T.to(torch.complex64),
    "mm": lambda z, w, m: torch.mm(z, w.T),
    "mv": lambda z, w, m: torch.mv(z, w[0]),
    "dot": lambda z, w, m: torch.dot(z[0], w[1]),
    "outer": lambda z, w, m: torch.outer(z[0], w[0]),
    "bmm": lambda z, w, m: torch.bmm(z[:, None], w[:, :, None]),
    "addmm": lambda z, w, m: torch.addmm(m.kernel[0, :4], z, m.kernel.T),
    "einsum": lambda z, w, m: torch.einsum("bi,oi->bo", z, m.kernel),
    "einsum of one": lambda z, w, m: torch.einsum("bi->ib", z),
    "linear": lambda z, w, m: nn.functional.linear(z, m.kernel, m.kernel[:, 0]),
    "linear without bias": lambda z, w, m: nn.functional.linear(z, m.kernel),
    "conv1d": lambda z, w, m: nn.functional.conv1d(z[:, None], m.kernel[:, None, :3], m.kernel[:, 0], 2, 1),
    "conv1d as a layer": lambda z, w, m: nn.functional.conv1d(z[:, None], m.kernel[:, None, :3], m.kernel[:, 0]),
    "conv1d without bias": lambda z, w, m: nn.functional.conv1d(z[:, None], m.kernel[:, None, :3]),
    "sqrt of zero and of negative numbers": lambda z, w, m: (z.detach() * 0).sqrt() + (-z.abs() - 0j * w).sqrt(),
    "sum, mean, cumsum": lambda z, w, m: z.sum(1, keepdim=True) + z.mean() + w.cumsum(1),
    "shapes": lambda z, w, m: z.reshape(3, 4).transpose(0, 1).unsqueeze(0).expand(2, 4, 3).permute(1, 2, 0).squeeze(-1),
    "parts": lambda z, w, m: torch.cat([z[:, :2], w.narrow(1, 1, 2), z.flip(1)[:, :2]], 1).roll(1, 1),
    "chunks": lambda z, w, m: torch.stack([*z.chunk(2, 1), *w.split([3, 3], 1)]),
    "one of many": lambda z, w, m: z.unbind(1)[2] + w.select(1, 0),
    "gathered": lambda z, w, m: m.kernel[torch.tensor([1, 0])] + z.index_select(1, torch.tensor([5, 4, 3, 2, 1, 0])),
    "cat of a real tensor": lambda z, w, m: torch.cat([z, w.real.to(torch.complex64)], 1),
    "where": lambda z, w, m: torch.where(z.real > 0, z, w),
    "masked": lambda z, w, m: z.masked_fill(w.real > 0, 0.5),
    "padded": lambda z, w, m: nn.functional.pad(z, (1, 2)),
    "padded by its mirror image": lambda z, w, m: nn.functional.pad(z, (2, 1), "reflect"),
    "zeros and ones": lambda z, w, m: torch.zeros_like(z) + torch.ones(6, dtype=torch.complex64) * w,
    "full": lambda z, w, m: torch.full((6,), 1 - 2j) * torch.ones_like(w) + torch.zeros(2, 1, dtype=torch.complex64),
    "a number as a tensor": lambda z, w, m: z * torch.scalar_tensor(2j, dtype=torch.complex64),
    "cast": lambda z, w, m: z.real.to(torch.complex64) * w.to(torch.complex64),
    "cast to real": lambda z, w, m: z.to(torch.float32) + w.real,
    "written in place": lambda z, w, m: _written(z, 0),
    "written in place, complex": lambda z, w, m: _written(z, w[:, 0]),
    "equal": lambda z, w, m: (z == w) | (z != z.conj().conj()) | (z.real.to(torch.complex64) == z.real),
    "constants": lambda z, w, m: torch.exp(m.weight)[0, 0] * z + m.weight.sum(),
    "detached": lambda z, w, m: z.detach().contiguous().clone() + w,
    "moved and repeated": lambda z, w, m: z.t().repeat(2, 1).unfold(0, 3, 2).diagonal() + m.weight[0, 1],
    "strided": lambda z, w, m: torch.as_strided(z * 1, (2, 3), (6, 2)),
    "triangles": lambda z, w, m: z.reshape(3, 4).tril() @ w.reshape(4, 3).triu(),
    "looked up": lambda z, w, m: nn.functional.embedding(torch.tensor([1, 0]), m.kernel) + z.gather(1, ORDER),
    "filled alike": lambda z, w, m: torch.full_like(z, 1 - 2j) * w,
    "a part written in place": lambda z, w, m: _part_written(z, w),
    "a constant": lambda z, w, m: z * torch.tensor(1 - 1j),
    "rfft": lambda z, w, m: torch.fft.rfft(z.real),
    "rfft of more": lambda z, w, m: torch.fft.rfft(z.real, n=9, norm="ortho"),
    "rfft of fewer, another axis": lambda z, w, m: torch.fft.rfft(
        torch.stack([z.real] * 5), n=4, dim=0, norm="forward"
    ),
    "irfft": lambda z, w, m: torch.fft.irfft(z, n=10),
    "irfft of an odd length": lambda z, w, m: torch.fft.irfft(z, n=9, norm="ortho"),
    "irfft of more": lambda z, w, m: torch.fft.irfft(z, n=20, norm="forward"),
    "fft and ifft": lambda z, w, m: torch.fft.ifft(torch.fft.fft(z, norm="ortho") * torch.fft.fft(w)),
    "fft of a real tensor": lambda z, w, m: torch.fft.fft(z.real),
    "over two axes": lambda z, w, m: torch.fft.irfft2(torch.fft.fftshift(torch.fft.rfft2(z.imag)), s=(2, 6)),
    "over all axes": lambda z, w, m: torch.fft.ifftn(torch.fft.fftn(z) * w),
    "hermitian": lambda z, w, m: torch.fft.hfft(z, n=10) + torch.fft.ihfft(w.real, n=10).real.sum(),
    "stft": lambda z, w, m: torch.stft(z.real.reshape(1, 12), 6, 2, window=torch.hann_window(6), return_complex=True),
}


class Rewritten(NamedTuple):
    """The results of all `OPERATORS` by name, in pairs and in torch; and the operators that were replaced."""

    given: dict[str, Tensor]
    wanted: dict[str, Tensor]
    tried: set[str]


@pytest.fixture(scope="module")
@torch.no_grad()
def results() -> Rewritten:
    """In one program: torch.export takes half a second for each."""
    torch.manual_seed(0)
    module, tried = Expression(lambda z, w, m: [make(z, w, m) for make in OPERATORS.values()]).eval(), set[str]()
    examples = tuple(torch.randn(SHAPE) for _ in range(4))

    def noted(name: str, target: Any) -> Any:
        tried.add(name)
        return complex_operators.operation_of(name, target)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(complex_pairs, "operation_of", noted)
        program = rewritten(capture(module, examples, "module"), examples)
    assert not any(is_complex(node) for node in program.graph.nodes)
    given, wanted = program.module()(*examples), module(*examples)
    return Rewritten(dict(zip(OPERATORS, given, strict=True)), dict(zip(OPERATORS, wanted, strict=True)), tried)


@pytest.mark.parametrize("name", OPERATORS)
def test_an_operator_is_the_same_in_pairs(name: str, results: Rewritten) -> None:
    given, wanted = results.given[name], results.wanted[name]
    assert given.shape == wanted.shape
    assert given.dtype == wanted.dtype
    torch.testing.assert_close(given, wanted, rtol=1e-5, atol=2e-6)


def test_every_operator_of_the_tables_is_tried(results: Rewritten) -> None:
    """By the test above; a module cannot reach those that torch decomposes or replaces."""
    assert complex_operators.OPERATORS - results.tried == set(WHOLE)


def _pair(z: Tensor) -> complex_operators.Pair:
    return complex_operators.Pair(z.real.clone(), z.imag.clone())


WHOLE: dict[str, Callable[[Tensor], Tensor]] = {
    "conj": torch.conj,
    "imag": torch.imag,
    "real": torch.real,
    "resolve_conj": torch.resolve_conj,
    "resolve_neg": torch.resolve_neg,
    "to": lambda z: z.to(torch.complex64),
}


@pytest.mark.parametrize("name", WHOLE)
def test_operators_that_other_versions_of_torch_leave_whole(name: str) -> None:
    operation = complex_operators.operation_of(name, None)
    assert operation is not None
    z = KERNEL
    given, wanted = operation(_pair(z), *([torch.complex64] if name == "to" else [])), WHOLE[name](z)
    if wanted.is_complex():
        given = torch.complex(given.real, given.imag)
    torch.testing.assert_close(given, wanted.resolve_conj())


@pytest.mark.parametrize(
    ("make", "operator"),
    [
        (lambda z, w, m: z.tanh(), "aten.tanh"),
        (lambda z, w, m: torch.linalg.inv(z[:, :2]), "aten.linalg_inv"),
        (lambda z, w, m: torch.einsum("bi,bi,bi->b", z, w, z), "aten.einsum"),  # known, but not of three factors
    ],
)
def test_what_has_no_form_in_pairs_is_refused_with_its_line(make: Callable[..., Tensor], operator: str) -> None:
    module = Expression(make).eval()
    examples = tuple(torch.randn(SHAPE) for _ in range(4))
    with pytest.raises(UnsupportedError) as caught:
        rewritten(capture(module, examples, "module"), examples)
    told = str(caught.value)
    assert told.startswith(f"The operator {operator} on complex numbers in the module Expression has no real")
    assert f": {__file__}:" in told
    assert "made = self.make(z, w, self)\n" in told
    assert told.endswith("torch.view_as_real(z), or from z.abs() and z.angle().")


def test_a_program_without_complex_numbers_stays_as_it_is() -> None:
    module = nn.Linear(6, 6)
    program = capture(module, (torch.randn(SHAPE),), "module")
    assert rewritten(program, (torch.randn(SHAPE),)) is program
