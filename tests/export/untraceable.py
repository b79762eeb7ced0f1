"""Small streaming modules that torch.export cannot trace, one for each cause. Each line at fault ends in `# here`."""

from __future__ import annotations

import ctypes
import json
from typing import Any

import torch
from torch import Tensor, nn


class Base(nn.Module):
    """x [B, 3] and h [B, 3]."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(3, 3)

    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        return self.mix(x) + self.change(h), h * 0.5 + x

    def change(self, h: Tensor) -> Tensor:
        return h


class Branch(Base):
    def change(self, h: Tensor) -> Tensor:
        if h.sum() > 0:  # here
            h = h * 2
        return h


class Ternary(Base):
    def change(self, h: Tensor) -> Tensor:
        return -h if float(h[0, 0]) > 0.5 else h  # here


class Closure(Base):
    def change(self, h: Tensor) -> Tensor:
        def inner(value: Tensor) -> Tensor:
            def core(value: Tensor) -> Tensor:
                return value if bool((value > 0).all()) else -value  # here

            return core(value)

        return inner(h)


class Gate(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        if x.max() > 3:  # here
            x = x / x.max()
        return x


class InAPart(Base):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Identity(), Gate()])

    def change(self, h: Tensor) -> Tensor:
        for layer in self.layers:
            h = layer(h)
        return h


class While(Base):
    def change(self, h: Tensor) -> Tensor:
        while h.abs().max() > 1:  # here
            h = h * 0.5
        return h


class Rounds(Base):
    def change(self, h: Tensor) -> Tensor:
        for _ in range(int((h[0] > -9).sum())):  # here
            h = h * 0.9
        return h


class Index(Base):
    def change(self, h: Tensor) -> Tensor:
        return h * [0.1, 0.2, 0.3, 0.4][int((h[0] > 0).sum())]  # here


class Equal(Base):
    def change(self, h: Tensor) -> Tensor:
        return h + 1 if torch.equal(h, h.abs()) else h  # here


class Close(Base):
    def change(self, h: Tensor) -> Tensor:
        return h + 1 if torch.allclose(h, h.abs()) else h  # here


class Library(Base):
    def change(self, h: Tensor) -> Tensor:
        json.dumps(h.tolist())  # here
        return h


class Packed(nn.Module):
    """Lengths as they are given to an RNN of padded sequences."""

    def __init__(self) -> None:
        super().__init__()
        self.memory = nn.GRU(3, 3, batch_first=True)

    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        lengths = torch.ones(len(x), dtype=torch.int64)
        packed = nn.utils.rnn.pack_padded_sequence(x[:, None], lengths, batch_first=True)
        given, after = self.memory(packed, h[None])  # here
        return nn.utils.rnn.pad_packed_sequence(given, batch_first=True)[0][:, 0], after[0]


class Derivative(Base):
    def change(self, h: Tensor) -> Tensor:
        made: Tensor = torch.func.grad(lambda v: (self.mix(v) ** 2).sum())(h)  # here
        return made


class Autograd(Base):
    def change(self, h: Tensor) -> Tensor:
        with torch.enable_grad():
            v = h.detach().requires_grad_()
            (made,) = torch.autograd.grad((self.mix(v) ** 2).sum(), v)  # here
        return made


class Scripted(Base):
    def __init__(self) -> None:
        super().__init__()
        mix: Any = torch.jit.script(nn.Linear(3, 3))
        self.mix = mix

    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        return self.mix(x) + h, h * 0.5 + x  # here


@torch.library.custom_op("nsm_tests::twice", mutates_args=())
def twice(x: Tensor) -> Tensor:
    return torch.from_numpy(x.numpy() * 2)


class Custom(Base):
    def change(self, h: Tensor) -> Tensor:
        made: Tensor = torch.ops.nsm_tests.twice(h)  # here
        return made


class Deep(Base):
    def change(self, h: Tensor) -> Tensor:
        return self.change(h)  # here


class Broken(Base):
    """A fault of its own, which a table of causes cannot know."""

    def change(self, h: Tensor) -> Tensor:
        if torch.compiler.is_exporting() or torch.compiler.is_compiling():
            raise ArithmeticError("the gain is missing\nand more")  # here
        return h


class Numpy(Base):
    def change(self, h: Tensor) -> Tensor:
        values: Any = sorted(h.detach().numpy().tolist()[0])  # here
        return h * values[0] if json.dumps(values) else h


class Pointer(Base):
    def change(self, h: Tensor) -> Tensor:
        first = ctypes.cast(h.data_ptr(), ctypes.POINTER(ctypes.c_float))  # here
        return h * float(first[0])


class Size(Base):
    def change(self, h: Tensor) -> Tensor:
        return h + torch.linspace(0, 1, int(h.abs().sum()) + 1).sum()  # here


class Nested(Base):
    def change(self, h: Tensor) -> Tensor:
        rows: Any = torch.nested.nested_tensor([h[0], h[0, :2]])  # here
        made: Tensor = rows.to_padded_tensor(0.0)[0]
        return made
