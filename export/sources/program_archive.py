"""A foreign `.pt2` is looked at before torch reads it: nothing in a file is ever executed.

`torch.export.load` (2.13) runs code from a file in many ways. Tensors and constants may be pickles that it loads with
weights_only=False, and so are example inputs, and weights and constants under their older names, that it cannot load
otherwise; a file that its reader gives up on is read as the format of 2.7, pickles again; `data/aotinductor/` holds
compiled libraries; everything under `models/` is a program, whatever it is called; sizes are expressions that sympy
evaluates; a node may name any function of torch or `operator`; the nesting of arguments may name a module to import;
some operators read and write files; and compressed members are inflated before they are examined. A plain module needs
none of that. So only the content that `torch.export.save` writes for one is accepted: known files, known operators,
known containers.
"""

from __future__ import annotations

import io
import json
import math
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from nsm.errors import CheckpointError
from nsm.files import LIMITS, open_regular, open_zip, regular_size
from nsm.models import check_records, load_plain

# An expression over symbolic sizes as sympy writes it out, `Mul(Integer(2), Symbol('s0', integer=True))` or `2*s0 + 1`.
# Of names, only these are evaluated.
_NAMES = "Symbol|Integer|Rational|Mul|Add|Pow|Max|Min|Mod|PythonMod|FloorDiv|CeilDiv|CleanDiv|floor|ceiling|oo|int_oo"
_RELATIONS = "Equality|Unequality|StrictLessThan|LessThan|StrictGreaterThan|GreaterThan|Eq|Ne|Ge|Gt|Le|Lt|And|Or|Not"
_EXPRESSION = re.compile(
    rf"(?:'\w+'|\b(?:{_NAMES}|{_RELATIONS}|True|False|positive|integer|nonnegative|[suz]\d+|\d+)\b|[-+*/%(),=<>\s])*"
)
# The files that torch.export.save writes, in one folder. All JSON is examined; tensors are plain bytes.
_FILES = re.compile(
    r"models/model\.json|data/sample_inputs/model\.pt|data/weights/(model_weights_config\.json|weight_\d+)|"
    r"data/constants/(model_constants_config\.json|tensor_\d+)|archive_format|archive_version|byteorder|version|"
    r"\.data/(version|serialization_id)|\.format_version|\.storage_alignment|extra/.+"
)
# Arithmetic over sizes, and the operators that run a part of the graph.
_ARITHMETIC = "eq|ne|le|ge|lt|gt|neg|pos|mul|add|sub|floordiv|mod|pow|truediv|and_|or_|lshift|rshift|getitem"
_CONTROL = "cond|while_loop|scan|associative_scan|map_impl|wrap_with_set_grad_enabled|wrap_with_autocast"
_TARGET = re.compile(
    rf"_operator\.({_ARITHMETIC})|math\.(trunc|ceil|floor)|torch\._?sym_\w+|torch\.ops\.higher_order\.({_CONTROL})"
)
_OPERATOR = re.compile(r"torch\.ops\.(aten|prims)\.(\w+)\.(\w+)")
# Numbers of constants that are views of fewer, as `expand` makes them.
_EXPANDED = 1 << 23
# Containers that arguments are nested in. Others name classes and modules, which are imported.
_CONTAINERS = (None, "builtins.tuple", "builtins.list", "builtins.dict", "collections.OrderedDict")


def check_archive(path: Path) -> None:
    """Refuse a `.pt2` that would have torch execute something.

    Raises:
        CheckpointError: not a program, or it contains code; the error names it.
    """
    try:
        with open_regular(path, "torch") as file, open_zip(file) as archive:
            for name, part in _parts(path, archive):
                _check_part(path, name, part)
    except FileNotFoundError as error:
        raise CheckpointError(f"There is no file {path}.") from error
    except (OSError, zipfile.BadZipFile, ValueError, RuntimeError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{path} cannot be read as a program ({type(error).__name__}: {error}). Expected a .pt2 written by "
            "torch.export.save of torch 2.9 or later."
        ) from error


