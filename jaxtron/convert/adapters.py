"""The adapters of a run as peft's files."""

import jax
import numpy as np

from jaxtron.checkpoint.restore import restore_part
from jaxtron.convert.adapters_request import AdaptersRequest
from jaxtron.convert.target import whole_directory
from jaxtron.models.decoder.config import ModelConfig
from jaxtron.pipeline.config import PipelineConfig
from jaxtron.run.configuration import Configuration
from jaxtron.run.session import make_session
from jaxtron.runtime.start import start_runtime
from jaxtron.sharding.config import ContextConfig, MeshConfig, ShardingConfig
from jaxtron.weights.hub import family_of_hub
from jaxtron.weights.peft import write_adapters


def export_adapters(request: AdaptersRequest, trained: Configuration) -> None:
    """Writes adapter_config.json and adapter_model.safetensors of a run's checkpoint, which is read on one device.

    Only what was trained is read: the frozen model may be larger than there is room for here.
    """
    start_runtime(trained.runtime, devices=None)
    alone = {"mesh": MeshConfig(data=1), "pipeline": PipelineConfig(), "context": ContextConfig()}
    session = make_session(
        trained.model_copy(update=alone | {"sharding": ShardingConfig()}), jax.devices()[:1], trains=False
    )
    model, lora = trained.model, trained.train.lora
    assert isinstance(model, ModelConfig) and lora is not None
    with session.use():
        order, abstract = session.layer_order, {"params": session.abstract_state().params}
        checkpoints = (request.run / "checkpoints").absolute()
        on_disk = order.on_disk(abstract)
        restored = restore_part(checkpoints, order.abstract(abstract), step=request.step, on_disk=on_disk)
        params = restored.state["params"]
    roles = jax.tree.map(lambda spec: spec.role, session.blueprint.trained)
    arrays = {
        ".".join(str(getattr(key, "key", key)) for key in path): np.asarray(leaf)
        for (path, leaf), role in zip(jax.tree.leaves_with_path(params), jax.tree.leaves(roles), strict=True)
        if role == "adapter"
    }
    with whole_directory("--output", request.output) as made:
        write_adapters(made, arrays, family_of_hub(request.base).tensors, model, lora, str(request.base))
    print(f"{request.output}: {len(arrays) // 2} kinds of layers of step {restored.step} of {request.run}")
