"""From gradients to new parameters: update rules, schedules, clipping, loss scale and batch-size ramp."""
