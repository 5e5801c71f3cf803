"""The model of a run, restored on any mesh, without the optimizer's state."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax

from jaxtron.checkpoint import record as records
from jaxtron.checkpoint.finite import first_not_finite
from jaxtron.checkpoint.names import Signature
from jaxtron.checkpoint.partly import Allowance
from jaxtron.checkpoint.restore import committed_steps, restore_part, step_path
from jaxtron.config import UserError
from jaxtron.data.dataset import open_data
from jaxtron.data.tokenizers import Tokenizer, load_tokenizer
from jaxtron.run.configuration import Configuration
from jaxtron.run.history import CONFIG_FILE, FIXED, changes, is_model_alone, listed, recorded_settings
from jaxtron.run.session import RunSession
from jaxtron.run.sizes import check_state_fits
from jaxtron.run.state import divided, merged
from jaxtron.typing import PyTree


@dataclass(frozen=True)
class RestoredModel:
    """The parameters of a checkpoint of a run, and what was saved beside them."""

    params: PyTree
    step: int
    checkpoints: Path
    extra: dict[str, Any]


def restore_model(
    session: RunSession, run: Path, trained: Configuration, step: int | None, allowed: Allowance | None = None
) -> RestoredModel:
    """The parameters of a run's checkpoint (`step` none: the newest) on a session's mesh, inside its `use()`.

    `trained` is the run's `config.yaml`. A `UserError` where there are none, of another model, or not finite. With
    `allowed` those are None that may be missing, and are.
    """
    order, abstract = session.layer_order, divided(session.blueprint, session.blueprint.abstract)
    check_state_fits(session.config.family.sizes(session.config.model), abstract, what="parameters")
    checkpoints = (run / "checkpoints").absolute()
    check = partial(check_trained_settings, trained=trained, path=run / CONFIG_FILE)
    restored = restore_part(
        checkpoints,
        order.abstract(abstract),
        step=step,
        check=check,
        on_disk=order.on_disk(abstract),
        choose=None if allowed is None else partial(_shared, allowed, run),
    )
    there = jax.tree.map(
        lambda like, leaf: None if leaf is None else like, abstract, restored.state, is_leaf=lambda node: node is None
    )
    state = order.in_stage_order(restored.state, there)
    name = first_not_finite(state)
    if name is not None:
        raise diverged(checkpoints, restored.step, f"{name} has numbers that are not finite")
    return RestoredModel(merged(state), restored.step, checkpoints, restored.extra)


def tokenizer_of(trained: Configuration, config: Configuration, extra: dict[str, Any]) -> Tokenizer:
    """The tokenizer of the training, of whose checkpoint `extra` is; one of characters has its letters from the data.

    `config` may name another. A `UserError` where it is not that of then, or has more tokens than the model.
    """
    tokenizer = load_tokenizer(config.data.tokenizer, end_of_document=config.data.end_of_document)
    if tokenizer is None and "data" not in extra:
        raise UserError(f"data.tokenizer {config.data.tokenizer} is made of the data of a training; give another")
    if tokenizer is None:
        data = open_data(trained.data, seed=trained.seed)
        if data.fingerprint != extra["data"]:
            raise UserError(
                "the data of the training has changed, and with it the vocabulary of its characters: bring back "
                f"data.path {trained.data.path}"
            )
        tokenizer = data.tokenizer
    same_settings = all(
        getattr(config.data, name) == getattr(trained.data, name) for name in ("tokenizer", "end_of_document")
    )
    if same_settings and extra.get("tokenizer", tokenizer.fingerprint) != tokenizer.fingerprint:
        raise UserError(
            f"data.tokenizer {config.data.tokenizer} has changed since the training; bring back the file of then, or "
            "give it with --data.tokenizer"
        )
    check_vocabulary(tokenizer, config)
    return tokenizer


def check_vocabulary(tokenizer: Tokenizer, config: Configuration) -> None:
    """`UserError` where a tokenizer has tokens that the model does not know."""
    known = config.vocabulary_size()
    if known is not None and tokenizer.vocab_size > known:
        raise UserError(
            f"the tokenizer {config.data.tokenizer} has {tokenizer.vocab_size} tokens, more than the model's "
            f"{known}; give the training's with --data.tokenizer"
        )


def _shared(allowed: Allowance, run: Path, there: Signature, here: Signature) -> set[str]:
    """Names of what is in both; `UserError` for what is not and may not be."""
    missing, unused = (
        [name.partition(".")[2] for name in one if name not in other] for one, other in ((here, there), (there, here))
    )
    allowed.check(run, missing, unused, [name.partition(".")[2] for name in here])
    return here.keys() & there.keys()


def check_trained_settings(extra: dict[str, Any], trained: Configuration, path: Path) -> None:
    """`UserError` unless the run's `config.yaml` says what the checkpoint was trained with."""
    recorded = recorded_settings(extra, path.parent)
    found = [] if recorded is None else [change for change in changes(recorded, trained) if change.kind == FIXED]
    if is_model_alone(extra):
        # all else was never used
        found = [change for change in found if change.name.startswith("model.")]
    if found:
        raise UserError(
            f"{path} was changed since the checkpoint was trained: {listed(found)}; put the old values back there"
        )


def has_model_alone(checkpoints: Path) -> bool:
    """Whether the newest checkpoint of a directory is of a model that came from elsewhere, and not trained yet."""
    steps = committed_steps(checkpoints)
    if not steps:
        return False
    try:
        return is_model_alone(records.read(step_path(checkpoints, steps[-1])).extra)
    except records.DamageError:
        # told where it is read
        return False


def diverged(checkpoints: Path, step: int, what: str) -> UserError:
    """The error for a checkpoint that is of no use, which names the one before it."""
    earlier = [found for found in committed_steps(checkpoints) if found < step]
    way = f"go back to the one before with --step {earlier[-1]}" if earlier else "there is no earlier one, train again"
    return UserError(f"the checkpoint of step {step} in {checkpoints} has diverged, {what}; {way}")
