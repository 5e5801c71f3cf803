"""Every annotation of Jaxtron's functions and dataclasses, shapes included, is checked at every call that a test makes.

Install this before anything of `jaxtron` is imported: what was imported earlier goes unchecked.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Self

from beartype import BeartypeConf, beartype
from jaxtyping import install_import_hook

# `float` takes an int, as type checkers have it
_check = beartype(conf=BeartypeConf(is_pep484_tower=True))


def check(function: Callable) -> Callable:
    """The function with its annotations checked, but for `Self`: a method does not know its class yet.

    Fields of a dataclass that is a pytree are not: JAX fills it with shardings, types and booleans as well.
    """
    # JAX reads the environment as it is imported, so not before conftest.py has set it
    from jax.tree_util import all_leaves

    hints = function.__annotations__
    function.__annotations__ = {name: Any if hint is Self else hint for name, hint in hints.items()}
    checked = _check(function)
    if function.__name__ != "__init__":
        return checked

    def initialize(self, *arguments, **named) -> None:
        if not dataclasses.is_dataclass(self) or all_leaves([self]):
            checked(self, *arguments, **named)

    return initialize


def install() -> None:
    """Has all that is imported of `jaxtron` from now on checked."""
    install_import_hook("jaxtron", f"{__name__}.{check.__name__}")
