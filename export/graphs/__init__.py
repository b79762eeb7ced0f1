"""Portable ONNX graphs: exported, simplified by passes, in fp32 or low precision.

All graphs of a bundle share one file of weights. `work` counts their operations and bytes.
"""

from typing import TYPE_CHECKING

from nsm.lazy import lazy_names

if TYPE_CHECKING:
    from nsm.export.graphs.bounded_counters import wrap_counters as wrap_counters
    from nsm.export.graphs.exporter import export_onnx as export_onnx
    from nsm.export.graphs.exporter import initial_arrays as initial_arrays
    from nsm.export.graphs.external_data import check_graphs as check_graphs
    from nsm.export.graphs.external_data import load_shared as load_shared
    from nsm.export.graphs.external_data import save_shared as save_shared
    from nsm.export.graphs.low_precision import check_step as check_step
    from nsm.export.graphs.low_precision import linear_ops_of_step as linear_ops_of_step
    from nsm.export.graphs.low_precision import write_graphs as write_graphs
    from nsm.export.graphs.metadata import OPSET as OPSET
    from nsm.export.graphs.metadata import STATES_KEY as STATES_KEY
    from nsm.export.graphs.metadata import state_table as state_table
    from nsm.export.graphs.node_order import sort_nodes as sort_nodes
    from nsm.export.graphs.passes import optimise as optimise
    from nsm.export.graphs.walk import dtype_of as dtype_of
    from nsm.export.graphs.walk import graphs_in as graphs_in
    from nsm.export.graphs.walk import graphs_of as graphs_of
    from nsm.export.graphs.walk import node_name as node_name
    from nsm.export.graphs.walk import nodes_of as nodes_of
    from nsm.export.graphs.walk import tensors_of as tensors_of
    from nsm.export.graphs.work import Machine as Machine
    from nsm.export.graphs.work import Work as Work
    from nsm.export.graphs.work import entry_work as entry_work
    from nsm.export.graphs.work import work_of as work_of
else:
    __getattr__, __dir__ = lazy_names(
        __name__,
        {
            "bounded_counters": ("wrap_counters",),
            "exporter": ("export_onnx", "initial_arrays"),
            "external_data": ("check_graphs", "load_shared", "save_shared"),
            "low_precision": ("check_step", "linear_ops_of_step", "write_graphs"),
            "metadata": ("OPSET", "STATES_KEY", "state_table"),
            "node_order": ("sort_nodes",),
            "passes": ("optimise",),
            "walk": ("dtype_of", "graphs_in", "graphs_of", "node_name", "nodes_of", "tensors_of"),
            "work": ("Machine", "Work", "entry_work", "work_of"),
        },
    )
