"""Programs that were made to do harm: nothing in a file is executed, and none costs more than it has."""

from __future__ import annotations

import io
import json
import pickle
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from nsm.errors import CheckpointError, UnsupportedError
from nsm.export.sources import program_archive
from nsm.export.sources.program import load_program
from nsm.export.sources.program_archive import check_archive
from nsm.export.sources.state_options import parse_states
from nsm.files.reading import LIMITS


class Touch:
    """A pickle that makes a file when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return Path.touch, (self.path,)


def rewritten(program: Path, path: Path, change: Callable[[str, bytes], bytes]) -> Path:
    with zipfile.ZipFile(program) as old, zipfile.ZipFile(path, "w") as new:
        for info in old.infolist():
            new.writestr(info.filename, change(info.filename, old.read(info)))
    return path


def hostile_changes(made: Path) -> dict[str, tuple[Callable[[str, bytes], bytes], str]]:
    run = pickle.dumps(Touch(made))

    def json_change(name: str, edit: Callable[[Any], None]) -> Callable[[str, bytes], bytes]:
        def change(found: str, data: bytes) -> bytes:
            if not found.endswith(name):
                return data
            parsed = json.loads(data)
            edit(parsed)
            return json.dumps(parsed).encode()

        return change

    def pickled(parsed: Any) -> None:
        next(iter(parsed["config"].values()))["use_pickle"] = True

    def custom(parsed: Any) -> None:
        parsed["config"]["x"] = {"path_name": "custom_obj_0", "use_pickle": False}

    def calling(parsed: Any) -> None:
        parsed["graph_module"]["graph"]["nodes"][0]["target"] = "torch.hub.load"

    def sized(parsed: Any) -> None:
        text = "__import__('pathlib').Path('x').touch()"
        parsed["graph_module"]["graph"]["tensor_values"]["x"] = {"sizes": [{"as_expr": {"expr_str": text}}]}

    def adding(**node: Any) -> Callable[[str, bytes], bytes]:
        def add(parsed: Any) -> None:
            extra: dict[str, Any] = {
                "inputs": [],
                "outputs": [],
                "metadata": {},
                "is_hop_single_tensor_return": None,
                "name": "x",
            }
            parsed["graph_module"]["graph"]["nodes"].append(extra | node)

        return json_change("models/model.json", add)

    def passing(parsed: Any) -> None:
        parsed["graph_module"]["graph"]["nodes"][0]["inputs"][0]["arg"] = {"as_operator": "torch.hub.load"}

    def nesting(kind: str, context: object) -> Callable[[str, bytes], bytes]:
        def nest(parsed: Any) -> None:
            spec = json.dumps([1, {"type": kind, "context": context, "children_spec": []}])
            parsed["graph_module"]["module_call_graph"][0]["signature"]["in_spec"] = spec

        return json_change("models/model.json", nest)

    importing = {"default_factory_module": "antigravity", "default_factory_name": "x", "dict_context": []}
    enumeration = json.dumps([{"__enum__": True, "fqn": "antigravity:x", "name": "x"}])
    return {
        "library function": (adding(target="_operator.attrgetter"), r"it calls _operator.attrgetter"),
        "file that is written": (adding(target="torch.ops.aten.save.default"), "it calls torch.ops.aten.save.default"),
        "file that is mapped": (adding(target="torch.ops.aten.from_file.default"), "it calls .*from_file.default"),
        "no operator": (adding(target="torch.ops.aten.__class__.mro"), "it calls torch.ops.aten.__class__.mro"),
        "printing": (adding(target="torch.ops.higher_order.print"), "it calls torch.ops.higher_order.print"),
        "function as argument": (json_change("models/model.json", passing), "it calls torch.hub.load"),
        "module in the nesting": (nesting("collections.defaultdict", importing), "in_spec nests arguments"),
        "enumeration in the nesting": (nesting("builtins.dict", enumeration), "in_spec nests arguments"),
        "pickled weight": (json_change("weights_config.json", pickled), "is a pickle"),
        "object": (json_change("constants_config.json", custom), "has the object custom_obj_0"),
        "call": (json_change("models/model.json", calling), "it calls torch.hub.load"),
        "expression": (json_change("models/model.json", sized), "a size is the expression"),
        "example inputs": (lambda name, data: run if "sample_inputs" in name else data, "holds Python objects"),
    }


@pytest.mark.parametrize("kind", hostile_changes(Path()))
def test_nothing_in_a_program_is_executed(kind: str, program: Path, tmp_path: Path) -> None:
    made = tmp_path / "made"
    change, message = hostile_changes(made)[kind]
    hostile = rewritten(program, tmp_path / "hostile.pt2", change)
    with pytest.raises(CheckpointError, match=f"was refused.*{message}"):
        load_program(hostile, parse_states(["hidden=1"]))
    assert not made.exists()


@pytest.mark.parametrize(
    "name",
    [
        "voice/data/aotinductor/model/model.so",  # a library
        "voice/models/other.JSON",  # a program, under whatever name
        "voice/data/weights/model.pt",  # where weights were before: a pickle
        "voice/data/constants/model.pt",
        "voice/models/model.json\0",
        "version",  # of the format of 2.7, all of pickles
        "voice/version/../models/model.json",
        "voice/byteorder",  # twice
    ],
)
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_files_that_no_plain_program_has_are_refused(name: str, program: Path, tmp_path: Path) -> None:
    made, path = tmp_path / "made", tmp_path / "hostile.pt2"
    rewritten(program, path, lambda _, data: data)
    info = zipfile.ZipInfo("x")
    info.filename = info.orig_filename = name  # the class itself would cut it at the zero byte
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(info, pickle.dumps(Touch(made)))
    with pytest.raises(CheckpointError, match=r"was refused: it holds .*the files of torch.export.save"):
        load_program(path, parse_states(["hidden=1"]))
    assert not made.exists()


def test_of_two_archives_in_one_file_neither_is_believed(program: Path, tmp_path: Path) -> None:
    def renamed(old: str, new: str) -> bytes:
        with zipfile.ZipFile(program) as source, zipfile.ZipFile(tmp_path / "part", "w") as part:
            for info in source.infolist():
                part.writestr(info.filename.replace(old, new), source.read(info))
        return (tmp_path / "part").read_bytes()

    path = tmp_path / "glued.pt2"
    path.write_bytes(renamed("weight_0", "weight_9") + renamed("", ""))
    with zipfile.ZipFile(path) as archive:
        seen = archive.namelist()
    assert any(name.endswith("weight_0") for name in seen)
    assert "data/weights/weight_9" in torch._C.PyTorchFileReader(str(path)).get_all_records()
    with pytest.raises(CheckpointError, match="was refused: it has two tables of contents"):
        load_program(path, parse_states(["hidden=1"]))


@pytest.mark.parametrize("inside", [False, True])
def test_a_program_that_unpacks_to_more_than_it_has_is_refused(inside: bool, program: Path, tmp_path: Path) -> None:
    """The archive itself, or the one in it that holds the example inputs."""

    def packed(data: bytes) -> bytes:
        with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(made := io.BytesIO(), "w", 8) as new:
            for name in old.namelist():
                new.writestr(name, old.read(name))
        return made.getvalue()

    path = tmp_path / "m.pt2"
    if inside:
        rewritten(program, path, lambda name, data: packed(data) if "sample_inputs" in name else data)
    else:
        path.write_bytes(packed(program.read_bytes()))
    with pytest.raises(
        CheckpointError, match=r"cannot be read as a program \(ValueError: \S+ in it is compressed; exp"
    ):
        load_program(path, parse_states(["hidden=1"]))


@pytest.mark.parametrize("data", [b"", b"not a zip", pickle.dumps({"a": 1})])
def test_what_is_no_program_is_refused(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "m.pt2").write_bytes(data)
    with pytest.raises(CheckpointError, match="cannot be read as a program"):
        check_archive(tmp_path / "m.pt2")
    with pytest.raises(CheckpointError, match="There is no file"):
        check_archive(tmp_path / "absent.pt2")
    with zipfile.ZipFile(tmp_path / "other.pt2", "w") as archive:
        archive.writestr("m/readme", "hello")
    with pytest.raises(CheckpointError, match="holds no models"):
        check_archive(tmp_path / "other.pt2")


def test_json_of_absurd_size_is_not_parsed(program: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(program_archive, "LIMITS", {**LIMITS, "program": 1000})
    with pytest.raises(
        CheckpointError,
        match=r"cannot be read as a program \(ValueError: \S+\.json has [\d,]+ bytes, and at most 1,000",
    ):
        load_program(program, parse_states(["hidden=1"]))


def test_a_program_that_torch_cannot_load_is_refused(program: Path, tmp_path: Path) -> None:
    """It would run nothing; it is of a version to come."""

    def later(name: str, data: bytes) -> bytes:
        if not name.endswith("models/model.json"):
            return data
        return json.dumps({**json.loads(data), "schema_version": {"major": 99, "minor": 0}}).encode()

    path = rewritten(program, tmp_path / "m.pt2", later)
    with pytest.raises(CheckpointError, match=r"m\.pt2 cannot be loaded by torch \d"):
        load_program(path, parse_states(["hidden=1"]))


# -- sizes ----------------------------------------------------------------------------------------------------------


def resized(program: Path, path: Path, name: str, edit: Callable[[Any], None]) -> Path:
    def change(found: str, data: bytes) -> bytes:
        if not found.endswith(name):
            return data
        parsed = json.loads(data)
        edit(parsed)
        return json.dumps(parsed).encode()

    return rewritten(program, path, change)


def test_weights_that_are_views_of_a_few_numbers_are_not_made(program: Path, tmp_path: Path) -> None:
    def expanded(parsed: Any) -> None:
        for item in parsed["config"].values():
            item["tensor_meta"] |= {
                "sizes": [{"as_int": 1 << 20}, {"as_int": 1 << 14}],
                "strides": [{"as_int": 0}, {"as_int": 0}],
            }

    path = resized(program, tmp_path / "m.pt2", "model_weights_config.json", expanded)
    with pytest.raises(
        CheckpointError, match=r"model_weights_config\.json have [\d,]+ numbers, and the whole file [\d,]+"
    ):
        load_program(path, parse_states(["hidden=1"]))


def test_an_input_of_absurd_size_is_refused(program: Path, tmp_path: Path) -> None:
    def widened(parsed: Any) -> None:
        for value in parsed["graph_module"]["graph"]["tensor_values"].values():
            value["sizes"] = [{"as_int": 1 << 40} if size.get("as_int") == 12 else size for size in value["sizes"]]

    path = resized(program, tmp_path / "m.pt2", "models/model.json", widened)
    with pytest.raises(
        UnsupportedError, match=r"the input hidden is torch\.float32.*a call takes at most 1,073,741,824"
    ):
        load_program(path, parse_states(["hidden=1"]))


_MUTATE = """
import json, pathlib, random, resource, sys, time, warnings, zipfile
from nsm.errors import NsmError
from nsm.export.sources.state_options import parse_states
from nsm.export.sources.program import load_program
warnings.simplefilter("ignore")
program, folder = map(pathlib.Path, sys.argv[1:])
load_program(program, parse_states(["hidden=1"]))
pages = int(open("/proc/self/statm").read().split()[0])
resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + (3 << 30),) * 2)
random.seed(3)

