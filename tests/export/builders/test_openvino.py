from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import onnx
import openvino as ov
import pytest
import torch

from nsm.bundle import Bundle
from nsm.errors import BuildError, UnsupportedError
from nsm.export.builders.base import Request
from nsm.export.verify.artifact import build_target
from nsm.models.simple import SimpleNSM
from nsm.runtimes.targets import find_target
from nsm.trace import Arrays


def read(bundle: Path, entry: str) -> ov.Model:
    """The IR of an entry, read by OpenVINO alone."""
    folder = bundle / "openvino"
    return ov.Core().read_model(str(folder / f"{entry}.xml"), str(folder / "weights.bin"))


@pytest.fixture(scope="module")
def network(exported: Path) -> ov.Model:
    return read(exported, "step")


def constants(network: ov.Model) -> list[Any]:
    return [op for op in network.get_ops() if op.get_type_name() == "Constant"]


def test_a_stock_core_reads_it_with_the_declared_names_and_shapes(exported: Path, bundle: Bundle) -> None:
    spec = bundle.manifest.spec
    for entry in spec.entries:
        network = read(exported, entry.name)
        wanted = {item.name: list(item.shape) for item in (*entry.inputs, *entry.outputs)}
        wanted |= {state.past: list(state.shape) for state in spec.states_of(entry.reads)}
        wanted |= {state.present: list(state.shape) for state in spec.states_of(entry.writes)}
        ports = (*network.inputs, *network.outputs)
        given = {name: list(port.partial_shape.to_shape()) for port in ports for name in port.get_names()}
        assert {name: given.get(name) for name in wanted} == wanted
        assert len(ports) == len(wanted)


def test_weights_are_on_the_disk_once(exported: Path, bundle: Bundle) -> None:
    folder = exported / "openvino"
    assert sorted(path.name for path in folder.iterdir()) == ["commit.xml", "decode.xml", "step.xml", "weights.bin"]
    content = (folder / "weights.bin").read_bytes()
    places: dict[str, set[tuple[int, int]]] = {}
    for entry in bundle.manifest.spec.entries:
        layers = ElementTree.parse(folder / f"{entry.name}.xml").iter("layer")
        data = [layer.find("data") for layer in layers if layer.get("type") == "Const"]
        places[entry.name] = {
            (int(item.attrib["offset"]), int(item.attrib["size"])) for item in data if item is not None
        }
        assert places[entry.name], entry.name
    used = set().union(*places.values())
    blocks = [content[offset : offset + size] for offset, size in used]
    assert len(set(blocks)) == len(blocks)
    assert all(offset % 64 == 0 and offset + size <= len(content) for offset, size in used)
    assert sum(size for _, size in places["step"] & places["decode"]) > 0.5 * len(content)
    assert len(content) < 1.5 * 4 * bundle.manifest.model["parameters"]


def test_sharing_changes_no_number(exported: Path, bundle: Bundle, tmp_path: Path) -> None:
    for entry in bundle.manifest.spec.entries:
        own = tmp_path / f"{entry.name}.xml"
        ov.save_model(
            ov.convert_model(str(exported / "graphs" / f"{entry.name}.onnx")), str(own), compress_to_fp16=False
        )
        alone, shared = ov.Core().read_model(str(own)), read(exported, entry.name)
        given = sorted(op.get_data().tobytes() for op in constants(shared))
        assert given == sorted(op.get_data().tobytes() for op in constants(alone))
        assert len(given) > 10


def test_weights_stay_f32(network: ov.Model, bundle: Bundle) -> None:
    types = {op.get_element_type().get_type_name() for op in constants(network)}
    assert "f32" in types
    assert not types & {"f16", "bf16", "i8", "u8", "nf4"}
    held = sum(op.get_byte_size() for op in constants(network) if op.get_element_type() == ov.Type.f32)
    assert held >= 0.9 * 4 * bundle.manifest.model["parameters"]


