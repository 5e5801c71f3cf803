"""What trained a run: which settings a later command may change, and the run's `history.jsonl`.

Every checkpoint carries the settings of the command that wrote it. A command that would go on from it, or score it, is
compared with those.
"""

import contextlib
import importlib.metadata
import json
import math
import platform
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jax
from pydantic import BaseModel, ValidationError

from jaxtron.command import write_whole
from jaxtron.config import UserError, dump, format_value, gather
from jaxtron.models.decoder.config import ModelConfig
from jaxtron.models.families import DECODER
from jaxtron.models.family import FamilyConfig
from jaxtron.optim.config import OptimizerConfig
from jaxtron.optim.schedule import learning_rate_schedule
from jaxtron.run.configuration import CONFIG_FILE, HISTORY_FILE, Configuration, configuration_type

# fixed: the function, the data or the objective, which one run has once.
# content: names something that decides by itself; the data's and tokenizer's fingerprints and the arrays' shapes tell.
# free: how the run goes on from here; printed and written to the history.
# here: where this very command runs; neither.
FIXED, CONTENT, FREE, HERE = "fixed", "content", "free", "here"
# Settings below a name that is here are as it is.
CHANGES: dict[str, dict[str, str]] = {
    "": {FIXED: "seed", HERE: "devices"},
    # and what else its family's `FamilyConfig` names; the rest is fixed
    "model": {FIXED: "family"},
    "data": {
        FIXED: "sequence_length mask_end_of_document reset_positions reset_attention fill_in_middle chat.too_long "
        "chat.normalize",
        CONTENT: "path format train split samples tokenizer end_of_document validation_fraction chat.template "
        "chat.markers chat.variables chat.roles",
        FREE: "validation test skip chat.max_dropped cache_directory workers processes prefetch",
    },
    "train": {
        FIXED: "trainable lora",
        FREE: "steps global_batch microbatches batch_ramp precision gradient_sums loss_scale.initial "
        "loss_scale.minimum loss_scale.growth loss_scale.backoff loss_scale.window loss_scale.hysteresis "
        "health.on_bad health.gradient_spike health.loss_spike health.window health.patience "
        "health.replay_every health.compare_every "
        "watchdog.factor watchdog.floor_seconds "
        "validate_every validation_batches sample_tokens lora.dropout",
    },
    "optimizer": {
        FIXED: "name",
        CONTENT: "momentum",
        FREE: "learning_rate schedule warmup_steps decay_steps minimum_learning_rate anneal_steps anneal_style beta1 "
        "beta2 epsilon nesterov weight_decay decay_roles clip_norm",
    },
    "mesh": {FREE: "data fsdp tensor pipe context expert expert_tensor order"},
    "context": {FREE: "method inner"},
    "pipeline": {FREE: "schedule chunks stage_layers overlap embedding_weight loss_weight"},
    "sharding": {FREE: "zero overlap_tensor"},
    "checkpoint": {
        FREE: "every keep keep_every keep_best memory_every local_every asynchronous",
        HERE: "memory_directory local_directory resume initialize_from initialize_adapters allow_missing allow_unused",
    },
    "run": {FREE: "log_every print_seconds trackers wandb_project profile_steps", HERE: "directory max_minutes"},
    "runtime": {
        FREE: "connect_seconds heartbeat_seconds xla_preset xla_flags deterministic compilation_cache",
        HERE: "launcher coordinator_address num_processes process_id",
    },
}
KINDS = {
    f"{section}.{name}".removeprefix("."): kind
    for section, kinds in CHANGES.items()
    for kind, names in kinds.items()
    for name in names.split()
}


@dataclass(frozen=True)
class Change:
    """A setting that differs from the recorded one, and whether it may change: a value of `CHANGES`."""

    name: str
    old: Any
    new: Any
    kind: str = FIXED

    def __str__(self) -> str:
        return f"{self.name} {format_value(self.old)} -> {format_value(self.new)}"


def kind_of(name: str, model: type[FamilyConfig] = ModelConfig) -> str:
    """How a setting may change, of models with these settings; one that nobody names is fixed."""
    kinds = KINDS | {f"model.{free}": FREE for free in model.FREE.split()}
    kinds |= {f"model.{content}": CONTENT for content in model.CONTENT.split()}
    while name not in kinds and "." in name:
        name = name.rpartition(".")[0]
    return kinds.get(name, FIXED)


