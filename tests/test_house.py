"""Tests that keep the house: who may import whom, what a bare install can do, and that the wheel is whole."""

from __future__ import annotations

import ast
import subprocess
import sys
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = {"nsm": "nsm", "export": "nsm.export", "quantization": "nsm.quantization", "runtimes": "nsm.runtimes"}

# What a room may import of the project, besides itself. One way: errors -> plain -> reading -> decode -> exchange ->
# partials -> files -> spec -> trace -> manifest -> bundle -> staging, then the torch models on one side and the
# runtimes on the other, and export above all.
VOCABULARY = (
    "nsm.errors",
    "nsm.plain",
    "nsm.reading",
    "nsm.decode",
    "nsm.exchange",
    "nsm.partials",
    "nsm.files",
    "nsm.spec",
    "nsm.trace",
    "nsm.manifest",
    "nsm.bundle",
    "nsm.staging",
)
ALLOWED = {
    "nsm.errors": (),
    "nsm.plain": ("nsm.errors",),
    "nsm.decode": ("nsm.errors",),
    "nsm.reading": (),
    "nsm.exchange": (),
    "nsm.partials": (),
    "nsm.files": ("nsm.errors", "nsm.reading", "nsm.partials"),
    "nsm.spec": ("nsm.errors", "nsm.reading", "nsm.decode"),
    "nsm.trace": ("nsm.errors", "nsm.decode", "nsm.reading", "nsm.files", "nsm.spec"),
    "nsm.manifest": ("nsm.errors", "nsm.decode", "nsm.files", "nsm.spec"),
    "nsm.bundle": ("nsm.errors", "nsm.partials", "nsm.files", "nsm.spec", "nsm.trace", "nsm.manifest"),
    "nsm.staging": ("nsm.errors", "nsm.exchange", "nsm.partials", "nsm.files", "nsm.manifest", "nsm.bundle"),
    "models": (*VOCABULARY, "models"),
    "nsm.runtimes": (*VOCABULARY, "nsm.runtimes"),
    "nsm.quantization": (*VOCABULARY, "nsm.runtimes", "nsm.quantization"),
    "nsm.export": (*VOCABULARY, "models", "nsm.runtimes", "nsm.quantization", "nsm.export"),
}
# The rooms of export that need torch; the others must do without.
WITH_TORCH = {
    "nsm.export.api",
    "nsm.export.capture",
    "nsm.export.complex_operators",
    "nsm.export.complex_pairs",
    "nsm.export.fourier",
    "nsm.export.onnx",
    "nsm.export.onnx_failure",
    "nsm.export.savings",
    "nsm.export.pt2",
    "nsm.export.pt2_training",
    "nsm.export.retrace",
    "nsm.export.rewrite",
    "nsm.export.source_line",
    "nsm.export.torch_program",
    "nsm.export.torch_runtime",
    "nsm.export.torch_source",
    "nsm.export.torch_weights",
}
# Those that need the packages of ONNX; others may import them inside functions only.
WITH_ONNX = {
    "nsm.export.exact_division",
    "nsm.export.low_precision",
    "nsm.export.onnx_ask",
    "nsm.export.onnx_dependence",
    "nsm.export.onnx_file",
    "nsm.export.onnx_flow",
    "nsm.export.onnx_foreign",
    "nsm.export.onnx_given",
    "nsm.export.onnx_graph",
    "nsm.export.onnx_inspect",
    "nsm.export.onnx_layout",
    "nsm.export.onnx_limits",
    "nsm.export.onnx_normal",
    "nsm.export.onnx_operators",
    "nsm.export.onnx_order",
    "nsm.export.onnx_pairing",
    "nsm.export.onnx_recurrent",
    "nsm.export.onnx_source",
    "nsm.export.onnx_states",
    "nsm.export.onnx_step",
    "nsm.export.onnx_trial",
    "nsm.export.passes",
    "nsm.export.positions",
    "nsm.export.roofline",
    "nsm.export.weights",
    "nsm.export.wrap",
    "nsm.quantization.calibration",
    "nsm.quantization.forms",
    "nsm.quantization.products",
    "nsm.quantization.recurrent",
}


def _modules() -> dict[str, Path]:
    found = {}
    for folder, package in FOLDERS.items():
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            found[".".join((package, *(part for part in parts if part != "__init__")))] = path
    return found


MODULES = _modules()


def _room(module: str) -> str:
    for name in ("nsm.runtimes", "nsm.quantization", "nsm.export", *VOCABULARY):
        if module == name or module.startswith(name + "."):
            return name
    return "models"


def _imports(path: Path, top_level_only: bool = False) -> set[str]:
    """Modules imported by a file; imports for type checking do not count."""
    tree = ast.parse(path.read_text())
    skipped = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        for inner in ast.walk(node)
    }
    found: set[str] = set()
    for node in tree.body if top_level_only else ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