def test_the_weights_are_the_graphs_own_bit_by_bit(network: ov.Model, exported: Path) -> None:
    def sample(values: np.ndarray[Any, Any]) -> bytes:
        return values.astype(np.float32).ravel()[:16].tobytes()

    proto = onnx.load(str(exported / "graphs" / "step.onnx"))
    weights = [onnx.numpy_helper.to_array(item) for item in proto.graph.initializer]
    floats = [value for value in weights if value.dtype == np.float32 and value.size > 500]
    content = b"".join(op.get_data().tobytes() for op in constants(network))
    assert len(floats) >= 10
    assert sum(sample(value) in content or sample(value.T) in content for value in floats) >= 0.9 * len(floats)


@torch.no_grad()
def test_stock_openvino_steps_it_like_the_reference(network: ov.Model, exported: Path, model: SimpleNSM) -> None:
    compiled = ov.Core().compile_model(network, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    graph = onnx.load(str(exported / "graphs" / "step.onnx"), load_external_data=False)
    table = json.loads({item.key: item.value for item in graph.metadata_props}["nsm.states"])
    with np.load(exported / "state_init.npz", allow_pickle=False) as archive:
        state: Arrays = {entry["name"]: archive[entry["name"]] for entry in table}
    reference = model.initial_state(2)
    generator = np.random.default_rng(4)
    for _ in range(12):
        tokens = generator.integers(0, 20, (2, model.chunk_size))
        past = {entry["past"]: state[entry["name"]] for entry in table if entry["past"]}
        results = compiled({"tokens": tokens, "valid": np.full(2, model.chunk_size), **past})
        wanted, reference = model.step(torch.from_numpy(tokens), reference)
        np.testing.assert_allclose(results["outputs"], wanted.numpy(), rtol=1e-4, atol=1e-5)
        state |= {entry["name"]: np.array(results[entry["present"]]) for entry in table if entry["present"]}
    for name, value in reference.items():
        np.testing.assert_allclose(state[name], value.numpy(), rtol=1e-4, atol=1e-5, err_msg=name)


def test_its_files_are_recorded(bundle: Bundle) -> None:
    artifact = bundle.artifact("openvino")
    assert [record.path for record in artifact.files] == [
        "openvino/step.xml",
        "openvino/decode.xml",
        "openvino/commit.xml",
        "openvino/weights.bin",
    ]
    assert (artifact.device, artifact.precision, artifact.effective_precision) == ("cpu", "fp32", "fp32")
    assert artifact.parity.status == "passed"


def test_no_path_of_this_machine_is_in_the_ir(exported: Path) -> None:
    content = b"".join(path.read_bytes() for path in (exported / "openvino").glob("*.xml"))
    for trace in ("site-packages", str(Path.cwd()), str(exported), ".partial"):
        assert trace.encode() not in content, trace


@pytest.mark.parametrize("content", [b"", b"not a graph at all"])
def test_a_graph_that_openvino_refuses_is_a_build_error(bundle: Bundle, tmp_path: Path, content: bytes) -> None:
    (tmp_path / "graphs").mkdir()
    (tmp_path / "graphs" / "step.onnx").write_bytes(content)
    with pytest.raises(BuildError, match=r"OpenVINO cannot convert step\.onnx: .+"):
        build_target(tmp_path, bundle.manifest.spec, find_target("ov"), None)


def test_an_operator_that_openvino_does_not_know_is_unsupported(bundle: Bundle, tmp_path: Path) -> None:
    from nsm.export.builders import openvino

    node = onnx.helper.make_node("Unheard", ["x"], ["y"], domain="com.example")
    values = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1]) for name in ("x", "y")]
    graph = onnx.helper.make_graph([node], "g", values[:1], values[1:])
    opsets = [onnx.helper.make_opsetid("", 20), onnx.helper.make_opsetid("com.example", 1)]
    (tmp_path / "graphs").mkdir()
    onnx.save(onnx.helper.make_model(graph, opset_imports=opsets), str(tmp_path / "graphs" / "step.onnx"))
    request = Request(tmp_path, tmp_path / "openvino", bundle.manifest.spec, None)
    with pytest.raises(UnsupportedError, match=r"OpenVINO does not support .*: Unheard \(the node y\)\. Build"):
        openvino.build(request)
