"""nsm: stateful sequence models from PyTorch to where they run, with proof over a whole stream.

Names are imported when they are used: `import nsm` needs neither torch nor a backend.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nsm.adapters import Carried as Carried
    from nsm.adapters import as_step as as_step
    from nsm.export import export_model as export_model
    from nsm.export.sources import reference as reference
    from nsm.models import AdaptiveNSM as AdaptiveNSM
    from nsm.models import HybridModel as HybridModel
    from nsm.models import SimpleNSM as SimpleNSM
    from nsm.models import compact as compact
    from nsm.models import from_preset as from_preset
    from nsm.models import load as load
    from nsm.models import save as save
    from nsm.modules import HybridAttention as HybridAttention
    from nsm.modules import NSMLayer as NSMLayer
    from nsm.modules import StateManager as StateManager
    from nsm.modules import StatePropagator as StatePropagator
    from nsm.modules import TokenToStateRouter as TokenToStateRouter
    from nsm.runtimes import Session as Session
    from nsm.runtimes import open_bundle as open  # noqa: A004

__version__ = "0.1.0"

# In a checkout the folders export/ and runtimes/ lie beside this one; Python started there finds this folder before
# the installed package, and would miss them. An installed nsm has no pyproject.toml beside it.
_beside = Path(__file__).parent.parent
if (_beside / "pyproject.toml").is_file() and (_beside / "runtimes").is_dir():
    __path__.append(str(_beside))

# name -> (module, attribute, extra that the module needs)
_NAMES: dict[str, tuple[str, str, str]] = {
    "AdaptiveNSM": ("nsm.models", "AdaptiveNSM", "torch"),
    "Carried": ("nsm.adapters", "Carried", "torch"),
    "HybridAttention": ("nsm.modules", "HybridAttention", "torch"),
    "HybridModel": ("nsm.models", "HybridModel", "torch"),
    "NSMLayer": ("nsm.modules", "NSMLayer", "torch"),
    "Session": ("nsm.runtimes", "Session", ""),
    "SimpleNSM": ("nsm.models", "SimpleNSM", "torch"),
    "StateManager": ("nsm.modules", "StateManager", "torch"),
    "StatePropagator": ("nsm.modules", "StatePropagator", "torch"),
    "TokenToStateRouter": ("nsm.modules", "TokenToStateRouter", "torch"),
    "as_step": ("nsm.adapters", "as_step", "torch"),
    "compact": ("nsm.models", "compact", "torch"),
    "export_model": ("nsm.export", "export_model", "export"),
    "from_preset": ("nsm.models", "from_preset", "torch"),
    "load": ("nsm.models", "load", "torch"),
    "open": ("nsm.runtimes", "open_bundle", ""),
    "reference": ("nsm.export.sources", "reference", "torch"),
    "save": ("nsm.models", "save", "torch"),
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