@pytest.mark.parametrize("module", sorted(MODULES))
def test_imports_go_one_way(module: str) -> None:
    if module == "nsm":
        assert not _imports(MODULES[module], top_level_only=True) & set(MODULES), "nsm/__init__.py must be lazy"
        return
    allowed = ALLOWED[_room(module)]
    for imported in _imports(MODULES[module]) & (set(MODULES) - {"nsm"}):
        assert imported == module or _room(imported) in allowed, f"{module} may not import {imported}"


@pytest.mark.parametrize("module", sorted(MODULES))
def test_torch_stays_in_its_rooms(module: str) -> None:
    uses_torch = any(name.split(".")[0] == "torch" for name in _imports(MODULES[module]))
    if uses_torch:
        assert _room(module) == "models" or module in WITH_TORCH


@pytest.mark.parametrize("module", sorted(set(MODULES) - WITH_TORCH - WITH_ONNX))
def test_the_rooms_with_onnx_are_not_needed_by_others(module: str) -> None:
    assert not _imports(MODULES[module], top_level_only=True) & WITH_ONNX


def test_the_rule_about_imports_can_fail() -> None:
    assert "nsm.export" not in ALLOWED["nsm.runtimes"]
    assert "nsm.runtimes" not in ALLOWED["models"]
    assert "nsm.export.build" in _imports(MODULES["nsm.export.pipeline"])


def test_every_package_is_in_pyproject() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    packages = {module for module, path in MODULES.items() if path.name == "__init__.py"}
    listed = next(line for line in text.splitlines() if line.startswith("packages = "))
    assert set(ast.literal_eval(listed.removeprefix("packages = "))) == packages


def _python(code: str, *options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *options, "-c", code], capture_output=True, text=True, check=False)


def test_importing_needs_neither_torch_nor_a_backend() -> None:
    blocked = ["torch", "onnx", "onnxscript", "onnxruntime", "openvino", "tensorrt", "tensorrt_rtx", "cuda", "sklearn"]
    without_torch = [m for m in MODULES if _room(m) != "models" and m not in WITH_TORCH | WITH_ONNX]
    backends = {f"nsm.runtimes.{name}" for name in ("onnxruntime", "onnxruntime_cuda", "onnxruntime_plain", "openvino")}
    names = sorted(set(without_torch) - backends - {"nsm.export.mobile", "nsm.export.openvino"})
    code = f"import sys\nfor name in {blocked}: sys.modules[name] = None\nimport importlib\n"
    code += f"for name in {names}: importlib.import_module(name)\nprint('fine')"
    result = _python(code)
    assert result.stdout == "fine\n", result.stderr


def test_python_started_in_the_checkout_finds_every_room() -> None:
    code = "import nsm, nsm.runtimes, nsm.export.cli; print(nsm.__path__[0])"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout == f"{ROOT / 'nsm'}\n"


def test_a_missing_torch_names_the_extra() -> None:
    result = _python("import sys; sys.modules['torch'] = None; import nsm; nsm.SimpleNSM")
    assert "nsm.SimpleNSM needs torch, which is not installed." in result.stderr
    assert 'pip install "nsm-toolkit[torch]"' in result.stderr


def test_an_unknown_name_is_an_attribute_error() -> None:
    result = _python("import nsm; nsm.Unknown")
    assert "module 'nsm' has no attribute 'Unknown'" in result.stderr


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
        "import importlib.metadata, nsm, nsm.runtimes, nsm.export.cli, nsm.export.commands, pathlib\n"
        "print(pathlib.Path(nsm.__file__).parts.count('site-packages'))\n"
        "print(sorted(d.metadata['name'].lower() for d in importlib.metadata.distributions()))"
    )
    result = subprocess.run([python, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    inside, installed = result.stdout.splitlines()
    assert inside == "1"
    assert "torch" not in installed
    for module, path in MODULES.items():
        relative = Path(*module.split("."))
        name = relative / "__init__.py" if path.name == "__init__.py" else relative.with_suffix(".py")
        assert (next((tmp_path / "bare" / "lib").iterdir()) / "site-packages" / name).is_file(), f"{module} is missing"
    for asset in ("index.html", "nsm.js", "node.js"):
        assert list((tmp_path / "bare" / "lib").glob(f"*/site-packages/nsm/export/web_client/{asset}")), asset
    doctor = subprocess.run(
        [str(tmp_path / "bare" / "bin" / "nsm"), "doctor"], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert 'pip install "nsm-toolkit[export]"' in doctor.stdout
    top_level = (next((tmp_path / "bare" / "lib").iterdir()) / "site-packages").iterdir()
    assert not {"export", "runtimes"} & {path.name for path in top_level}
