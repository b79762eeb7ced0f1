"""State that a module keeps in a buffer or an attribute instead of carrying it, where it is the only one there is."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from nsm.adapters.kept import Kept
from nsm.errors import UnsupportedError
from nsm.spec import TensorSpec


@torch.no_grad()
def check_hidden(module: nn.Module, token: TensorSpec, timed: bool) -> None:
    """Raise `UnsupportedError` if a module without declared states changes attributes; the error names them.

    Nothing is raised where forward does not run on the token alone.
    """
    shape = (1, 1, *token.shape) if timed else (1, *token.shape)
    generator = torch.get_rng_state()
    made = torch.randint(0, (token.maximum or 0) + 1, shape) if token.maximum is not None else torch.randn(shape)
    kept, modes = Kept(module), [(part, part.training) for part in module.modules()]
    before, buffers = kept.digests(), dict(module.named_buffers())
    module.eval()
    try:
        wanted, now = module(made), kept.digests()
        changed = [name for name in {**before, **now} if before.get(name) != now.get(name)]
        kept.put_back()
        # Values that are written before they are read have no effect.
        matters = bool(changed) and not (kept.scramble(changed) and _equal(module(made), wanted))
    except Exception:  # other arguments are needed; the caller reports that
        return
    finally:
        for part, training in modes:
            part.training = training
        kept.put_back()
        torch.set_rng_state(generator)
    if matters:
        raise UnsupportedError(_message(type(module).__name__, changed, buffers))


def _equal(one: Any, two: Any) -> bool:
    pairs = zip(pytree.tree_leaves(one), pytree.tree_leaves(two), strict=True)
    return all(isinstance(left, Tensor) and torch.equal(left, right) for left, right in pairs)


def _message(kind: str, changed: list[str], buffers: dict[str, Any]) -> str:
    name = changed[0]
    what = f"the registered buffer {name} {list(buffers[name].shape)}" if name in buffers else f"the attribute {name}"
    others = f" (and {', '.join(changed[1:4])})" if changed[1:] else ""
    short = name.rpartition(".")[2]
    initial = f"torch.zeros({', '.join(map(str, buffers[name].shape))})" if name in buffers else "..."
    return (
        f"The only state of {kind} is {what}{others}, which forward changes; no exported graph keeps it from call to "
        f"call. Make it an argument and a result: def forward(self, x, {short}): ... return y, {short}, with a new "
        f"tensor each time, and as_step(module, [Carried('{short}', {initial})], ...)."
    )
