"""The code of the README, of Get started, of the tutorials and of the notebooks runs as pasted, in order."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import sys
from pathlib import Path

import pytest
import torch

from tests.export.helpers import invoke

ROOT = Path(__file__).resolve().parent.parent
TUTORIALS = sorted((ROOT / "docs" / "tutorials").glob("*.md"))
NOTEBOOKS = sorted((ROOT / "examples" / "notebooks").glob("*.ipynb"))
# Beginning of a block that does not run here -> the reason.
NOT_RUN = {
    "make ": "`make demo` trains for minutes; CI itself is `make test`",
    "git clone": "needs a network",
    "pip install": "the packages are installed",
    "nsm-export model.pt --target openvino\n": "the model is made further below",
    "nsm-export silero_vad.onnx": "a file of another project",
    "python examples/train_text.py": "trains for minutes",
}


def blocks(page: Path) -> list[str]:
    """Fenced blocks in Python, and indented commands."""
    found = []
    for match in re.finditer(r"^```python\n(.*?)^```|((?:^    [^\n]+\n)+)", page.read_text(), re.M | re.S):
        python, commands = match.groups()
        found.append(python if python is not None else re.sub(r"^    ", "", commands, flags=re.M))
    return found


def code_of(notebook: Path) -> list[str]:
    cells = json.loads(notebook.read_text())["cells"]
    return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]


def run(page: Path) -> int:
    """The number of blocks that ran."""
    names: dict[str, object] = {"__name__": "__main__"}
    ran = 0
    for block in blocks(page):
        if any(block.startswith(start) for start in NOT_RUN):
            continue
        if re.match(r"(nsm|nsm-export) ", block):
            for line in block.replace("\\\n", "").splitlines():
                command, *arguments = shlex.split(line, comments=True)
                result = invoke(*(["export"] if command == "nsm-export" else []), *arguments)
                assert result.exit_code == 0, f"{page.name}: {line}\n{result.output}"
            ran += 1
        elif re.match(r"(import|from|with|for|print|nsm\.\w+)\b|[a-z_, ]+ = ", block) or "\nwith " in block:
            exec(compile(block, f"{page}", "exec"), names)
            ran += 1
        else:
            continue  # printed output
    return ran


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["python"])
    torch.manual_seed(0)
    return tmp_path


@pytest.mark.filterwarnings("ignore")  # untrained models, and random sequences in place of real ones
def test_readme_and_get_started_run_as_pasted(here: Path) -> None:
    ran = {}
    for page in (ROOT / "README.md", ROOT / "docs" / "get-started.md"):
        torch.manual_seed(0)
        for bundle in here.glob("*.nsm"):
            shutil.rmtree(bundle)
        ran[page.name] = run(page)
    assert ran == {"README.md": 4, "get-started.md": 4}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("page", TUTORIALS, ids=[page.stem for page in TUTORIALS])
def test_a_tutorial_runs_as_pasted(page: Path, here: Path) -> None:
    assert run(page) >= 4


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("path", NOTEBOOKS, ids=[path.stem for path in NOTEBOOKS])
def test_a_notebook_runs(path: Path, here: Path) -> None:
    names: dict[str, object] = {"__name__": "__main__"}
    for source in code_of(path):
        exec(compile(source, path.name, "exec"), names)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=[path.stem for path in NOTEBOOKS])
def test_a_notebook_is_stored_without_outputs(path: Path) -> None:
    assert len(code_of(path)) >= 3
    for cell in json.loads(path.read_text())["cells"]:
        assert not cell.get("outputs")
        assert cell.get("execution_count") is None


def test_every_page_has_blocks() -> None:
    for page in (ROOT / "README.md", ROOT / "docs" / "get-started.md", *TUTORIALS):
        assert len(blocks(page)) >= 4, page