def changes(recorded: Mapping[str, Any], config: Configuration) -> list[Change]:
    """Where a resolved configuration differs from recorded settings, without what concerns this command alone.

    A setting that the record does not know had today's default.
    """
    family = recorded.get("model", {}).get("family", DECODER)
    if family != config.model.family:
        return [Change("model.family", family, config.model.family)]
    found = _differences(recorded, config, type(config)().model_dump(mode="json"))
    meant = _same_meaning(recorded, config)
    known = [replace(change, kind=kind_of(change.name, type(config.model))) for change in found]
    return [change for change in known if change.kind != HERE and change.name not in meant]


def _differences(old: Mapping[str, Any], new: Any, default: Any, prefix: str = "") -> Iterator[Change]:
    """Between a record and settings, or a dict among them."""
    for key, value in (new.model_dump(mode="json") if isinstance(new, BaseModel) else new).items():
        usual = default.get(key) if isinstance(default, dict) else None
        before = old.get(key, usual)
        if isinstance(value, dict) and isinstance(before, dict):
            section = getattr(new, key) if isinstance(new, BaseModel) else value
            if usual is None and isinstance(section, BaseModel):
                # a section that is not there by default has defaults of its own
                usual = type(section).model_construct().model_dump(mode="json")
            yield from _differences(before, section, usual, f"{prefix}{key}.")
        elif before != value:
            yield Change(prefix + key, before, value)


def _same_meaning(recorded: Mapping[str, Any], config: Configuration) -> set[str]:
    """The model's settings that say the same in other words: a default spelled out, cuts for stages."""
    family = config.family
    try:
        old = family.config.model_validate_json(json.dumps(recorded.get("model", {})), strict=True)
    except (ValidationError, UserError):
        return set()
    before, after = (family.meaning(model) for model in (old, config.model))
    return {f"model.{name}" for name, meaning in before.items() if meaning == after[name]}


def recorded_settings(extra: Mapping[str, Any], directory: Path) -> dict[str, Any] | None:
    """The settings that trained a checkpoint: its own, of an older one those of `config.yaml`; None without either."""
    if "settings" in extra:
        return extra["settings"]
    path = directory / CONFIG_FILE
    return gather(configuration_type([str(path)]), path).tree if path.is_file() else None


# in what a checkpoint has beside its arrays: these are a model's alone, and nothing was trained yet
MODEL_ALONE = "model_alone"


def is_model_alone(extra: Mapping[str, Any]) -> bool:
    """Whether a checkpoint is of a model that came from elsewhere, so that all but its model may be chosen yet."""
    return bool(extra.get(MODEL_ALONE))


def check_changes(found: Sequence[Change], what: str) -> None:
    """`UserError` that lists the changes of settings that one run has once; `what` names what was trained."""
    fixed = [change for change in found if change.kind == FIXED]
    if fixed:
        raise UserError(
            f"{what} was trained with other settings: {listed(fixed)}; give the old ones, or choose another "
            "--run.directory"
        )


def listed(found: Sequence[Change]) -> str:
    """The changes in one line."""
    return ", ".join(map(str, found))


@dataclass(frozen=True)
class Continuation:
    """How a command goes on from a checkpoint: what it changes, and the learning rate before and after where it jumps.

    `is_recorded` is False for a checkpoint whose settings nobody wrote down.
    """

    changes: tuple[Change, ...] = ()
    learning_rates: tuple[float, float] | None = None
    is_recorded: bool = True

    @classmethod
    def of(cls, extra: Mapping[str, Any], config: Configuration, directory: Path, *, step: int) -> "Continuation":
        """That of a checkpoint of `step` steps in a directory, whose changes were checked."""
        recorded = recorded_settings(extra, directory)
        if recorded is None:
            return cls(is_recorded=False)
        return cls(tuple(changes(recorded, config)), _learning_rates(recorded, config, step))

    def text(self, step: int, total: int, place: str = "") -> str:
        """Lines for the user: that the run goes on or need not, and with what.

        `place` is where a copy was found that is newer than the checkpoints.
        """
        begin = f"copy of step {step} in {place} found" if place else f"checkpoint of step {step} found"
        if step > total:
            return (
                f"{begin}, beyond train.steps {total}: nothing to train; to go on, give more, such as --train.steps "
                f"{2 * step}"
            )
        if step == total:
            return f"{begin}: complete already"
        lines = [f"{begin}: continuing{' with ' if self.changes else ''}{listed(self.changes)}"]
        if not self.is_recorded:
            lines.append("nobody wrote down what trained it, so nothing but its data and arrays is compared")
        if self.learning_rates is not None:
            old, new = self.learning_rates
            lines.append(f"learning rate of step {step + 1}: {old:.3g} by the earlier settings, {new:.3g} now")
        return "\n".join(lines)


