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
        targets: names or aliases of targets.
        precision: fp32, fp16, bf16, int8 or int8-weights.
        output: the bundle to write (default: the model's name with `.nsm`, in the current directory).
        tokens_per_call: K, a multiple of the model's chunk (default: one chunk).
        batch: number of lanes.
        opset: ONNX operator set of the graphs.
        device: hardware to build for; None for the target's default.
        data: file of sequences for the parity check, instead of those in the checkpoint.
        num_samples: streams of the golden trace.
        golden_steps: calls per stream of the golden trace. The default is 64, and 200 in low precision, which may
            drift; for a foreign model, more until its states are full. The model's capacity limits both.
        debug_outputs: add the debug outputs of `StepModel.spec` to the graph of `step`.
        compact: remove slots that no sequence uses; see `nsm.models.compaction`.
        states: states of a foreign model, `past=present[:init]` each; see `nsm.export.sources.state_options`.
        constants: inputs of a foreign ONNX graph with a fixed value, `name=value` each.
        shapes: sizes of dynamic axes of its inputs, `name=size,size,...` each.
        input: the input of a foreign ONNX graph that takes the tokens, if the graph does not show it.
        no_states: outputs of a foreign ONNX graph that are not states, although their names suggest it.
        vocab_size: number of ids of a foreign model over ids that does not state it.
        capacity: tokens that a lane of a foreign model takes between two resets (default: found by experiment).
        offline: a .pt2 or .onnx of a foreign model over whole sequences, to compare the step with.
        budgets: budgets of single outputs or states that are accepted instead of those of the precision,
            `name=value` (relative) or `name=abs:value` each.
        max_fp32_share, allow_slower: see `nsm.export.verify.acceptance.Limits`.
        require_parity: fail if a target cannot be checked on this machine.
        strict: with several targets, write all or none (default: the targets that pass).
        force: replace the bundle if it exists.
        command: the command line, for the manifest.

    Raises:
        InputError: a size or share is not a number.
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
    budgets: Sequence[str] = ()
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
        """Steps of the golden trace, before the model's capacity limits them."""
        if self.golden_steps is not None:
            return self.golden_steps
        return _GOLDEN_STEPS if self.precision == "fp32" else DRIFT_STEPS
