"""The state that a run begins with: drawn, or with the model of Hugging Face weights or of another run."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import jax

from jaxtron.config import UserError, format_value, load
from jaxtron.models.adapters import with_adapters, without_adapters
from jaxtron.models.decoder.config import ModelConfig
from jaxtron.run.beginning import check_beginning
from jaxtron.run.restored import restore_model
from jaxtron.run.session import Session, make_session
from jaxtron.run.state import TrainState, divided
from jaxtron.sharding.parameters import ParameterSpec, fit
from jaxtron.typing import Array, PyTree
from jaxtron.weights.hub import is_hub
from jaxtron.weights.load import load_parameters


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


def _laid_out(leaf: Array, before: ParameterSpec, after: ParameterSpec) -> Array:
    """A parameter in the type and the layout that it has where something else is trained."""
    if (before.dtype, before.layout) == (after.dtype, after.layout):
        return leaf

    def run(leaf: Array) -> Array:
        return fit(fit(leaf, before.shape).astype(after.dtype), after.layout.padded)

    return jax.jit(jax.sharding.auto_axes(run, out_sharding=after.layout.spec))(leaf)
