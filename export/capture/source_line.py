"""Find the line of the user's code that an error, or an operation of a traced program, comes from."""

from __future__ import annotations

import inspect
import re
import sys
import sysconfig
import traceback
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from torch import fx, nn

_WIDTH = 120
"""Longest line of code that messages show, in characters."""


@dataclass(frozen=True)
class SourceLine:
    """A line of Python code; `str()` gives `file:number, in function:` and the code below."""

    file: str
    number: int
    function: str
    code: str

    def __str__(self) -> str:
        code = self.code if len(self.code) <= _WIDTH else f"{self.code[:_WIDTH]} ..."
        return f"{self.file}:{self.number}, in {self.function}:\n    {code}\n"


def line_of_error(error: BaseException) -> SourceLine | None:
    """Return the innermost line of the user's code in the traceback or text of an error and its causes."""
    for cause in causes(error):
        frames = traceback.extract_tb(cause.__traceback__)
        found = _innermost(SourceLine(f.filename, f.lineno or 0, f.name, f.line or "") for f in frames)
        found = found or _innermost(_lines_of_text(str(cause)))
        if found is not None:
            return found
    return None


def line_of_node(node: fx.Node) -> SourceLine | None:
    """Return the innermost line of the user's code that an operation was traced from."""
    return _innermost(_lines_of_text(str(node.meta.get("stack_trace") or "")))


def line_of_module(module: nn.Module, pattern: str) -> SourceLine | None:
    """Return the first line that matches a pattern in the user's classes of a module and its submodules."""
    for kind in dict.fromkeys(type(part) for part in module.modules()):
        try:
            file, (lines, start) = inspect.getfile(kind), inspect.getsourcelines(kind)
        except (OSError, TypeError):  # a class created at run time, or in C
            continue
        found = next((index for index, line in enumerate(lines) if re.search(pattern, line)), None)
        if found is not None and _is_users(file):
            return SourceLine(file, start + found, kind.__name__, lines[found].strip())
    return None


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an error and the errors that caused it."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _lines_of_text(text: str) -> Iterator[SourceLine]:
    """Yield the frames of a traceback in a text: `File "name", line N, in function`, and the code below."""
    for file, number, function, code in re.findall(r'^ *File "(.+)", line (\d+), in (.+)\n(.*)', text, re.MULTILINE):
        yield SourceLine(file, int(number), function, code.strip())


def _innermost(lines: Iterable[SourceLine]) -> SourceLine | None:
    own = [line for line in lines if line.code and _is_users(line.file)]
    return own[-1] if own else None


def _is_users(file: str) -> bool:
    """Whether a file is the user's: not part of nsm, torch, numpy or Python, and not generated."""
    if file.startswith("<") and not file.startswith(("<stdin", "<ipython", "<string")):
        return False
    if "site-packages" not in file and file.startswith(sysconfig.get_path("stdlib")):
        return False
    packages = (sys.modules[name].__file__ for name in ("nsm", "nsm.export", "torch", "numpy") if name in sys.modules)
    return not any(Path(file).is_relative_to(Path(package).parent) for package in packages if package)


def module_of(node: fx.Node) -> str:
    """Return the module of an operation, such as `blocks.1 (Spread)`; "" if unknown."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    if not stack:
        return ""
    path, kind = stack[-1]
    name = re.sub(r"^model\.(module(\.|$))?", "", path)
    kind = str(getattr(kind, "__name__", kind)).rsplit(".", 1)[-1]
    return f"{name} ({kind})" if name else kind
