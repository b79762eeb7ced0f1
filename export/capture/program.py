"""Trace a module with torch.export, or explain why this fails, with the line of the user's code."""

from __future__ import annotations

import contextlib
import io
import logging
import re
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from nsm.errors import BuildError, NsmError, UnsupportedError
from nsm.export.capture.causes import CAUSES, SCRIPTED
from nsm.export.capture.source_line import causes, line_of_error, line_of_module

DETAILS = "--verbose shows torch's full error; in Python it is the `__cause__` of this error."
_LOGGERS = ("torch", "torch._dynamo", "torch.export", "torch.fx", "torch.onnx")


def capture(module: nn.Module, examples: tuple[Tensor, ...], name: str) -> ExportedProgram:
    """Trace a module by running it; if that fails, trace it in strict mode, which reads its Python code.

    Args:
        module: a module in eval mode.
        examples: its arguments; their shapes become fixed.
        name: name of the module for messages.

    Returns:
        The traced program.

    Raises:
        UnsupportedError: a known cause; the message has the line and the code to write instead.
        BuildError: any other failure; the message has the line and torch's first sentence.
    """
    failures: list[Exception] = []
    for strict in (False, True):
        try:
            with quiet():
                return torch.export.export(module, examples, strict=strict)
        except Exception as error:  # torch and the module raise errors of any class
            failures.append(error)
    raise explained(failures, module, name) from failures[0]


def explained(failures: Sequence[Exception], module: nn.Module, name: str) -> NsmError:
    """Return the error for the failures of torch.export in its two modes; see `capture`."""
    line = next(filter(None, map(line_of_error, failures)), None)
    texts, read = ([f"{type(cause).__name__}: {cause}" for cause in causes(error)] for error in failures)
    code = line.code if line else ""
    found = next((row for row in CAUSES for text in texts if row.matches(text, code, "\n".join(read))), None)
    scripted = [path for path, part in module.named_modules() if isinstance(part, torch.jit.ScriptModule)]
    if scripted:
        path = re.sub(r"^model\.(module\.)?", "", scripted[0])
        found = replace(SCRIPTED, cause=SCRIPTED.cause.format(path))
    if line is None and found is not None and found.source:
        line = line_of_module(module, found.source)
    where = f"{name} cannot be traced by torch.export{f': {line}' if line else '. '}"
    if found is not None:
        return UnsupportedError(f"{where}{found.cause} {found.fix} {DETAILS}")
    return BuildError(f"{where}It says: {first_line(texts[0])} {DETAILS}")


def first_line(text: str) -> str:
    """Return the first non-empty line of a message, with a full stop."""
    line = next((line.strip() for line in text.splitlines() if line.strip()), "")
    return line if line.endswith((".", "!", "?")) else f"{line}."


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Suppress torch's warnings, logs and dumps of partial graphs on the terminal.

    They concern the exporter's use of torch; failures are raised.
    """
    loggers = [logging.getLogger(name) for name in _LOGGERS]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
