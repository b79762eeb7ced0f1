"""ExportOptions: the options of one export."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from nsm.arguments import real, whole
from nsm.errors import InputError
from nsm.export.graphs import OPSET
from nsm.export.verify import DRIFT_STEPS

_GOLDEN_STEPS = 64


@dataclass(frozen=True)
class ExportOptions:
    """Options of an export; the names are those of the command line.

    Args:
        targets: names or aliases.
        output: the bundle to write (default: the model's name with `.nsm`, in the current directory).
        tokens_per_call: K of a call, a multiple of the model's chunk (default: one chunk).
        data: sequences to check on instead of those in the checkpoint.
        num_samples: streams of the golden trace.
        golden_steps: its steps (default: 64, and 200 in low precision, which may drift; of a foreign model as many more
            as it takes until no state is filling any more); fewer where the model's capacity ends before.
        debug_outputs: add the debug outputs of `StepModel.spec` to the graph of `step`.
        max_fp32_share, allow_slower: see `nsm.export.verify.acceptance.Limits`.
        compact: whether slots that are never used are removed first; see `nsm.models.compaction`.
        states: of a foreign model, `past=present[:init]` each; see `nsm.export.sources.state_options`.
        constants: inputs of a foreign ONNX graph that are always the same, `name=value` each.
        shapes: sizes of open axes of its inputs, `name=size,size,...` each.
        input: of a foreign ONNX graph, the input that takes tokens, where nothing else tells.
        no_states: outputs of a foreign ONNX graph that are no states, whatever they are called.
        vocab_size: of a foreign model over ids that does not say how many there are.
        capacity: tokens that a lane of a foreign file takes from one reset to the next (default: found by experiment).
        strict: of several targets, all or none; otherwise those that pass are kept.
        offline: a .pt2 or .onnx of a foreign model over whole sequences; its step is compared with it.

    Raises:
        InputError: a size or share that is no number.
    """

    targets: Sequence[str]
    precision: str = "fp32"
    output: Path | None = None
    tokens_per_call: int | None = None
    batch: int = 1
    opset: int = OPSET
    device: str | None = None
    data: Path | None = None
    num_samples: int = 8
    golden_steps: int | None = None
    debug_outputs: bool = False
    compact: bool = False
    states: Sequence[str] = ()
    constants: Sequence[str] = ()
    shapes: Sequence[str] = ()
    input: str | None = None
    no_states: Sequence[str] = ()
    vocab_size: int | None = None
    capacity: int | None = None
    offline: Path | None = None
    max_fp32_share: float = 0.3
    allow_slower: bool = False
    require_parity: bool = False
    strict: bool = False
    force: bool = False
    command: str = ""

    def __post_init__(self) -> None:
        for name in ("tokens_per_call", "batch", "opset", "num_samples", "golden_steps", "vocab_size", "capacity"):
            value = getattr(self, name)
            if value is not None:
                object.__setattr__(self, name, whole(name, value, InputError))
        object.__setattr__(self, "max_fp32_share", real("max_fp32_share", self.max_fp32_share, InputError))

    @property
    def steps(self) -> int:
        """Steps of the golden trace."""
        if self.golden_steps is not None:
            return self.golden_steps
        return _GOLDEN_STEPS if self.precision == "fp32" else DRIFT_STEPS
