"""Sources: the models that bundles are made of, loaded without executing code from a file.

`torch` is a checkpoint or a module, `program` a program of `torch.export` (.pt2), `onnx` an ONNX file. Also: sequences
from files, and the options that describe states.
"""

from typing import TYPE_CHECKING

from nsm.lazy import lazy_names

if TYPE_CHECKING:
    from nsm.export.sources.base import Source as Source
    from nsm.export.sources.program import load_program as load_program
    from nsm.export.sources.program import whole_program as whole_program
    from nsm.export.sources.sequences import read_sequences as read_sequences
    from nsm.export.sources.sequences import sequence_axes as sequence_axes
    from nsm.export.sources.state_options import parse_constants as parse_constants
    from nsm.export.sources.state_options import parse_shapes as parse_shapes
    from nsm.export.sources.state_options import parse_states as parse_states
    from nsm.export.sources.torch import TorchSource as TorchSource
    from nsm.export.sources.torch_session import compiled_session as compiled_session
    from nsm.export.sources.torch_session import load_matching as load_matching
    from nsm.export.sources.torch_session import model_session as model_session
    from nsm.export.sources.torch_session import reference as reference
    from nsm.export.sources.torch_session import torch_threads as torch_threads
else:
    __getattr__, __dir__ = lazy_names(
        __name__,
        {
            "base": ("Source",),
            "program": ("load_program", "whole_program"),
            "sequences": ("read_sequences", "sequence_axes"),
            "state_options": ("parse_constants", "parse_shapes", "parse_states"),
            "torch": ("TorchSource",),
            "torch_session": ("compiled_session", "load_matching", "model_session", "reference", "torch_threads"),
        },
    )
