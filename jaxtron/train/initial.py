"""The state that a run begins with: drawn, or with the model of Hugging Face weights or of another run."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding

from jaxtron.checkpoint.partly import Allowance, listed
from jaxtron.config import UserError, format_value, load
from jaxtron.models.adapters import with_adapters, without_adapters
from jaxtron.models.decoder.config import ModelConfig
from jaxtron.pipeline.layer_slots import arrange
from jaxtron.pipeline.model import merge
from jaxtron.run.beginning import beginning_of, check_beginning
from jaxtron.run.configuration import configuration_type
from jaxtron.run.restored import has_model_alone, restore_model
from jaxtron.run.session import RunSession, make_session
from jaxtron.run.state import TrainState, divided
from jaxtron.sharding.parameters import ParameterSpec, fit
from jaxtron.typing import Array, PyTree
from jaxtron.weights.hub import family_of_hub, is_hub
from jaxtron.weights.load import load_parameters, partition_of
from jaxtron.weights.peft import read_adapters


def begin(session: RunSession, tokenizer: str, own: Path | None = None) -> tuple[TrainState, dict[str, Any]]:
    """The state before the first step, and what the history says of where its model comes from.

    With `checkpoint.initialize_from` the parameters are those of that directory, on this mesh; all else is new.
    `tokenizer` is the fingerprint of the data's, and `own` the run's directory, if its checkpoint is a model alone.
    """
    if own is not None:
        check_beginning(session.config, own)
        params, _ = _of_run(session, own, tokenizer)
        state = session.initial_state()
        return replace(state, **divided(session.blueprint, with_adapters(params, state.model))), {}
    directory, model = beginning_of(session.config), session.config.model
    if directory is None:
        return session.initial_state(), {}
    check_beginning(session.config)
    where, allowed = str(directory.absolute()), Allowance.of(session.config.checkpoint)
    if is_hub(directory):
        known = list(session.blueprint.names)
        allow = None if allowed is None else partial(allowed.check, directory, known=known)
        with session.use():
            base = without_adapters(session.blueprint)
            params = load_parameters(directory, model, base, session.trainer.partitions, allow)
        origin: dict[str, Any] = {"weights": where}
    else:
        params, step = _of_run(session, directory, tokenizer, allowed)
        origin = {"run": where, "step": step}
    state = session.initial_state()
    if allowed is not None:
        drawn = [name for name, leaf in _named(params) if leaf is None]
        origin |= {"drawn": drawn}
        if jax.process_index() == 0 and drawn:
            print(f"drawn, not there: {listed(drawn)}")
    params = with_adapters(params, state.model)
    if allowed is not None:
        params = merge(params, state.model)
    if session.config.checkpoint.initialize_adapters is not None:
        adapters = Path(session.config.checkpoint.initialize_adapters)
        params = _with_stored(session, params, directory, adapters)
        origin["adapters"] = str(adapters.absolute())
    return replace(state, **divided(session.blueprint, params)), {"initialized_from": origin}


def _named(params: PyTree) -> list[tuple[str, Array | None]]:
    """The parameters by name, with None for those that are missing."""
    names = [
        ".".join(map(str, (getattr(key, "key", key) for key in path)))
        for path, _ in jax.tree.leaves_with_path(params, is_leaf=lambda node: node is None)
    ]
    return list(zip(names, jax.tree.leaves(params, is_leaf=lambda node: node is None), strict=True))


def _of_run(
    session: RunSession, directory: Path, tokenizer: str, allowed: Allowance | None = None
) -> tuple[PyTree, int]:
    """The parameters of a run's newest checkpoint, and its step, whatever was trained of them there; with `allowed`
    those are None that may be missing, and are.

    Adapters are not among them, unless those there are as here. A `UserError` where they are others.
    """
    config = session.config
    path = directory / "config.yaml"
    # a family may begin with another's layers
    trained = load(configuration_type([str(path)]), path).resolved()
    if has_model_alone(directory / "checkpoints"):
        # a command that began to train it may have been killed before its first checkpoint
        alone = trained.train.model_copy(update={"trainable": ("*",), "lora": None})
        trained = trained.model_copy(update={"train": alone})
    own, here = trained.train.lora, config.train.lora
    # what is dropped of their inputs in training is no part of them
    if own is not None and (here is None or own.model_copy(update={"dropout": here.dropout}) != here):
        raise UserError(
            f"checkpoint.initialize_from {directory} has adapters (train.lora {format_value(own)}), and "
            f"here train.lora is {format_value(here)}: give the same, to go on with those"
        )
    train = config.train.model_copy(update={name: getattr(trained.train, name) for name in ("trainable", "lora")})
    source = make_session(config.model_copy(update={"train": train}), list(session.mesh.devices.flat))
    with source.use():
        restored = restore_model(source, directory, trained, None, allowed)
    if jax.process_index() == 0:
        print(f"the model is that of step {restored.step} of {directory}")
        if restored.extra.get("tokenizer", tokenizer) != tokenizer:
            print(
                f"data.tokenizer {config.data.tokenizer} is not the one of then: its tokens are other rows of the table"
            )
    with session.use():
        blueprint = session.blueprint if trained.train.lora else without_adapters(session.blueprint)
        specs = source.blueprint.parameters, blueprint.parameters
        found = jax.tree.map(_laid_out, restored.params, *specs, is_leaf=lambda node: node is None)
        return found, restored.step


def _with_stored(session: RunSession, params: PyTree, base: Path, directory: Path) -> PyTree:
    """The parameters with the adapters of a directory that peft saved, for the weights of `base`."""
    config, partitions = session.config, session.trainer.partitions
    if not is_hub(base):
        raise UserError(
            f"checkpoint.initialize_adapters {directory} names tensors of Hugging Face weights, and "
            f"checkpoint.initialize_from {base} is a run: give the weights' directory"
        )
    assert isinstance(config.model, ModelConfig) and config.train.lora is not None
    names = session.blueprint.names
    owners = {name: partition_of(name, partitions) for name, spec in names.items() if spec.role == "adapter"}
    shapes = {
        name: names[name].shape if owner is None else (owner.num_layers, *names[name].shape[1:])
        for name, owner in owners.items()
    }
    arrays = read_adapters(directory, shapes, family_of_hub(base).tensors, config.model, config.train.lora)
    leaves, tree = jax.tree.flatten(params)
    with session.use():
        for place, (name, spec) in enumerate(names.items()):
            if name in arrays:
                owner, sharding = owners[name], NamedSharding(session.mesh, spec.layout.spec)
                value = np.asarray(arrays[name] if owner is None else arrange(owner, arrays[name]))
                pairs = zip(value.shape, spec.layout.padded, strict=True)
                value = np.pad(value, [(0, most - size) for size, most in pairs])
                leaves[place] = jax.make_array_from_callback(value.shape, sharding, value.__getitem__)
    return jax.tree.unflatten(tree, leaves)


def _laid_out(leaf: Array | None, before: ParameterSpec, after: ParameterSpec) -> Array | None:
    """A parameter in the type and the layout that it has where something else is trained."""
    if leaf is None or (before.dtype, before.layout) == (after.dtype, after.layout):
        return leaf

    def run(leaf: Array) -> Array:
        return fit(fit(leaf, before.shape).astype(after.dtype), after.layout.padded)

    return jax.jit(jax.sharding.auto_axes(run, out_sharding=after.layout.spec))(leaf)
