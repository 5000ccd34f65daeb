"""sageLLM: one scheduling core for LLM serving, simulated and deployed unchanged.

Importing this package loads nothing else. ``sagellm.backends``, ``sagellm.runtime`` and the other
packages named below are loaded when they are first asked for.
"""

import importlib
from types import ModuleType

__version__ = "0.1.0"

_LOADED_ON_FIRST_USE = {
    "backends": "backends",
    "runtime": "sagellm.runtime",
    "control_plane": "sagellm.control_plane",
}


def __getattr__(name: str) -> ModuleType:
    if name not in _LOADED_ON_FIRST_USE:
        raise AttributeError(f"module 'sagellm' has no attribute {name!r}")
    return importlib.import_module(_LOADED_ON_FIRST_USE[name])


def __dir__() -> list[str]:
    return sorted({*globals(), *_LOADED_ON_FIRST_USE})
