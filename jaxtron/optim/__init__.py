"""From gradients to new parameters: update rules, schedules, clipping, loss scale and batch-size ramp."""

from jaxtron.optim.batch_ramp import BatchRampConfig, batch_size, check_batch_ramp
from jaxtron.optim.config import OptimizerConfig
from jaxtron.optim.loss_scale import LossScale, LossScaleConfig, initial_loss_scale, update_loss_scale
from jaxtron.optim.optimizer import clip_by_global_norm, decay_mask, make_optimizer
from jaxtron.optim.schedule import learning_rate_schedule

__all__ = [
    "BatchRampConfig",
    "LossScale",
    "LossScaleConfig",
    "OptimizerConfig",
    "batch_size",
    "check_batch_ramp",
    "clip_by_global_norm",
    "decay_mask",
    "initial_loss_scale",
    "learning_rate_schedule",
    "make_optimizer",
    "update_loss_scale",
]
