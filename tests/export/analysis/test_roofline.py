"""The roofline: what a graph must do at least, and what the machine can."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper

import nsm
from nsm.bundle import Bundle
from nsm.errors import BuildError, UnsupportedError
from nsm.export.analysis import roofline
from nsm.export.analysis.roofline import Reached, calls_of, measure_call, measure_reached, products
from nsm.export.graphs.work import Machine, Work, entry_work, work_of
from nsm.manifest import EntryWork
from nsm.runtimes.targets import find_target
from tests.export.helpers import invoke, refused, succeeded, the_json
from tests.small_models import CHUNK

Dims = list[int | str]


def graph(path: Path, nodes: list[onnx.NodeProto], inputs: dict[str, Dims], output: Dims, **weights: Any) -> Path:
    """A graph with an output y on disk; inputs are fp32, weights arrays."""
    made = helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, dims) for name, dims in inputs.items()],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, output)],
        [onnx.numpy_helper.from_array(value, name) for name, value in weights.items()],
    )
    onnx.save(helper.make_model(made, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), str(path))
    return path


def floats(*shape: int) -> np.ndarray:
    return np.ones(shape, np.float32)


def test_products_count_all_operands_and_the_rest_what_it_reads_and_writes_outside(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["h"], name="product"),
        helper.make_node("Add", ["h", "b"], ["s"], name="inside"),
        helper.make_node("Relu", ["s"], ["y"], name="last"),
    ]
    work = work_of(graph(tmp_path / "g.onnx", nodes, {"x": [2, 3]}, [2, 5], w=floats(3, 5), b=floats(5)))
    assert work.operations == (("product", 2.0 * 2 * 3 * 5, 4.0 * (6 + 15 + 10)), ("last", 0.0, 4.0 * 10))
    assert work.flops == 60.0
    assert work.nbytes == 164.0


def test_the_work_of_an_entry_is_the_sum_and_unknown_where_a_shape_is(tmp_path: Path) -> None:
    node = helper.make_node("MatMul", ["x", "w"], ["y"], name="product")
    known = graph(tmp_path / "known.onnx", [node], {"x": [2, 3]}, [2, 5], w=floats(3, 5))
    assert entry_work(known) == EntryWork(2.0 * 2 * 3 * 5, 4.0 * (6 + 15 + 10))
    assert entry_work(graph(tmp_path / "open.onnx", [node], {"x": ["n", 3]}, ["n", 5], w=floats(3, 5))) is None
    wrong = graph(tmp_path / "wrong.onnx", [node], {"x": [2, 4]}, [2, 5], w=floats(3, 5))
    assert entry_work(wrong) is None


def test_batched_products(tmp_path: Path) -> None:
    nodes = [helper.make_node("MatMul", ["x", "z"], ["y"], name="p")]
    work = work_of(graph(tmp_path / "g.onnx", nodes, {"x": [7, 4, 2, 3], "z": [4, 3, 5]}, [7, 4, 2, 5]))
    assert work.operations == (("p", 2.0 * 7 * 4 * 2 * 3 * 5, 4.0 * (7 * 4 * 6 + 4 * 15 + 7 * 4 * 10)),)


def test_gemm_counts_its_bias_as_an_operand(tmp_path: Path) -> None:
    nodes = [helper.make_node("Gemm", ["x", "w", "b"], ["y"], name="p", transB=1)]
    work = work_of(graph(tmp_path / "g.onnx", nodes, {"x": [2, 3]}, [2, 5], w=floats(5, 3), b=floats(5)))
    assert work.operations == (("p", 60.0, 4.0 * (6 + 15 + 5 + 10)),)


@pytest.mark.parametrize("group", [1, 6])
def test_convolutions(group: int, tmp_path: Path) -> None:
    nodes = [helper.make_node("Conv", ["x", "w"], ["y"], name="p", group=group)]
    inner = 6 // group
    work = work_of(graph(tmp_path / "g.onnx", nodes, {"x": [2, 6, 10]}, [2, 12, 8], w=floats(12, inner, 3)))
    assert work.operations == (("p", 2.0 * 2 * 12 * 8 * inner * 3, 4.0 * (120 + 36 * inner + 192)),)


@pytest.mark.parametrize("group", [1, 6])
def test_transposed_convolutions(group: int, tmp_path: Path) -> None:
    """Each of the 2 x 6 x 8 numbers meets the 3 weights of each output channel of its group."""
    nodes = [helper.make_node("ConvTranspose", ["x", "w"], ["y"], name="p", group=group, strides=[2])]
    inner = 12 // group
    work = work_of(graph(tmp_path / "g.onnx", nodes, {"x": [2, 6, 8]}, [2, 12, 17], w=floats(6, inner, 3)))
    assert work.operations == (("p", 2.0 * 2 * 6 * 8 * inner * 3, 4.0 * (96 + 18 * inner + 408)),)


@pytest.mark.parametrize(
    ("equation", "x", "w", "y"),
    [
        ("bij,jk->bik", [7, 2, 3], [3, 5], [7, 2, 5]),
        ("b i j, j k -> b i k", [7, 2, 3], [3, 5], [7, 2, 5]),
        ("...ij,jk", [7, 2, 3], [3, 5], [7, 2, 5]),
        ("...j,kj->...k", [7, 2, 3], [5, 3], [7, 2, 5]),
        ("bj...,jk->bk...", [7, 3, 2], [3, 5], [7, 5, 2]),
    ],
)
def test_sums_by_einstein_multiply_every_combination_of_indices(
    equation: str, x: Dims, w: list[int], y: Dims, tmp_path: Path
) -> None:
    nodes = [helper.make_node("Einsum", ["x", "w"], ["y"], name="p", equation=equation)]
    work = work_of(graph(tmp_path / "g.onnx", nodes, {"x": x}, y, w=floats(*w)))
    assert work.operations == (("p", 2.0 * 7 * 2 * 3 * 5, 4.0 * (42 + 15 + 70)),)


@pytest.mark.parametrize(("kind", "gates"), [("LSTM", 4), ("GRU", 3), ("RNN", 1)])
def test_recurrent_layers_count_their_weights_for_every_token(kind: str, gates: int, tmp_path: Path) -> None:
    nodes = [helper.make_node(kind, ["x", "w", "r"], ["y"], name="p", hidden_size=5)]
    weights = {"w": floats(1, gates * 5, 3), "r": floats(1, gates * 5, 5)}
    work = work_of(graph(tmp_path / "g.onnx", nodes, {"x": [7, 2, 3]}, [7, 1, 2, 5], **weights))
    both = gates * 5 * (3 + 5)
    assert work.operations == (("p", 2.0 * 7 * 2 * both, 4.0 * (7 * 2 * 3 + both + 7 * 2 * 5)),)


def test_half_precision_moves_half_the_bytes(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Cast", ["x"], ["h"], name="cast", to=TensorProto.FLOAT16),
        helper.make_node("MatMul", ["h", "w"], ["p"], name="p"),
        helper.make_node("Cast", ["p"], ["y"], name="back", to=TensorProto.FLOAT),
    ]
    work = work_of(graph(tmp_path / "g.onnx", nodes, {"x": [2, 3]}, [2, 5], w=np.ones((3, 5), np.float16)))
    assert {name: nbytes for name, _, nbytes in work.operations} == {"cast": 24.0, "p": 62.0, "back": 40.0}


def test_weights_in_a_file_beside_the_graph_are_counted(byte_bundle: Path) -> None:
    path = byte_bundle / "graphs" / "step.onnx"
    tensors = onnx.load(str(path), load_external_data=False).graph.initializer
    beside = [tensor.name for tensor in tensors if tensor.data_location == TensorProto.EXTERNAL]
    assert beside
    assert work_of(path).nbytes > (byte_bundle / "graphs" / "weights.bin").stat().st_size / 2


def test_a_shape_that_is_not_known_is_refused(tmp_path: Path) -> None:
    nodes = [helper.make_node("MatMul", ["x", "w"], ["y"], name="product")]
    path = graph(tmp_path / "g.onnx", nodes, {"x": ["lanes", 3]}, ["lanes", 5], w=floats(3, 5))
    with pytest.raises(BuildError, match=r"g\.onnx: the shapes of product are not known\. Export the bundle again"):
        work_of(path)


def test_every_operation_takes_its_own_time() -> None:
    machine = Machine(flops_per_second=10.0, bytes_per_second=100.0)
    work = Work((("bound by arithmetic", 50.0, 100.0), ("bound by memory", 10.0, 700.0), ("copy", 0.0, 200.0)))
    assert work.least_seconds(machine) == 5.0 + 7.0 + 2.0
    assert Work(()).least_seconds(machine) == 0.0


amounts = st.floats(0, 1e9)
operations = st.lists(st.tuples(st.just("o"), amounts, amounts), max_size=5)


@given(operations, st.tuples(st.just("more"), amounts, amounts), st.floats(1, 1e9), st.floats(1, 1e9))
def test_more_work_takes_longer(
    some: list[tuple[str, float, float]], more: tuple[str, float, float], flops: float, nbytes: float
) -> None:
    machine, larger = Machine(flops, nbytes), Work((*some, more))
    least = larger.least_seconds(machine)
    assert least >= Work(tuple(some)).least_seconds(machine)
    assert least >= max(larger.flops / flops, larger.nbytes / nbytes) * (1 - 1e-9)
    assert larger.least_seconds(Machine(2 * flops, 2 * nbytes)) == pytest.approx(least / 2)


def test_a_chunk_is_more_work_than_a_token(byte_bundle: Path, wide_byte_bundle: Path) -> None:
    step, decode, commit = (work_of(byte_bundle / "graphs" / f"{entry}.onnx") for entry in ("step", "decode", "commit"))
    machine = Machine(1e9, 1e9)
    assert step.least_seconds(machine) > decode.least_seconds(machine) > 0
    assert step.flops > CHUNK / 2 * decode.flops
    assert commit.flops > 0
    assert work_of(wide_byte_bundle / "graphs" / "step.onnx").flops > 2 * step.flops


def test_a_call_takes_the_median_of_its_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    # Two calls of warm-up, then three rounds of two calls, of which the second is disturbed.
    durations = iter([50.0, 50.0, 1.0, 2.0, 90.0, 10.0, 2.0, 4.0])
    now = [0.0]

    def call() -> None:
        now[0] += next(durations)

    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    assert measure_call(call, rounds=3, calls=2) == 3.0
    assert next(durations, None) is None


@pytest.mark.parametrize("name", ["onnxruntime", "openvino"])
def test_a_machine_is_measured_on_the_target(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roofline, "_PEAK_SIDE", 16)
    monkeypatch.setattr(roofline, "_STREAM_BYTES", 16 * 4 * 64)
    results: list[Any] = []

    def timed(call: Any, **_: Any) -> float:
        results.append(call())
        return 2.0

    monkeypatch.setattr(roofline, "measure_call", timed)
    with products(find_target(name), threads=1) as machine:
        assert machine() == Machine(2 * 16 * 16 * 64 / 2.0, 4 * 16 * 64 / 2.0)
    assert [result["outputs"].shape for result in results] == [(1, 16, 1), (1, 1, 1)]


def test_tensorrt_has_no_roofline_here(bundle: Bundle) -> None:
    with pytest.raises(UnsupportedError, match="target that runs on a CPU"), products(find_target("tensorrt")):
        pass
    refused(invoke("roofline", bundle.path, "--target", "tensorrt"), 3, "target that runs on a CPU")


def test_shares_are_paired_with_the_machine_of_their_round(monkeypatch: pytest.MonkeyPatch) -> None:
    # In the second round everything is four times slower, in the third only the entry is: the median share stays.
    machines = iter([Machine(1.0, 8.0), Machine(1.0, 2.0), Machine(1.0, 8.0)])
    took = iter([2.0, 8.0, 8.0])
    monkeypatch.setattr(roofline, "measure_call", lambda call, rounds: next(took))
    work = {"step": Work((("read", 0.0, 8.0),))}
    done: list[tuple[int, int]] = []
    found = measure_reached(
        work,
        {"step": lambda: None},
        lambda: next(machines),
        lambda: done.append((0, 0)),
        rounds=3,
        progress=lambda *at: done.append(at),
    )
    assert found == {"step": Reached(Machine(1.0, 8.0), least=1.0, took=8.0, share=0.5, low=0.3125, high=0.5)}
    assert done == [(0, 0), (1, 3), (0, 0), (2, 3), (0, 0), (3, 3)]


def test_what_is_timed_are_the_entries_that_take_tokens(wide_byte_bundle: Path) -> None:
    with nsm.open(wide_byte_bundle) as session:
        calls = calls_of(session)
        assert list(calls) == ["step", "decode"]
        for _ in range(2):
            calls["step"]()
        assert not session.is_fresh()
        assert session.offsets.tolist() == [0, 0, 0]
        for _ in range(CHUNK + 1):
            calls["decode"]()
        assert session.offsets.tolist() == [1, 1, 1]


@pytest.fixture
def fixed_machine(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int | None]]:
    """A machine of 1 GFLOP/s and 2 GB/s; what it was asked for is in the list."""
    asked: list[tuple[str, int | None]] = []

    @contextlib.contextmanager
    def measured(target: Any, threads: int | None = None) -> Iterator[Callable[[], Machine]]:
        asked.append((target.name, threads))
        yield lambda: Machine(1e9, 2e9)

    monkeypatch.setattr(roofline, "products", measured)
    return asked


def test_the_command_says_how_much_is_reached(byte_bundle: Path, fixed_machine: list[tuple[str, int | None]]) -> None:
    found = the_json(invoke("roofline", byte_bundle, "--threads", "1", "--json"))
    assert fixed_machine == [("onnxruntime", 1)]
    assert found["target"] == "onnxruntime"
    assert found["machine"] == {"gflop_per_second": 1.0, "gb_per_second": 2.0}
    assert [entry["entry"] for entry in found["results"]] == ["step", "decode"]
    for entry in found["results"]:
        work = work_of(byte_bundle / "graphs" / f"{entry['entry']}.onnx")
        assert entry["gflop"] == pytest.approx(work.flops / 1e9)
        assert entry["mb"] == pytest.approx(work.nbytes / 1e6)
        assert entry["roofline_us"] == pytest.approx(work.least_seconds(Machine(1e9, 2e9)) * 1e6)
        assert entry["measured_us"] > 0
        assert entry["share"] == pytest.approx(entry["roofline_us"] / entry["measured_us"])
        low, high = entry["share_quartiles"]
        assert 0 < low <= entry["share"] <= high


def test_the_machine_has_the_threads_of_the_session(
    byte_bundle: Path, fixed_machine: list[tuple[str, int | None]]
) -> None:
    succeeded(invoke("roofline", byte_bundle, "--json"))
    assert fixed_machine == [("onnxruntime", 1)]


@pytest.mark.usefixtures("fixed_machine")
def test_the_command_prints_a_line_for_each_entry(byte_bundle: Path) -> None:
    shown = succeeded(invoke("roofline", byte_bundle, "--target", "ort"))
    assert "onnxruntime on this machine: 1 GFLOP/s on a large MatMul, 2 GB/s reading a large matrix." in shown
    lines = [line.split() for line in shown.splitlines() if line.strip()]
    assert [line[0] for line in lines[1:]] == ["entry", "step", "decode"]
    assert all(line[5].endswith("%") and "-" in line[6] for line in lines[2:])


def test_without_onnx_the_command_names_the_extra(byte_bundle: Path, hide: Callable[..., None]) -> None:
    hide("onnx")
    refused(invoke("roofline", byte_bundle), 3, "needs the package onnx", 'pip install "nsm-toolkit[quantize]"')


def test_a_bundle_that_is_not_there_is_refused(tmp_path: Path) -> None:
    refused(invoke("roofline", tmp_path / "there.nsm"), 2, "there.nsm")
