"""A dense model's parameters as those of a mixture of experts that computes the same (2410.07524, 2412.09952).

Each MLP is copied E times, each copy cut into G shards of its width, each an expert: expert e is shard e % G of copy
e // G. Rows of the router repeat within a copy, so that a token's best experts are whole copies (virtual groups).
"""

from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jaxtron.checkpoint.names import nest, parts
from jaxtron.convert.request import UpcycleRequest
from jaxtron.layers.config import GATED, Activation
from jaxtron.models.decoder.config import ModelConfig
from jaxtron.run.configuration import Configuration
from jaxtron.run.history import CONFIG_FILE, changes, write_record
from jaxtron.run.metrics import MetricsTally
from jaxtron.run.restored import restore_model
from jaxtron.run.session import RunSession, make_session
from jaxtron.run.sizes import check_state_fits
from jaxtron.run.state import divided
from jaxtron.runtime.memory_errors import out_of_memory_as_user_error
from jaxtron.runtime.start import start_runtime
from jaxtron.runtime.together import leaving_together
from jaxtron.sharding.parameters import ParameterSpec, fit
from jaxtron.train.setup import open_run
from jaxtron.typing import Array, Float, PyTree
from jaxtron.weights.load import load_parameters

ROOM = "Raise --mesh.fsdp or --mesh.expert, or ask for fewer --experts"


def upcycle(request: UpcycleRequest, dense: Configuration, mixture: Configuration) -> None:
    """Writes the mixture's run, on the mesh of its configuration: a checkpoint of step 0, then where it comes from and
    `config.yaml`."""
    start_runtime(mixture.runtime, devices=mixture.devices)
    with leaving_together(), out_of_memory_as_user_error(ROOM):
        # the dense model where the mixture will be
        here = mixture.model_copy(update={"model": dense.model})
        source = make_session(here, jax.devices())
        with source.use():
            params, origin = _dense(source, request, dense)
        with open_run(mixture, request.output.name) as run, leaving_together():
            params = upcycled(source, params, run.session, run.state.model, request)
            state = replace(run.state, **divided(run.session.blueprint, params))
            run.save(0, state, 0, MetricsTally())
            run.checkpoints.wait()
            if jax.process_index() == 0:
                found, notes = changes(dense.model_dump(mode="json"), run.config), {"upcycled": origin | how(request)}
                advice = "make room, remove the directory and give the same command again"
                # last of all: a directory without config.yaml is no run
                write_record(run.directory, run.config, found, step=0, notes=notes, advice=advice)
                _tell(request, origin, run.session)


def _dense(source: RunSession, request: UpcycleRequest, dense: Configuration) -> tuple[PyTree, dict[str, Any]]:
    """The dense model's parameters, and what the history says of where they come from; inside `source.use()`."""
    where = str(request.dense.absolute())
    if not request.is_hub:
        restored = restore_model(source, request.dense, dense, request.step)
        return restored.params, {"run": where, "step": restored.step}
    model = dense.model
    assert isinstance(model, ModelConfig)
    check_state_fits(dense.family.sizes(model), source.blueprint.abstract, what="parameters")
    return load_parameters(request.dense, model, source.blueprint, source.trainer.partitions), {"weights": where}


def how(request: UpcycleRequest) -> dict[str, Any]:
    """What the history says of how the mixture was made."""
    names = ("experts", "granularity", "scores", "router_std")
    return {name: getattr(request, name) for name in names} | {"top_k": request.chosen}


def upcycled(source: RunSession, dense: PyTree, target: RunSession, initial: PyTree, request: UpcycleRequest) -> PyTree:
    """The mixture's parameters of the dense model's and of its own initial ones, of which the router is taken."""
    model = target.config.model
    assert isinstance(model, ModelConfig)
    given, specs = nest(dense), nest(source.blueprint.parameters)
    gated = model.activation in GATED
    factors = scales(model.activation, output_factor(request))

    def convert(path: jax.tree_util.KeyPath, leaf: Array, spec: ParameterSpec) -> Array:
        *folders, layer, last = parts(path)
        if "moe" not in (layer, *folders[-1:]):
            return _at(given, parts(path))
        if layer == "router":
            if last != "kernel":
                return leaf
            std = 1.0 if request.router_std is None else request.router_std / model.initial_std
            make = partial(router_rows, copies=request.experts, shards=request.granularity, factor=std)
            return _made(make, leaf, spec, spec)
        if last in ("up_bias", "down_bias"):
            # the dense model has none, and new ones are zeros
            return leaf
        name = (*folders, "mlp", last, "kernel")
        if last == "up":
            make = partial(expert_inputs, copies=request.experts, shards=request.granularity, gated=gated)
            make = partial(make, factor=factors[0])
        else:
            assert last == "down", path
            make = partial(expert_outputs, copies=request.experts, shards=request.granularity, factor=factors[1])
        return _made(make, _at(given, name), _at(specs, name), spec)

    with target.use():
        return jax.tree.map_with_path(convert, initial, target.blueprint.parameters)


