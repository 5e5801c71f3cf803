"""The state that a run begins with: drawn, or with the model of Hugging Face weights or of another run."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding

from jaxtron.config import UserError, format_value, load
from jaxtron.models.adapters import with_adapters, without_adapters
from jaxtron.models.decoder.config import ModelConfig
from jaxtron.pipeline.layer_slots import arrange
from jaxtron.run.beginning import check_beginning
from jaxtron.run.restored import restore_model
from jaxtron.run.session import Session, make_session
from jaxtron.run.state import TrainState, divided
from jaxtron.sharding.parameters import ParameterSpec, fit
from jaxtron.typing import Array, PyTree
from jaxtron.weights.hub import family_of_hub, is_hub
from jaxtron.weights.load import load_parameters, partition_of
from jaxtron.weights.peft import read_adapters


def begin(session: Session, tokenizer: str) -> tuple[TrainState, dict[str, Any]]:
    """The state before the first step, and what the history says of where its model comes from.

    With `checkpoint.initialize_from` the parameters are those of that directory, on this mesh; all else is new.
    `tokenizer` is the fingerprint of the data's.
    """
    name = session.config.checkpoint.initialize_from
    if name is None:
        return session.initial_state(), {}
    directory, model = Path(name), session.config.model
    check_beginning(session.config)
    where = str(directory.absolute())
    if is_hub(directory):
        assert isinstance(model, ModelConfig), "`check_beginning` refuses other families"
        with session.use():
            base = without_adapters(session.blueprint)
            params = load_parameters(directory, model, base, session.trainer.partitions)
        origin: dict[str, Any] = {"weights": where}
    else:
        params, step = _of_run(session, directory, tokenizer)
        origin = {"run": where, "step": step}
    state = session.initial_state()
    params = with_adapters(params, state.model)
    if session.config.checkpoint.initialize_adapters is not None:
        adapters = Path(session.config.checkpoint.initialize_adapters)
        params = _with_stored(session, params, directory, adapters)
        origin["adapters"] = str(adapters.absolute())
    return replace(state, **divided(session.blueprint, params)), {"initialized_from": origin}


def _of_run(session: Session, directory: Path, tokenizer: str) -> tuple[PyTree, int]:
    """The parameters of a run's newest checkpoint, and its step, whatever was trained of them there.

    Adapters are not among them, unless those there are as here. A `UserError` where they are others.
    """
    config = session.config
    trained = load(type(config), directory / "config.yaml").resolved()
    if trained.train.lora not in (None, config.train.lora):
        raise UserError(
            f"checkpoint.initialize_from {directory} has adapters (train.lora {format_value(trained.train.lora)}), and "
            f"here train.lora is {format_value(config.train.lora)}: give the same, to go on with those"
        )
    train = config.train.model_copy(update={name: getattr(trained.train, name) for name in ("trainable", "lora")})
    source = make_session(config.model_copy(update={"train": train}), list(session.mesh.devices.flat))
    with source.use():
        restored = restore_model(source, directory, trained, None)
    if jax.process_index() == 0:
        print(f"the model is that of step {restored.step} of {directory}")
        if restored.extra.get("tokenizer", tokenizer) != tokenizer:
            print(
                f"data.tokenizer {config.data.tokenizer} is not the one of then: its tokens are other rows of the table"
            )
    with session.use():
        blueprint = session.blueprint if trained.train.lora else without_adapters(session.blueprint)
        specs = source.blueprint.parameters, blueprint.parameters
        return jax.tree.map(_laid_out, restored.params, *specs), restored.step


def _with_stored(session: Session, params: PyTree, base: Path, directory: Path) -> PyTree:
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


def _laid_out(leaf: Array, before: ParameterSpec, after: ParameterSpec) -> Array:
    """A parameter in the type and the layout that it has where something else is trained."""
    if (before.dtype, before.layout) == (after.dtype, after.layout):
        return leaf

    def run(leaf: Array) -> Array:
        return fit(fit(leaf, before.shape).astype(after.dtype), after.layout.padded)

    return jax.jit(jax.sharding.auto_axes(run, out_sharding=after.layout.spec))(leaf)