def _parts(path: Path, archive: zipfile.ZipFile) -> Iterator[tuple[str, Any]]:
    """The parts that torch would interpret: JSON by name, and example inputs as bytes."""
    # As they stand in the file: torch does not cut names at a zero byte, as Python does.
    names = [info.orig_filename.partition("/") for info in archive.infolist()]
    if not any(inner.startswith("models/") for _, _, inner in names):
        raise CheckpointError(
            f"{path} is no program of torch.export: it holds no models/*.json. Expected a .pt2 written by "
            "torch.export.save of torch 2.9 or later; a model in nsm's own form is a .pt written by nsm.save."
        )
    for root, slash, inner in names:
        if root != names[0][0] or not _FILES.fullmatch(inner) or names.count((root, slash, inner)) > 1:
            raise _refusal(path, f"it holds {root}{slash}{inner}", "the files of torch.export.save, once each")
    weights = sum(info.file_size for info in archive.infolist() if "/data/weights/" in info.orig_filename)
    if weights > LIMITS["onnx"]:
        raise ValueError(f"its weights have {weights:,} bytes, and a graph holds at most {LIMITS['onnx']:,}")
    with open_regular(path, "torch") as file:
        check_records(file)
    # Python and torch may see different archives in one file, so the file is examined with torch's reader.
    reader = torch._C.PyTorchFileReader(str(path))
    if sorted(reader.get_all_records()) != sorted(inner for _, _, inner in names):
        raise _refusal(path, "it has two tables of contents", "the files of one archive")
    for info, (_, _, inner) in zip(archive.infolist(), names, strict=True):
        if inner.endswith(".json") and not inner.startswith("extra/"):
            if info.file_size > LIMITS["program"]:
                raise ValueError(f"{inner} has {info.file_size:,} bytes, and at most {LIMITS['program']:,} are read")
            yield inner, json.loads(reader.get_record(inner).decode())
        elif inner.startswith("data/sample_inputs/"):
            yield inner, reader.get_record(inner)


def _check_part(path: Path, name: str, part: Any) -> None:
    if isinstance(part, bytes):
        try:
            load_plain(io.BytesIO(part))
        except ValueError:
            raise
        except Exception as error:  # torch raises various classes for a damaged pickle
            raise _refusal(path, f"{name} holds Python objects", "example inputs that are tensors") from error
        return
    if name.endswith("_config.json"):
        _check_numbers(path, name, part)
    for item in _dictionaries(part):
        expression = item.get("expr_str")
        if item.get("use_pickle"):
            raise _refusal(path, f"{name} says that {item.get('path_name')} is a pickle", "plain tensors")
        if str(item.get("path_name", "")).startswith(("custom_obj", "opaque")):
            raise _refusal(path, f"{name} has the object {item['path_name']}", "plain tensors")
        for target in (item.get("target"), item.get("as_operator")):
            if isinstance(target, str) and not _harmless(target):
                raise _refusal(path, f"it calls {target}", "operators of torch.ops that touch no files")
        if isinstance(expression, str) and not _EXPRESSION.fullmatch(expression):
            raise _refusal(path, f"a size is the expression {expression[:60]!r}", "sums and products of sizes")
        for key in ("in_spec", "out_spec"):
            if isinstance(item.get(key), str) and not _plain(json.loads(item[key])):
                raise _refusal(path, f"{key} nests arguments in {item[key][:80]!r}", "tuples, lists and dictionaries")


def _check_numbers(path: Path, name: str, part: Any) -> None:
    """Raise `ValueError` where tensors have far more numbers than the file has bytes: views of a few of them."""
    metas = [item["tensor_meta"] for item in _dictionaries(part) if isinstance(item.get("tensor_meta"), dict)]
    sizes = [[size.get("as_int", 1) for size in meta["sizes"]] for meta in metas]
    count, size = sum(abs(math.prod(item)) for item in sizes), regular_size(path)
    if count > size + _EXPANDED:
        raise ValueError(f"the tensors of {name} have {count:,} numbers, and the whole file {size:,} bytes")


def _harmless(target: str) -> bool:
    """Whether a node may call that: arithmetic, control flow, or an operator that is there and takes no file's name."""
    match = _OPERATOR.fullmatch(target)
    if match is None:
        return _TARGET.fullmatch(target) is not None
    space, name, overload = match.groups()
    operator = getattr(getattr(getattr(torch.ops, space), name, None), overload, None)
    if not isinstance(operator, torch._ops.OpOverload):
        return False
    return all(argument.name != "filename" for argument in operator._schema.arguments)


def _plain(tree: Any) -> bool:
    """Whether a nesting, as pytree writes it, has only containers that need no import."""
    for node in _dictionaries(tree):
        context = node.get("context")
        if node.get("type") not in _CONTAINERS or not isinstance(context, str | None):
            return False
        # Keys are text; a dictionary among them would be an enumeration, which is imported.
        if context is not None and any(_dictionaries(json.loads(context))):
            return False
    return True


def _refusal(path: Path, found: str, expected: str) -> CheckpointError:
    return CheckpointError(
        f"{path} was refused: {found}, and loading that could run code from the file. Expected {expected}. Where "
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