def output_factor(request: UpcycleRequest) -> float:
    """What the sum over a token's experts must be multiplied by to be what the MLP gives.

    Softmax over all experts weighs each 1 / (E G) where logits are near 0, of top_k / G copies: E G^2 / top_k. Over the
    chosen, weights add up to 1, and those of a copy's shards are equal: G.
    """
    if request.scores == "topk_softmax":
        return request.granularity
    return request.num_experts * request.granularity / request.chosen


def scales(activation: Activation, factor: float) -> tuple[float, float]:
    """Factors of what enters and leaves an expert that together multiply its output by `factor`, exactly.

    Shared evenly between the matrices where the activation lets a factor through; of a gated one the first is of the
    linear half alone.
    """
    if activation == "squared_relu":
        return factor ** (1 / 3), factor ** (1 / 3)
    if activation in ("relu", "swiglu", "geglu", "geglu_tanh"):
        return factor**0.5, factor**0.5
    return 1.0, factor


def expert_inputs(
    kernel: Float[Array, "..."], *, copies: int, shards: int, gated: bool, factor: float
) -> Float[Array, "*L N E G H"]:
    """The first matrices of all experts, of an MLP's [*L, E, F], or [*L, E, 2, F] where it is gated."""
    kernel = kernel if gated else kernel[..., None, :]
    *rows, embed, inputs, width = kernel.shape
    # of the pair the second is linear
    factors = jnp.where(jnp.arange(inputs) == inputs - 1, factor, 1.0).astype(kernel.dtype)[:, None]
    split = (kernel * factors).reshape(*rows, embed, inputs, shards, width // shards)
    return _copied(jnp.moveaxis(split, -2, len(rows)), len(rows), copies)


def expert_outputs(
    kernel: Float[Array, "*L F E"], *, copies: int, shards: int, factor: float
) -> Float[Array, "*L N H E"]:
    """The last matrices of all experts, of an MLP's."""
    *rows, width, embed = kernel.shape
    return _copied((kernel * factor).reshape(*rows, shards, width // shards, embed), len(rows), copies)


def router_rows(
    kernel: Float[Array, "*L E N"], *, copies: int, shards: int, factor: float = 1.0
) -> Float[Array, "*L E N"]:
    """A router whose columns of a copy's shards are equal, of one that is random."""
    return jnp.repeat(kernel[..., :copies] * factor, shards, axis=-1)


def _copied(shards: Array, axis: int, copies: int) -> Array:
    return jnp.concatenate([shards] * copies, axis)


def _made(make: partial[Array], leaf: Array, before: ParameterSpec, after: ParameterSpec) -> Array:
    """What `make` makes of a parameter without its padding, with that of the other and where it lies."""

    def run(leaf: Array) -> Array:
        made = make(fit(leaf, before.shape))
        assert made.shape == after.shape, (made.shape, after.shape)
        return fit(made.astype(after.dtype), after.layout.padded)

    return jax.jit(jax.sharding.auto_axes(run, out_sharding=after.layout.spec))(leaf)


def _at(tree: PyTree, names: tuple[str, ...]) -> PyTree:
    for name in names:
        tree = tree[name]
    return tree


def _tell(request: UpcycleRequest, origin: dict[str, Any], session: RunSession) -> None:
    """Lines for the user: what was made, how near it is, and how to go on."""
    whole = session.blueprint.num_parameters
    what = f"step {origin['step']} of {request.dense}" if "step" in origin else str(request.dense)
    print(
        f"{what} is now a mixture of {request.num_experts} experts, {request.chosen} of a token: "
        f"{whole:,} parameters in {request.output}"
    )
    if request.scores == "softmax":
        print(
            "with --scores softmax its output is the dense model's only as far as router logits are near 0; with "
            "--scores topk_softmax it is the same"
        )
    print(f"train it: python -m jaxtron.train {request.output / CONFIG_FILE}")
