"""A model's parameters by name and shape, as one device would have them, whatever its run asks of devices."""

import json
from typing import Any

import jax

from jaxtron.run.configuration import Configuration
from jaxtron.run.session import RunSession, make_session
from jaxtron.runtime.start import start_compiler


def bare_session(config: Configuration) -> RunSession:
    """A session on one CPU device that nothing is run in; it starts JAX, so call it once."""
    start_compiler(config.runtime)
    kept = {name: getattr(config, name) for name in ("seed", "data", "train")}
    # a checkpoint's arrays are the same on every mesh
    bare = type(config)(**kept, model=bare_model(config.model))
    return make_session(bare, jax.devices()[:1], trains=False)


def bare_model(model: Any) -> Any:
    """The model with the defaults of all that is how it runs, such as kernels that this machine may lack."""
    tree = model.model_dump(mode="json")
    for name in model.FREE.split():
        *folders, last = name.split(".")
        node = tree
        for folder in folders:
            node = node[folder]
        node.pop(last, None)
    return type(model).model_validate_json(json.dumps(tree), strict=True)
