"""The operator set of graphs, and the table of states in their metadata, with which any ONNX client runs a stream."""

from __future__ import annotations

from nsm.bundle import STATE_INIT
from nsm.spec import EntrySpec, StepSpec

OPSET = 20
"""ONNX operator set of the graphs, unless another is asked for."""
STATES_KEY = "nsm.states"
"""Its key in `metadata_props`."""


def state_table(spec: StepSpec, entry: EntrySpec) -> list[dict[str, object]]:
    """The table of states as it stands in a graph's metadata.

    For each state of the model: `name`; `past` and `present`, the graph's input and output, null where this entry
    does not read or write it; `shape`, `dtype`, `batch_axis`; `append_axis` where the output holds new rows only
    (see `StateSpec`), else null; and `init`: "zeros", or the file (relative to the graph) and key of the initial
    value.
    """
    return [
        {
            "name": state.name,
            "past": state.past if state.name in entry.reads else None,
            "present": state.present if state.name in entry.writes else None,
            "shape": list(state.shape),
            "dtype": state.dtype,
            "batch_axis": state.batch_axis,
            "append_axis": state.append_axis,
            "init": "zeros" if state.init == "zeros" else {"file": f"../{STATE_INIT}", "key": state.name},
        }
        for state in spec.states
    ]
