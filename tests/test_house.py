"""Tests that keep the house: rooms, who imports whom, what a bare install can do, and that the wheel is whole.

A room is a package. Its modules are private to it and to the rooms inside it; all others import from the room itself,
whose `__init__.py` re-exports the public names. Three kinds of imports go to modules: those of the vocabulary (the
modules of `nsm` itself), those of a plug-in by its name (`PLUGINS`), and those within a room.
"""

from __future__ import annotations

import ast
import json
import subprocess
import sys
import tomllib
import venv
from collections.abc import Sequence
from graphlib import CycleError, TopologicalSorter
from itertools import pairwise
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = {"nsm": "nsm", "export": "nsm.export", "quantization": "nsm.quantization", "runtimes": "nsm.runtimes"}

# The modules of `nsm` itself, and its room `nsm.files`; each may import those before it.
VOCABULARY = (
    "lazy",
    "errors",
    "arguments",
    "decode",
    "files",
    "spec",
    "trace",
    "results",
    "manifest",
    "bundle",
    "staging",
)

# What a room and the rooms inside it may import besides themselves and the vocabulary.
ORDER = {
    "nsm.modules": (),
    "nsm.models": ("nsm.modules",),
    "nsm.adapters": ("nsm.modules", "nsm.models"),
    "nsm.baselines": ("nsm.modules", "nsm.models"),
    "nsm.utils": ("nsm.modules", "nsm.models"),
    "nsm.runtimes": (),
    "nsm.quantization": ("nsm.runtimes",),
    "nsm.export": ("nsm.modules", "nsm.models", "nsm.adapters", "nsm.runtimes", "nsm.quantization"),
}
MOST_MODULES = 12

# Rooms of plug-ins: the table of targets names their modules, which need the package of a backend each.
PLUGINS = ("nsm.runtimes.backends", "nsm.export.builders")

# Rooms that may use torch, with the rooms inside them. All others work where torch is not installed.
WITH_TORCH = (
    "nsm.modules",
    "nsm.models",
    "nsm.adapters",
    "nsm.baselines",
    "nsm.utils",
    "nsm.export.analysis",
    "nsm.export.capture",
    "nsm.export.graphs",
    "nsm.export.sources",
)
# Rooms inside those that do without all the same.
WITHOUT_TORCH = ("nsm.adapters.validate",)
# Rooms whose modules may need onnx when they are imported; the rooms themselves are lazy.
WITH_ONNX = ("nsm.export.analysis", "nsm.export.graphs", "nsm.export.sources", "nsm.export.verify", "nsm.quantization")
# The entry from Python: what it takes is a model of torch.
NEEDS_TORCH = ("nsm.export.api",)


def _modules() -> dict[str, Path]:
    found = {}
    for folder, package in FOLDERS.items():
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            found[".".join((package, *(part for part in parts if part != "__init__")))] = path
    return found


MODULES = _modules()
ROOMS = {module for module, path in MODULES.items() if path.name == "__init__.py"}
# `__init__` re-exports names of the rooms inside, and `__main__` is a door: neither counts as an import of its room.
INNER = sorted(module for module in set(MODULES) - ROOMS if not module.endswith("__main__"))


def _room(module: str) -> str:
    return module if module in ROOMS else module.rpartition(".")[0]


def _within(module: str, rooms: str | tuple[str, ...]) -> bool:
    return any(
        module == room or module.startswith(room + ".") for room in ([rooms] if isinstance(rooms, str) else rooms)
    )


def _is_for_types(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)


