"""nsm: stateful sequence models from PyTorch to where they run, with proof over a whole stream.

Names are imported when they are used: `import nsm` needs neither torch nor a backend.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nsm.adapters.as_step import as_step as as_step
    from nsm.adapters.carried import Carried as Carried
    from nsm.attention import HybridAttention as HybridAttention
    from nsm.compaction import compact as compact
    from nsm.export.api import export_model as export_model
    from nsm.export.torch_runtime import reference as reference
    from nsm.layer import NSMLayer as NSMLayer
    from nsm.manager import StateManager as StateManager
    from nsm.models.adaptive import AdaptiveNSM as AdaptiveNSM
    from nsm.models.checkpoint import load as load
    from nsm.models.checkpoint import save as save
    from nsm.models.hybrid import HybridModel as HybridModel
    from nsm.models.presets import from_preset as from_preset
    from nsm.models.simple import SimpleNSM as SimpleNSM
    from nsm.propagator import StatePropagator as StatePropagator
    from nsm.router import TokenToStateRouter as TokenToStateRouter
    from nsm.runtimes.opening import open_bundle as open  # noqa: A004
    from nsm.runtimes.session import Session as Session

__version__ = "0.1.0"

# In a checkout the folders export/ and runtimes/ lie beside this one; Python started there finds this folder before
# the installed package, and would miss them. An installed nsm has no pyproject.toml beside it.
_beside = Path(__file__).parent.parent
if (_beside / "pyproject.toml").is_file() and (_beside / "runtimes").is_dir():
    __path__.append(str(_beside))

# name -> (module, attribute, extra that the module needs)
_NAMES: dict[str, tuple[str, str, str]] = {
    "AdaptiveNSM": ("nsm.models.adaptive", "AdaptiveNSM", "torch"),
    "Carried": ("nsm.adapters.carried", "Carried", "torch"),
    "HybridAttention": ("nsm.attention", "HybridAttention", "torch"),
    "HybridModel": ("nsm.models.hybrid", "HybridModel", "torch"),
    "NSMLayer": ("nsm.layer", "NSMLayer", "torch"),
    "Session": ("nsm.runtimes.session", "Session", ""),
    "SimpleNSM": ("nsm.models.simple", "SimpleNSM", "torch"),
    "StateManager": ("nsm.manager", "StateManager", "torch"),
    "StatePropagator": ("nsm.propagator", "StatePropagator", "torch"),
    "TokenToStateRouter": ("nsm.router", "TokenToStateRouter", "torch"),
    "as_step": ("nsm.adapters.as_step", "as_step", "torch"),
    "compact": ("nsm.compaction", "compact", "torch"),
    "export_model": ("nsm.export.api", "export_model", "export"),
    "from_preset": ("nsm.models.presets", "from_preset", "torch"),
    "load": ("nsm.models.checkpoint", "load", "torch"),
    "open": ("nsm.runtimes.opening", "open_bundle", ""),
    "reference": ("nsm.export.torch_runtime", "reference", "torch"),
    "save": ("nsm.models.checkpoint", "save", "torch"),
}

__all__ = [
    "AdaptiveNSM",
    "Carried",
    "HybridAttention",
    "HybridModel",
    "NSMLayer",
    "Session",
    "SimpleNSM",
    "StateManager",
    "StatePropagator",
    "TokenToStateRouter",
    "__version__",
    "as_step",
    "compact",
    "export_model",
    "from_preset",
    "load",
    "open",
    "reference",
    "save",
]


def __getattr__(name: str) -> Any:
    if name not in _NAMES:
        raise AttributeError(f"module 'nsm' has no attribute {name!r}")
    module, attribute, extra = _NAMES[name]
    try:
        return getattr(importlib.import_module(module), attribute)
    except ModuleNotFoundError as error:
        if not extra or (error.name or "").startswith("nsm"):
            raise
        from nsm.errors import MissingDependencyError

        raise MissingDependencyError(
            f"nsm.{name} needs {error.name}, which is not installed. "
            f'Install it with: pip install "nsm-toolkit[{extra}]"'
        ) from error


def __dir__() -> list[str]:
    return sorted([*globals(), *_NAMES])
