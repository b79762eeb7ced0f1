"""A foreign `.pt2` is looked at before torch reads it: nothing in a file is ever executed.

`torch.export.load` (2.13) runs code from a file in four ways: tensors and constants may be pickles that it loads with
weights_only=False; so are example inputs that it cannot load otherwise; sizes are expressions that sympy evaluates; and
a node may name any function of torch. What `torch.export.save` writes for a plain module needs none of that.
"""

from __future__ import annotations

import io
import json
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import torch

from nsm.errors import CheckpointError

# An expression over symbolic sizes as sympy writes it out, `Mul(Integer(2), Symbol('s0', integer=True))` or `2*s0 + 1`.
# Of names, only these are evaluated.
_NAMES = "Symbol|Integer|Rational|Mul|Add|Pow|Max|Min|Mod|PythonMod|FloorDiv|CeilDiv|CleanDiv|floor|ceiling|oo|int_oo"
_RELATIONS = "Equality|Unequality|StrictLessThan|LessThan|StrictGreaterThan|GreaterThan|Eq|Ne|Ge|Gt|Le|Lt|And|Or|Not"
_EXPRESSION = re.compile(
    rf"(?:'\w+'|\b(?:{_NAMES}|{_RELATIONS}|True|False|positive|integer|nonnegative|[suz]\d+|\d+)\b|[-+*/%(),=<>\s])*"
)
_TARGET = re.compile(
    r"torch\.ops\.(aten|prims|higher_order)\.\w+(\.\w+)?|_operator\.\w+|math\.\w+|torch\.sym_\w+|torch\._sym_\w+"
)
_MAX_JSON = 256 * 2**20


def check_archive(path: Path) -> None:
    """Refuse a `.pt2` that would have torch execute something.

    Raises:
        CheckpointError: it is none, or says what it holds that would be run.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            for name, part in _parts(path, archive):
                _check_part(path, name, part)
    except FileNotFoundError as error:
        raise CheckpointError(f"There is no file {path}.") from error
    except (OSError, zipfile.BadZipFile, ValueError, RecursionError, KeyError) as error:
        raise CheckpointError(
            f"{path} cannot be read as a program ({type(error).__name__}: {error}). Expected is a .pt2 written by "
            "torch.export.save of torch 2.9 or later."
        ) from error


def _parts(path: Path, archive: zipfile.ZipFile) -> Iterator[tuple[str, Any]]:
    """What torch would interpret: JSON by name, and example inputs as bytes."""
    found = False
    for info in archive.infolist():
        inner = PurePosixPath(*PurePosixPath(info.filename).parts[1:])
        if inner.suffix == ".json" and info.file_size <= _MAX_JSON:
            found |= inner.parts[:1] == ("models",)
            yield str(inner), json.loads(archive.read(info))
        elif inner.suffix == ".json":
            raise ValueError(f"{inner} has {info.file_size} bytes")
        elif inner.parts[:2] == ("data", "sample_inputs"):
            yield str(inner), archive.read(info)
    if not found:
        raise CheckpointError(
            f"{path} is no program of torch.export: it holds no models/*.json. Expected is a .pt2 written by "
            "torch.export.save of torch 2.9 or later; a model in nsm's own form is a .pt written by nsm.save."
        )


def _check_part(path: Path, name: str, part: Any) -> None:
    if isinstance(part, bytes):
        try:
            torch.load(io.BytesIO(part), weights_only=True)
        except Exception as error:  # what torch raises for a pickle, and whatever a damaged one makes it raise
            raise _refusal(path, f"{name} holds Python objects", "example inputs that are tensors") from error
        return
    for item in _dictionaries(part):
        target, expression = item.get("target"), item.get("expr_str")
        if item.get("use_pickle"):
            raise _refusal(path, f"{name} says that {item.get('path_name')} is a pickle", "plain tensors")
        if str(item.get("path_name", "")).startswith(("custom_obj", "opaque")):
            raise _refusal(path, f"{name} has the object {item['path_name']}", "plain tensors")
        if isinstance(target, str) and not _TARGET.fullmatch(target):
            raise _refusal(path, f"it calls {target}", "operators of torch.ops")
        if isinstance(expression, str) and not _EXPRESSION.fullmatch(expression):
            raise _refusal(path, f"a size is the expression {expression[:60]!r}", "sums and products of sizes")


def _refusal(path: Path, found: str, expected: str) -> CheckpointError:
    return CheckpointError(
        f"{path} was refused: {found}, and loading that could run code from the file. Expected are {expected}. Where "
        "you trust it, load it yourself and wrap the module with nsm.as_step."
    )


def _dictionaries(part: Any) -> Iterator[dict[str, Any]]:
    """All dictionaries in parsed JSON."""
    waiting = [part]
    while waiting:
        item = waiting.pop()
        if isinstance(item, dict):
            yield item
            waiting.extend(item.values())
        elif isinstance(item, list):
            waiting.extend(item)