def _imports(path: Path, top_level_only: bool = False) -> list[tuple[str, str | None]]:
    """Imports of a file as (module, name), name None for `import module`; those for type checking do not count."""
    tree = ast.parse(path.read_text())
    skipped = {id(inner) for node in ast.walk(tree) if _is_for_types(node) for inner in ast.walk(node)}
    found: list[tuple[str, str | None]] = []
    for node in tree.body if top_level_only else ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            found += [(alias.name, None) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                # `from nsm.adapters import as_step` is the function that the room re-exports, not the module.
                is_module = full in MODULES and alias.name not in _exports(node.module)
                found.append((full, None) if is_module else (node.module, alias.name))
    return found


_EXPORTS: dict[str, dict[str, str]] = {}


def _exports(room: str) -> dict[str, str]:
    """The names that a room re-exports, and the module or room that each is imported from."""
    if room not in ROOMS:
        return {}
    if room not in _EXPORTS:
        _EXPORTS[room] = {
            alias.asname or alias.name: node.module
            for node in ast.walk(ast.parse(MODULES[room].read_text()))
            if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith(room + ".")
            for alias in node.names
        }
    return _EXPORTS[room]


def _own_imports(module: str) -> list[tuple[str, str | None]]:
    return [item for item in _imports(MODULES[module]) if item[0] in MODULES and item[0] != module]


# -- rooms -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("room", sorted(ROOMS - {"nsm"}))
def test_a_room_says_what_it_is_for_and_is_small(room: str) -> None:
    docstring = ast.get_docstring(ast.parse(MODULES[room].read_text()))
    assert docstring, f"{room} does not say what it is for"
    count = sum(_room(module) == room for module in INNER)
    assert count <= MOST_MODULES, f"{room} has {count} modules: make a room inside it"


def test_the_vocabulary_is_complete_and_small() -> None:
    there = {module for module in INNER if _room(module) == "nsm"} | (
        ROOMS - {room for room in ROOMS if _within(room, tuple(ORDER))}
    )
    assert {f"nsm.{name}" for name in VOCABULARY} == there - {"nsm"}
    assert len(VOCABULARY) <= MOST_MODULES


def _word(module: str) -> str | None:
    """The word of the vocabulary that a module belongs to."""
    name = f"{module}.".split(".")[1]
    return name if name in VOCABULARY else None


@pytest.mark.parametrize("module", INNER)
def test_imports_go_one_way(module: str) -> None:
    for imported, _ in _own_imports(module):
        word, other = _word(module), _word(imported)
        if word is not None:
            allowed = other == word or (other is not None and VOCABULARY.index(other) < VOCABULARY.index(word))
            assert allowed, f"{module} may not import {imported}"
        elif other is None:
            own = next(room for room in ORDER if _within(module, room))
            assert _within(imported, (own, *ORDER[own])), f"{module} may not import {imported}"


def _room_graph() -> dict[str, set[str]]:
    """The rooms that each room imports; the vocabulary has an order of its own."""
    graph: dict[str, set[str]] = {room: set() for room in ROOMS}
    for module in INNER:
        if _word(module) is not None:
            continue
        graph[_room(module)] |= {_room(imported) for imported, _ in _own_imports(module)} - {_room(module)}
    return graph


def test_no_rooms_import_each_other() -> None:
    try:
        list(TopologicalSorter(_room_graph()).static_order())
    except CycleError as error:
        circle = error.args[1]
        pairs = {
            f"{module} imports {imported}"
            for later, earlier in pairwise(reversed(circle))
            for module in INNER
            if _room(module) == later
            for imported, _ in _own_imports(module)
            if _room(imported) == earlier
        }
        pytest.fail(f"{' -> '.join(reversed(circle))}: " + "; ".join(sorted(pairs)))


@pytest.mark.parametrize("module", INNER)
def test_a_room_is_entered_by_its_door(module: str) -> None:
    for imported, name in _own_imports(module):
        room = _room(imported)
        assert name is None or not name.startswith("_"), f"{module} imports the private {imported}.{name}"
        if room == "nsm" or _within(_room(module), room) or room in PLUGINS:
            continue
        assert imported in ROOMS, f"{module} imports {imported}, which is private to {room}"
        assert name in _exports(imported), f"{module} imports {imported}.{name}, which the room does not re-export"


@pytest.mark.parametrize("path", sorted((ROOT / "examples").rglob("*.py")), ids=lambda path: path.name)
def test_examples_enter_by_the_doors(path: Path) -> None:
    for imported, name in _imports(path):
        if imported in MODULES and imported != "nsm" and _room(imported) not in ("nsm", *PLUGINS):
            assert imported in ROOMS, f"{path.name} imports {imported}"
            assert name in _exports(imported)


def _lazy_table(tree: ast.Module) -> dict[str, tuple[str, ...]] | None:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "lazy_names":
            return dict(ast.literal_eval(node.args[1]))
    return None


@pytest.mark.parametrize("room", sorted(ROOMS - {"nsm"}))
def test_a_room_re_exports_what_it_has(room: str) -> None:
    tree = ast.parse(MODULES[room].read_text())
    table = _lazy_table(tree)
    if table is None:  # every name is imported with the room
        listed = next(
            (
                node.value
                for node in tree.body
                if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
            ),
            None,
        )
        assert set(_exports(room)) == set(ast.literal_eval(listed) if listed is not None else ())
        return
    assert {name: f"{room}.{module}" for module, names in table.items() for name in names} == _exports(room)
    for name in _exports(room):  # importing the module would put it in the place of the name
        assert f"{room}.{name}" not in MODULES, f"{room}.{name} is a lazy name and a module"


@pytest.mark.parametrize("module", sorted(MODULES))
def test_torch_stays_in_its_rooms(module: str) -> None:
    if any(name.split(".")[0] == "torch" for name, _ in _imports(MODULES[module])):
        assert _within(module, WITH_TORCH), f"{module} imports torch"
        assert not _within(module, WITHOUT_TORCH), f"{module} imports torch"


def test_the_rules_can_fail() -> None:
    assert ("nsm.export.verify", "build_target") in _own_imports("nsm.export.pipeline")
    assert "nsm.export" not in ORDER["nsm.runtimes"]
    assert "nsm.export.verify" in _room_graph()["nsm.export"]
    assert _lazy_table(ast.parse(MODULES["nsm.quantization"].read_text()))


def test_every_package_is_in_pyproject() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert set(settings["tool"]["setuptools"]["packages"]) == ROOMS


# -- tests -------------------------------------------------------------------------------------------------------------

TESTS = sorted((ROOT / "tests").rglob("*.py"))


@pytest.mark.parametrize("path", TESTS, ids=lambda path: str(path.relative_to(ROOT / "tests")))
def test_no_test_is_imported(path: Path) -> None:
    for imported, name in _imports(path):
        if imported.split(".")[0] == "tests":
            leaf = imported.rsplit(".", maxsplit=1)[-1]
            assert not leaf.startswith("test_"), f"{path} imports {name} of {imported}: move it to a helper module"
            assert leaf != "conftest", f"{path} imports {name} of a conftest: move it to a helper module"


def test_the_folders_of_tests_are_those_of_the_rooms() -> None:
    for folder in FOLDERS:
        for path in (ROOT / "tests" / folder).rglob("test_*.py"):
            room = path.parent.relative_to(ROOT / "tests")
            assert (ROOT / room / "__init__.py").is_file(), f"{path} is in no folder of a room"


# -- installations -----------------------------------------------------------------------------------------------------


def _python(code: str, *options: str, arguments: Sequence[str] = ()) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *options, "-c", code, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_import_nsm_imports_no_room() -> None:
    result = _python("import sys, nsm; print(sorted(name for name in sys.modules if name.startswith('nsm.')))")
    assert result.stdout == "[]\n", result.stderr


_IMPORT_FIRST = """
import importlib, json, os, sys, traceback
import numpy, onnx, onnx_ir, onnxruntime, onnxscript, openvino, torch  # once, and not for each room
for room, names in json.loads(sys.argv[1]).items():
    sys.stdout.flush()
    child = os.fork()
    if not child:
        try:
            module = importlib.import_module(room)
            for name in names:
                getattr(module, name)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    if os.waitpid(child, 0)[1]:
        print(room)
"""


def test_every_room_can_be_imported_first() -> None:
    """With all the names that it re-exports: none needs another room to be imported before it."""
    rooms = {room: sorted(_exports(room)) for room in sorted(ROOMS - {"nsm"})}
    result = _python(_IMPORT_FIRST, "-W", "error::ImportWarning", arguments=(json.dumps(rooms),))
    assert result.returncode == 0, result.stderr
    assert result.stdout == "", result.stderr


def test_importing_needs_neither_torch_nor_a_backend() -> None:
    blocked = ["torch", "onnx", "onnxscript", "onnxruntime", "openvino", "tensorrt", "tensorrt_rtx", "cuda", "sklearn"]
    rooms = {room for room in ROOMS if not _within(room, WITH_TORCH) or _within(room, WITH_ONNX)}
    heavy = (*WITH_TORCH, *WITH_ONNX, *PLUGINS, *NEEDS_TORCH)
    light = {module for module in MODULES if not _within(module, heavy) or _within(module, WITHOUT_TORCH)}
    names = sorted(rooms - _eager(rooms) | light)
    assert {"nsm", "nsm.runtimes", "nsm.quantization", "nsm.export.cli.parity", "nsm.export.builders"} <= set(names)
    code = f"import sys\nfor name in {blocked}: sys.modules[name] = None\nimport importlib\n"
    code += f"for name in {names}: importlib.import_module(name)\nprint('fine')"
    result = _python(code)
    assert result.stdout == "fine\n", result.stderr


def _eager(rooms: set[str]) -> set[str]:
    """Rooms of those with onnx that are not lazy: whoever imports them needs it."""
    return {
        room for room in rooms if _within(room, WITH_ONNX) and _lazy_table(ast.parse(MODULES[room].read_text())) is None
    }


@pytest.mark.parametrize("module", ["policy", "preconditions", "calibration_data"])
def test_what_is_known_of_low_precision_needs_no_onnx(module: str) -> None:
    result = _python(f"import sys; sys.modules['onnx'] = None; import nsm.quantization.{module}")
    assert result.returncode == 0, result.stderr


def test_python_started_in_the_checkout_finds_every_room() -> None:
    code = "import nsm, nsm.runtimes, nsm.export.cli; print(nsm.__path__[0])"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout == f"{ROOT / 'nsm'}\n"


def test_a_missing_torch_names_the_extra() -> None:
    result = _python("import sys; sys.modules['torch'] = None; import nsm; nsm.SimpleNSM")
    assert "nsm.SimpleNSM needs torch, which is not installed." in result.stderr
    assert 'pip install "nsm-toolkit[torch]"' in result.stderr


@pytest.mark.parametrize("room", ["nsm", "nsm.quantization"])
def test_an_unknown_name_is_an_attribute_error(room: str) -> None:
    result = _python(f"import {room} as room; room.Unknown")
    assert f"module '{room}' has no attribute 'Unknown'" in result.stderr


def test_a_lazy_room_lists_its_names() -> None:
    import nsm.quantization

    assert dir(nsm.quantization) == sorted(_exports("nsm.quantization"))


def test_the_wheel_works_in_a_bare_environment(tmp_path: Path) -> None:
    """Built from a copy, installed with its own requirements only, imported outside the checkout."""
    dist = tmp_path / "dist"
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(dist), str(ROOT)]
    subprocess.run(build, check=True, capture_output=True)
    (wheel,) = dist.glob("*.whl")
    venv.create(tmp_path / "bare", with_pip=True)
    python = str(tmp_path / "bare" / "bin" / "python")
    install = [python, "-m", "pip", "install", "--quiet", "--constraint", str(ROOT / "constraints.txt"), str(wheel)]
    subprocess.run(install, check=True, capture_output=True)
    code = (
        "import importlib.metadata, nsm, nsm.runtimes, nsm.export.cli, nsm.export.verify, pathlib\n"
        "print(pathlib.Path(nsm.__file__).parts.count('site-packages'))\n"
        "print(sorted(d.metadata['name'].lower() for d in importlib.metadata.distributions()))"
    )
    result = subprocess.run([python, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    inside, installed = result.stdout.splitlines()
    assert inside == "1"
    assert "torch" not in installed
    packages = next((tmp_path / "bare" / "lib").iterdir()) / "site-packages"
    for module, path in MODULES.items():
        relative = Path(*module.split("."))
        name = relative / "__init__.py" if path.name == "__init__.py" else relative.with_suffix(".py")
        assert (packages / name).is_file(), f"{module} is missing"
    for asset in ("index.html", "nsm.js", "node.js"):
        assert (packages / "nsm/export/builders/web_client" / asset).is_file(), asset
    doctor = subprocess.run(
        [str(tmp_path / "bare" / "bin" / "nsm"), "doctor"], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert 'pip install "nsm-toolkit[export]"' in doctor.stdout
    assert not {"export", "runtimes"} & {path.name for path in packages.iterdir()}
