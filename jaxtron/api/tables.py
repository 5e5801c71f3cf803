"""The two tables of sharding as a caller edits them: checked, so that no edit changes what a step computes."""

import difflib
from collections.abc import Mapping, Sequence

from jaxtron.config import UserError
from jaxtron.layers.config import Fp8Config
from jaxtron.models.decoder.config import ModelConfig
from jaxtron.run.configuration import Configuration
from jaxtron.run.session import RunSession
from jaxtron.sharding.folding import FLAGS
from jaxtron.sharding.rules import ACTIVATIONS, PARAMETERS, Tables
from jaxtron.words import either

Edits = Mapping[str, str | Sequence[str]]
# Axes that may be split by tensor or by nothing. Others are cut by code of the layers' own (embedding and loss cut
# vocab and seq), or by flags whose collectives the step makes itself.
FREE = {"parameters": ("heads", "kv_heads", "mlp"), "activations": ("heads", "kv_heads", "mlp")}
EDITABLE = ("tensor",)
# kinds of layers in which an edit is only another layout
PLAIN = frozenset("*W-")
HOUSE = {"parameters": PARAMETERS, "activations": ACTIVATIONS}


def edited(config: Configuration, parameters: Edits | None, activations: Edits | None) -> Tables | None:
    """The house's tables with edits over them; None where there are none. A `UserError` for one that cannot be.

    An edit is a flag, several or none, `{"mlp": ()}`; a whole table with some entries changed will do.
    """
    found = {"parameters": _edits("parameters", parameters), "activations": _edits("activations", activations)}
    if not any(found.values()):
        return None
    model = config.model
    plain = (
        isinstance(model, ModelConfig) and {kind.symbol for kind in model.kinds} <= PLAIN and model.fp8 == Fp8Config()
    )
    if not plain and any(name in HOUSE[table] for table, edits in found.items() for name in edits):
        raise UserError(
            "the tables can be edited for decoders of attention and MLPs without model.fp8, and this model has other "
            "layers: leave parameters and activations out"
        )
    return Tables(*({**HOUSE[table], **found[table]} for table in ("parameters", "activations")))


def _edits(table: str, given: Edits | None) -> dict[str, tuple[str, ...]]:
    """The entries that differ from the house's."""
    if given is None:
        return {}
    if not isinstance(given, Mapping):
        raise UserError(f"{table} takes a mapping of logical axes to flags, such as {{'mlp': ()}}, not {given!r}")
    found = {}
    for name, flags in given.items():
        flags = (flags,) if isinstance(flags, str) else flags
        if not isinstance(name, str) or not isinstance(flags, Sequence) or not all(isinstance(f, str) for f in flags):
            raise UserError(f"{table}[{name!r}] takes flags of the mesh, such as ('tensor',) or (), not {flags!r}")
        flags = tuple(flags)
        if flags != HOUSE[table].get(name):
            _check(table, name, flags)
            found[name] = flags
    return found


def _check(table: str, name: str, flags: tuple[str, ...]) -> None:
    for flag in flags:
        if flag not in (*FLAGS, "expert", "expert_tensor"):
            near = difflib.get_close_matches(flag, FLAGS, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"flags are {', '.join(FLAGS)}"
            raise UserError(f"{table}[{name!r}] names the flag {flag!r}, and the mesh has no such: {hint}")
        if flag not in EDITABLE:
            raise UserError(
                f"{table}[{name!r}] cannot be split by {flag!r} in a table, only by 'tensor': mesh.{flag} shares out "
                "batch, layers or state by itself (sharding.zero)"
            )
    known = HOUSE[table]
    if name in known and name not in FREE[table]:
        raise UserError(
            f"{table}[{name!r}] is cut by the layers themselves and stays as it is: edit {either(FREE[table])}"
        )
    if name not in known and table == "activations":
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise UserError(f"activations[{name!r}]: no activation has this logical axis{hint}")


def check_used(session: RunSession, parameters: Edits | None) -> None:
    """A `UserError` for a logical axis that is neither in the house's table nor of any parameter of the model."""
    used = {axis for spec in session.blueprint.names.values() for axis in spec.axes}
    for name in parameters or {}:
        if name not in PARAMETERS and name not in used:
            near = difflib.get_close_matches(name, sorted(used), n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise UserError(f"parameters[{name!r}]: no parameter of the model has this logical axis{hint}")