def places(item, place=()):
    inside = item.items() if isinstance(item, dict) else enumerate(item) if isinstance(item, list) else ()
    for key, value in inside:
        yield from places(value, (*place, key))
    if isinstance(item, int) and not isinstance(item, bool):
        yield place

with zipfile.ZipFile(program) as archive:
    parts = {name: archive.read(name) for name in archive.namelist()}
names = [name for name in parts if name.endswith(".json") and list(places(json.loads(parts[name])))]
for number in range(50):
    name = random.choice(names)
    parsed = json.loads(parts[name])
    for place in random.sample(list(places(parsed)), random.choice([1, 2])):
        item = parsed
        for key in place[:-1]:
            item = item[key]
        item[place[-1]] = random.choice([1 << 34, 1 << 40, 1 << 62, 1 << 70, -1, 0])
    path = folder / "mutated.pt2"
    with zipfile.ZipFile(path, "w") as archive:
        for other, data in parts.items():
            archive.writestr(other, json.dumps(parsed) if other == name else data)
    began = time.process_time()
    try:
        load_program(path, parse_states(["hidden=1"]))
        print("loaded")
    except NsmError:
        print("refused")
    assert time.process_time() - began < 20, (name, place)
"""


def test_any_number_in_a_program_made_large_is_refused_or_does_no_harm(program: Path, tmp_path: Path) -> None:
    """In a process with little memory left, which anything but an error of nsm ends."""
    command = [sys.executable, "-c", _MUTATE, str(program), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("refused") > 10
