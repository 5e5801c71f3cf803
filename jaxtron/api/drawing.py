"""What `Session.draw` draws: shape, spec and names of the dimensions of a parameter, an array or an activation."""

import difflib
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import NamedSharding

from jaxtron.api.layout import layout_of
from jaxtron.config import UserError
from jaxtron.models.decoder.config import ModelConfig
from jaxtron.run.session import RunSession

# shape, spec, names of dimensions, title
Drawn = tuple[tuple[int, ...], tuple[Any, ...], tuple[str, ...], str]


def drawn(session: RunSession, what: Any) -> Drawn:
    """Of a parameter by name, an array, or an activation by its logical axes; a `UserError` for anything else."""
    if isinstance(what, str):
        found = layout_of(session, what)
        if len(found) > 1:
            names = ", ".join(one.name for one in list(found)[:4])
            raise UserError(f"{what!r} matches {len(found)} parameters, {names}, ...: draw one of them")
        one = found.parameters[0]
        return one.shape, tuple(one.spec), one.axes, one.name
    if isinstance(what, jax.Array):
        if not isinstance(what.sharding, NamedSharding) or what.sharding.mesh != session.mesh:
            raise UserError("the array lies elsewhere than the session's mesh: draw one of its state or its batches")
        return what.shape, tuple(what.sharding.spec), (), ""
    if isinstance(what, Sequence) and what and all(isinstance(name, str) for name in what):
        return _activation(session, tuple(what))
    raise UserError(f"draw takes a parameter's name, an array, or logical axes of an activation, not {what!r}")


def _activation(session: RunSession, axes: tuple[str, ...]) -> Drawn:
    """Of one microbatch on all devices."""
    config, rules = session.config, session.rules
    if not isinstance(config.model, ModelConfig):
        raise UserError(f"activations of model.family {config.model.family} have sizes of their own: draw an array")
    model, length = config.model, config.data.sequence_length
    sizes = {
        "batch": config.train.global_batch // config.train.microbatches,
        "seq": length,
        "full_seq": length,
        "embed": model.hidden_size,
        "heads": model.num_heads,
        "kv_heads": model.kv_heads,
        "head_dim": model.head_size,
        "mlp": model.mlp_width,
        "vocab": model.vocab_size,
    }
    spec = []
    for name in axes:
        if name not in sizes:
            near = difflib.get_close_matches(name, sizes, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"they are {', '.join(sizes)}"
            raise UserError(f"draw knows no activation's axis {name!r}; {hint}")
        # the sequence is split over context first, and each device has two pieces of it
        own = rules.axes("context") if name in ("seq", "full_seq") else ()
        spec.append((*own, *rules.axes(*rules.activations[name])) or None)
    return tuple(sizes[name] for name in axes), tuple(spec), axes, "activation"
