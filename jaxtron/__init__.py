"""Jaxtron: Megatron-LM's parallel training as a JAX program.

`import jaxtron as jx` imports nothing else: the public names (docs/api.md) are found when they are first asked for, and
JAX with the first one that computes.
"""

import difflib
import importlib
from typing import Any

# public name -> the module that has it, and whether that needs JAX
_PUBLIC = {
    "Configuration": ("jaxtron.run.configuration", False),
    "Session": ("jaxtron.api.session", True),
    "UserError": ("jaxtron.config", False),
    "export": ("jaxtron.api.runs", True),
    "load": ("jaxtron.api.settings", False),
    "open_run": ("jaxtron.api.runs", True),
    "rehearse": ("jaxtron.api.plans", True),
    "search": ("jaxtron.api.plans", True),
    "simulate": ("jaxtron.api.devices", True),
}
__all__ = sorted(_PUBLIC)


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        near = [] if name.startswith("_") else difflib.get_close_matches(name, _PUBLIC, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise AttributeError(f"module 'jaxtron' has no attribute {name!r}{hint}")
    module, needs_jax = _PUBLIC[name]
    if needs_jax:
        importlib.import_module("jaxtron.quiet").import_jax()
    found = globals()[name] = getattr(importlib.import_module(module), name)
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *_PUBLIC})
