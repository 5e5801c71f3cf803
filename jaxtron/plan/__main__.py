"""`python -m jaxtron.plan --layout [CONFIG.yaml] [--setting value ...]`: what lies where, before anything runs."""

import sys

import jax

from jaxtron.command import configure, run_command
from jaxtron.config import UserError
from jaxtron.plan import layout
from jaxtron.sharding import build_mesh, make_rules, use
from jaxtron.train.config import Configuration
from jaxtron.train.runtime import start_runtime
from jaxtron.train.setup import make_trainer

PURPOSE = "Show every parameter's layout (--layout): shape, logical axes, spec, bytes a device, replicas."


def main(argv: list[str]) -> int:
    """Prints the layout of the configuration's parameters on its mesh."""
    wants_layout = "--layout" in argv
    config = configure(
        Configuration,
        [word for word in argv if word != "--layout"],
        program="python -m jaxtron.plan --layout",
        purpose=PURPOSE,
    )
    if config is None:
        return 0
    if not wants_layout:
        raise UserError("say what to show: python -m jaxtron.plan --layout CONFIG.yaml [--setting value ...]")
    start_runtime(config.runtime, devices=config.devices)
    config = config.resolved()
    devices = jax.devices()
    config.check_mesh(config.mesh.shape(len(devices)))
    with use(make_rules(build_mesh(config.mesh, devices), config.sharding)):
        print(layout.text(make_trainer(config).blueprint))
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
