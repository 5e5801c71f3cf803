"""The state that a command would go on with, in the model's order: what a checkpoint holds, whatever mesh wrote it."""

from pathlib import Path

import jax
import numpy as np

from jaxtron.config import load
from jaxtron.run.configuration import Configuration
from jaxtron.train.setup import open_run
from jaxtron.typing import PyTree
from tests.support.command_runs import small


def values(folder: Path, *flags: str, save: bool = False) -> tuple[int, dict[str, np.ndarray], int]:
    """Step, state in the model's order and number of parameters of the run that continues in the folder.

    `save` saves the state again, as the next step's.
    """
    folder.mkdir(exist_ok=True)
    config = load(Configuration, None, [*small(folder), *flags])
    with open_run(config, "run") as opened:
        for leaf, wanted in zip(
            jax.tree.leaves(opened.state), jax.tree.leaves(opened.session.trainer.abstract_state()), strict=True
        ):
            assert leaf.shape == wanted.shape
            assert wanted.sharding is None or leaf.sharding.spec == wanted.sharding.spec
        if save:
            opened.save(opened.step + 1, opened.state, opened.position, opened.tally)
        state = opened.session.layer_order.in_model_order(opened.state)
        return opened.step, by_name(state), opened.session.trainer.blueprint.num_parameters


def by_name(tree: PyTree) -> dict[str, np.ndarray]:
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in jax.tree.leaves_with_path(tree)}


def assert_same(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert found.keys() == expected.keys()
    different = [name for name in expected if found[name].tobytes() != expected[name].tobytes()]
    assert not different
