"""How many bytes of tensors are live at once, counted storage by storage as operators make them."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from nsm.errors import UnsupportedError

if TYPE_CHECKING:
    from torch.utils._python_dispatch import TorchDispatchMode


class LiveBytes:
    """A running sum over blocks of memory, and its peak.

    A block has a key while it lives, and may grow. Blocks from before the count are registered with `found`: only
    their growth counts.

    Attributes:
        now: bytes of the counted blocks that are live.
        peak: the largest `now` there was.
    """

    def __init__(self) -> None:
        self.now = 0
        self.peak = 0
        self._blocks: dict[int, tuple[int, int]] = {}  # key -> (bytes of it, bytes that count)

    def __contains__(self, key: int) -> bool:
        return key in self._blocks

    def found(self, key: int, size: int) -> None:
        """A block that is older than the count."""
        self._blocks[key] = (size, 0)

    def made(self, key: int, size: int) -> None:
        """A new block, or a known one that may have another size now."""
        known, counted = self._blocks.get(key, (0, 0))
        # The initial size of an older block does not count when it is freed either.
        change = max(size - known, -counted)
        self._blocks[key] = (size, counted + change)
        self.now += change
        self.peak = max(self.peak, self.now)

    def freed(self, key: int) -> None:
        """The block is gone; its key may be used again."""
        self.now -= self._blocks.pop(key)[1]


def counting(counts: LiveBytes, device: str = "cpu") -> TorchDispatchMode:
    """A context in which the dense tensors that operators make on `device` in this thread are entered in `counts`.

    Counted are storages, once however many views they have, from the operator that made them to the moment the last
    tensor, view or autograd node releases them. Memory that a kernel allocates and frees inside one operator, and
    tensors of other threads, are not counted.

    Raises:
        UnsupportedError: (inside the context) an operator makes a sparse tensor.
    """
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    watched: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def storages(values: Iterable[Any]) -> Iterable[torch.UntypedStorage]:
        for value in values:
            if isinstance(value, torch.Tensor) and value.device.type == device:
                if value.layout is not torch.strided:
                    raise UnsupportedError(
                        f"Only dense tensors can be counted; an operator was given or made one of layout "
                        f"{value.layout}. Leave it outside memory_context."
                    )
                yield value.untyped_storage()

    def watch(storage: torch.UntypedStorage) -> int:
        # The address is free for another storage as soon as this one is gone, and that is when `gone` is called.
        key: int = storage._cdata
        if key not in watched:

            def gone(_: object) -> None:
                del watched[key]
                counts.freed(key)

            watched[key] = weakref.ref(storage, gone)
        return key

    class Counting(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
        ) -> Any:
            kwargs = kwargs or {}
            # torch.tensor(...) makes its tensor out of sight and then lifts it: that one is new.
            if func is not torch.ops.aten.lift_fresh.default:
                for storage in storages(tree_leaves((args, kwargs))):
                    key = watch(storage)
                    if key not in counts:
                        counts.found(key, storage.nbytes())
            result = func(*args, **kwargs)
            for storage in storages(tree_leaves(result)):
                counts.made(watch(storage), storage.nbytes())
            return result

    return Counting()  # type: ignore[no-untyped-call]  # torch leaves the constructor untyped