def _learning_rates(recorded: Mapping[str, Any], config: Configuration, step: int) -> tuple[float, float] | None:
    """The learning rate of the update after `step` by the recorded settings and by these, where they differ."""
    try:
        optimizer = OptimizerConfig.model_validate_json(json.dumps(recorded["optimizer"]), strict=True)
        old = learning_rate_schedule(optimizer, recorded["train"]["steps"])
    except (KeyError, TypeError, ValueError):
        return None
    before, after = float(old(step)), float(learning_rate_schedule(config.optimizer, config.train.steps)(step))
    return None if math.isclose(before, after, rel_tol=1e-4) else (before, after)


class Recorder:
    """Writes a line of `history.jsonl` and `config.yaml` after the first step, before anything else of it is kept.

    A command that takes no step leaves the record as it is. `found` are the changes, `first_step` the step before,
    `notes` what was said of the data, `origin` entries on where the model comes from.
    """

    def __init__(
        self,
        directory: Path,
        config: Configuration,
        found: Sequence[Change],
        *,
        first_step: int,
        notes: Sequence[str] = (),
        origin: Mapping[str, Any] | None = None,
    ):
        self._directory, self._config, self._changes, self._step = directory, config, found, first_step
        self._notes = {"data": list(notes)} | dict(origin or {})
        self._is_done = False

    def __call__(self, _info: Any = None) -> None:
        """Write both, the first time."""
        if self._is_done:
            return
        self._is_done = True
        advice = "make room or choose another --run.directory"
        write_record(self._directory, self._config, self._changes, step=self._step, notes=self._notes, advice=advice)


def write_record(
    directory: Path,
    config: Configuration,
    found: Sequence[Change],
    *,
    step: int,
    notes: Mapping[str, Any],
    advice: str,
) -> None:
    """Adds a line to `history.jsonl`, with the notes, and then writes `config.yaml`: where that is, the other is too.

    Each whole or not at all; a `UserError` with the advice where one cannot be.
    """
    path, devices, packages = directory / HISTORY_FILE, jax.devices(), ("jaxtron", "jax", "jaxlib")
    earlier = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    # a line cut short by a kill of an older version stays, on its own
    earlier += "\n" if earlier and not earlier.endswith("\n") else ""
    entry = {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "step": step,
        "changes": {change.name: [change.old, change.new] for change in found},
        **notes,
        "versions": {"python": platform.python_version()} | {name: _version(name) for name in packages},
        "devices": {"kind": devices[0].device_kind, "count": len(devices), "processes": jax.process_count()},
    }
    write_whole(path, earlier + json.dumps(entry) + "\n", advice=advice)
    write_whole(directory / CONFIG_FILE, dump(config), advice=advice)


def write_end(directory: Path, ended: str, step: int, reason: str) -> None:
    """Adds a line to the `history.jsonl` of a run on how a command ended; nothing where there is none, or no room."""
    path = directory / HISTORY_FILE
    if not path.is_file():
        return
    entry = {"time": datetime.now(UTC).isoformat(timespec="seconds"), "step": step, "ended": ended, "reason": reason}
    earlier = path.read_text(encoding="utf-8", errors="replace")
    with contextlib.suppress(UserError):
        # what ended the command is the error to tell
        write_whole(path, earlier + json.dumps(entry) + "\n")


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        # a checkout that is on the path and not installed
        return None
