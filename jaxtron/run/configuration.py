"""The whole configuration of a run: every part's own settings, and what must agree between them."""

import difflib
import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, NoReturn

from pydantic import Field, create_model, model_validator

from jaxtron.checkpoint.config import CheckpointConfig
from jaxtron.config import FILE_ENDINGS, Config, NoEffect, UserError, format_value, read_file
from jaxtron.data.config import DataConfig
from jaxtron.kernels.weight_sums.config import Implementation
from jaxtron.layers.config import AttentionConfig, Fp8Config, LoraConfig
from jaxtron.models.decoder.config import ModelConfig
from jaxtron.models.families import DECODER, family_named, family_of
from jaxtron.models.family import Family
from jaxtron.optim.batch_ramp import batch_size, check_batch_ramp
from jaxtron.optim.config import BatchRampConfig, HealthConfig, LossScaleConfig, OptimizerConfig
from jaxtron.pipeline.config import PipelineConfig
from jaxtron.pipeline.partition import StagePlan, one_stage_plan, stage_plan
from jaxtron.pipeline.schedules.named import SCHEDULES, make_schedule
from jaxtron.pipeline.schedules.schedule import Schedule
from jaxtron.run.run_config import RunConfig, WatchdogConfig
from jaxtron.runtime.config import RuntimeConfig
from jaxtron.sharding.config import ContextConfig, MeshConfig, ShardingConfig
from jaxtron.sharding.folding import BATCH_FLAGS
from jaxtron.words import either

# a thousand times the largest models and batches there are
PARAMETERS_MOST, TOKENS_MOST = 10**15, 10**12
# what a run's directory has of its settings
CONFIG_FILE, HISTORY_FILE, LOCK_FILE = "config.yaml", "history.jsonl", "lock"


class TrainConfig(Config):
    """Steps, batches and precision of the training."""

    steps: int = Field(default=1000, ge=1)
    """Optimizer steps of the run."""
    global_batch: int = Field(default=32, ge=1)
    """Sequences of one step, over all devices."""
    microbatches: int = Field(default=1, ge=1)
    """Parts of each device's share of the batch, run one after the other; gradients are summed."""
    batch_ramp: BatchRampConfig | None = None
    """Growth of the global batch over the first samples (none: whole from the start)."""
    precision: Literal["bf16", "fp16", "fp32"] = "bf16"
    """Of products and activations; master weights, gradients' sums and the optimizer are float32."""
    gradient_sums: Implementation = "auto"
    """What adds the gradients of layers' weights to their sums: mosaic the product that makes them, in float32 (Hopper
    GPUs, bf16 or fp16), xla a sum after a product in the step's precision; auto takes what the devices have."""
    loss_scale: LossScaleConfig = LossScaleConfig()
    """Dynamic loss scale, only with fp16."""
    health: HealthConfig = HealthConfig()
    """What becomes of steps whose loss or gradient is not finite, or a spike."""
    watchdog: WatchdogConfig = WatchdogConfig()
    """When a run that hangs is ended."""
    validate_every: int = Field(default=100, ge=0)
    """Steps between validations; the last step is always validated (0: only then)."""
    validation_batches: int | None = Field(default=16, ge=1)
    """Global batches of a validation, spread over the data (none: all of it)."""
    sample_tokens: int = Field(default=200, ge=0)
    """Tokens generated after training, for a look at what was learned."""
    trainable: tuple[str, ...] = ("*",)
    """Patterns of the parameters that are trained, by the names that `plan --layout` shows, such as head.*; what
    matches one with ! before it is not, as in !embedding.*. The others are frozen, at rest in the step's precision.
    With train.lora adapters are trained, and beside them what patterns name."""
    lora: LoraConfig | None = None
    """Low-rank adapters (none: the model is trained itself)."""

    @model_validator(mode="after")
    def _check(self) -> "TrainConfig":
        if self.precision != "fp16" and self.loss_scale != LossScaleConfig():
            raise NoEffect("train.loss_scale", self.loss_scale, {"train.precision": self.precision})
        if not self.trainable or not all(pattern.removeprefix("!") for pattern in self.trainable):
            raise UserError(
                f"train.trainable {format_value(self.trainable)} has no pattern, or an empty one: leave it out to "
                "train all parameters, or give some of their names as plan --layout shows them"
            )
        if self.lora is not None and all(pattern.startswith("!") for pattern in self.trainable):
            raise UserError(
                f"train.trainable {format_value(self.trainable)} with train.lora trains all but these beside the "
                "adapters: leave it out to train adapters alone, or name what is trained too, as head.*"
            )
        return self

    def check(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """Microbatches of every batch of the run, fewest first; `UserError` where a mesh of these sizes does not split
        the batch."""
        parts = math.prod(sizes[flag] for flag in BATCH_FLAGS) * self.microbatches
        if self.global_batch % parts:
            axes = " x ".join(f"mesh.{flag} {sizes[flag]}" for flag in BATCH_FLAGS)
            raise UserError(
                f"train.global_batch {self.global_batch} is not a multiple of {axes} x train.microbatches "
                f"{self.microbatches} = {parts}"
            )
        microbatch = self.global_batch // self.microbatches
        batches = check_batch_ramp(self.batch_ramp, self.global_batch, microbatch)
        return tuple(batch // microbatch for batch in batches)


# JAX without 64-bit numbers makes a key of the low 32 bits, and NumPy's generator takes no more
MAX_SEED = 2**32 - 1
# schedules with a forward and a backward of a stage at one tick
PAIRING = ("eager_1f1b", "eager_interleaved", "dualpipe_v")


class Configuration(Config):
    """A run: `python -m jaxtron.train CONFIG.yaml [--setting value ...]`."""

    seed: int = Field(default=1234, ge=0, le=MAX_SEED)
    """Of initial weights, the order of the data and dropout: 32 bits."""
    devices: int | None = Field(default=None, ge=1)
    """Simulate this many CPU devices, to try a layout on any machine (none: the machine's own devices)."""
    model: ModelConfig = ModelConfig()
    """The decoder."""
    data: DataConfig = DataConfig()
    """Text, tokenizer and sequences."""
    train: TrainConfig = TrainConfig()
    """Steps, batches, precision."""
    optimizer: OptimizerConfig = OptimizerConfig()
    """Update rule and learning rate."""
    mesh: MeshConfig = MeshConfig()
    """Devices along each axis."""
    context: ContextConfig = ContextConfig()
    """Attention over sequences that mesh.context splits, only where that is above 1."""
    pipeline: PipelineConfig = PipelineConfig()
    """The stages of mesh.pipe, only where that is above 1."""
    sharding: ShardingConfig = ShardingConfig()
    """What the batch axes shard besides the batch."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    """When the state is saved, and resuming."""
    run: RunConfig = RunConfig()
    """The run's directory and its records."""
    runtime: RuntimeConfig = RuntimeConfig()
    """Processes, compiler flags and caches."""

    @model_validator(mode="after")
    def _agree(self) -> "Configuration":
        assert type(self.model) is self.family.config, "`configuration_type` gives the type for other families"
        self.family.resolve(self.model, self.data.sequence_length)
        self._check_sizes()
        # where the axis is filled, `check_mesh` knows more
        self.pipeline.check_effect(self.mesh.pipe)
        self._check_hidden(self.mesh.model_dump())
        self.context.check_effect(self.mesh.context)
        family = {"model.family": self.model.family}
        if (experts := self.family.experts(self.model)) is not None:
            experts.check(self.mesh.expert, self.mesh.expert_tensor)
        else:
            for name in ("expert", "expert_tensor"):
                if (size := getattr(self.mesh, name)) > 1:
                    raise NoEffect(f"mesh.{name}", size, family, f"it has no experts; {self.family.no_experts}")
        if self.train.precision == "fp16" and isinstance(self.model, ModelConfig) and self.model.fp8 != Fp8Config():
            raise UserError(
                f"model.fp8.scaling {self.model.fp8.scaling} with train.precision fp16 scales gradients twice over; "
                "use --train.precision bf16"
            )
        if self.checkpoint.initialize_adapters is not None and self.train.lora is None:
            name, mend = "checkpoint.initialize_adapters", "give --train.lora.rank and what else its file says"
            raise NoEffect(name, self.checkpoint.initialize_adapters, {"train.lora": None}, mend)
        if self.checkpoint.keep_best:
            self._check_best()
        tokens = self.train.sample_tokens
        # by value: a saved configuration names every field
        if not self.family.continues_text and tokens not in (0, TrainConfig().sample_tokens):
            raise NoEffect("train.sample_tokens", tokens, family, "it generates no text; leave it out")
        return self

    def _check_best(self) -> None:
        """`UserError` where checkpoints are written whose validation loss nobody measures."""
        every, validate_every = self.checkpoint.every, self.train.validate_every
        if validate_every == 0 or every % validate_every:
            raise UserError(
                f"checkpoint.keep_best {self.checkpoint.keep_best} wants the validation loss of every checkpoint: "
                f"checkpoint.every {every} must be a multiple of train.validate_every {validate_every}; set "
                f"--train.validate_every {every}"
            )

    def _check_sizes(self) -> None:
        """`UserError` for products whose bytes a 64-bit number cannot count, far beyond every machine."""
        tokens = self.train.global_batch * self.data.sequence_length
        parameters = self.family.num_parameters(self.model, self.data.sequence_length)
        if parameters > PARAMETERS_MOST:
            raise UserError(
                f"{self.family.sizes(self.model)} make {parameters:.2g} parameters, more than the "
                f"{PARAMETERS_MOST:.0e} that can be counted: lower them"
            )
        if tokens > TOKENS_MOST:
            raise UserError(
                f"train.global_batch {self.train.global_batch:,} x data.sequence_length "
                f"{self.data.sequence_length:,} is {tokens:.2g} tokens a step, more than the {TOKENS_MOST:.0e} "
                "that can be counted: lower one"
            )

    @property
    def family(self) -> Family[Any]:
        """What is known of models of model.family."""
        return family_of(self.model)

    def vocabulary_size(self) -> int | None:
        """Tokens that the model knows; None where it reads none."""
        name = self.family.vocabulary
        return None if name is None else getattr(self.model, name)

    def resolved(self) -> "Configuration":
        """The same with defaults that follow from other settings filled in."""
        model = self.family.resolve(self.model, self.data.sequence_length)
        attention = getattr(model, "attention", None)
        if self.runtime.deterministic and isinstance(attention, AttentionConfig):
            model = model.model_copy(update={"attention": attention.model_copy(update={"deterministic": True})})
        return self.model_copy(update={"model": model})

    def train_samples(self) -> int:
        """Samples of the whole run, growing batches included."""
        train, consumed = self.train, 0
        for done in range(train.steps):
            if train.batch_ramp is None or consumed >= train.batch_ramp.samples:
                return consumed + (train.steps - done) * train.global_batch
            consumed += batch_size(train.batch_ramp, train.global_batch, consumed)
        return consumed

    def schedule(self, num_stages: int, num_microbatches: int | None = None) -> Schedule:
        """The pipeline's table for mesh.pipe stages (microbatches: those of the whole batch); a `UserError` if none."""
        count = self.train.microbatches if num_microbatches is None else num_microbatches
        name, chunks = self.pipeline.schedule, self.pipeline.chunks
        if not name.endswith(".csv") and name not in SCHEDULES:
            near = difflib.get_close_matches(name, SCHEDULES, n=1)
            hint = f"did you mean {near[0]}?" if near else f"use one of {', '.join(SCHEDULES)}, or a .csv table"
            raise UserError(f"no pipeline.schedule {name!r}; {hint}")
        try:
            made = make_schedule(name, num_stages, count, chunks, len(self.family.stacks(self.model)))
            return replace(made, overlap=True) if self.pipeline.overlap else made
        except UserError as error:
            if name.endswith(".csv"):
                raise UserError(f"pipeline.schedule: {error}") from None
            sizes = f"mesh.pipe {num_stages}, pipeline.chunks {chunks}"
            if num_microbatches in (None, self.train.microbatches):
                sizes += f", train.microbatches {count}"
            raise UserError(f"pipeline.schedule {name} with {sizes}: {error}") from None

    def stage_plan(self, num_stages: int, num_microbatches: int | None = None) -> StagePlan:
        """Which of the model's layers each stage of mesh.pipe has; a `UserError` where they cannot be shared out.

        The schedule, which says where chunks lie, is that of so many microbatches (none: those of the whole batch).
        """
        layers, pipeline = tuple(self.family.stacks(self.model).values()), self.pipeline
        kinds = self.family.kinds(self.model)
        if num_stages == 1:
            return one_stage_plan(layers).of_kinds(kinds)
        if (cuts := self.family.cuts(self.model)) is not None:
            num_parts = num_stages * pipeline.chunks
            if len(cuts.layers) != num_parts:
                raise UserError(
                    f"{cuts.name} {cuts.value!r} is cut into {len(cuts.layers)} parts, but mesh.pipe {num_stages} x "
                    f"pipeline.chunks {pipeline.chunks} = {num_parts}; change the cuts or one of these"
                )
            pipeline = pipeline.model_copy(update={"stage_layers": cuts.layers})
        schedule = self.schedule(num_stages, num_microbatches)
        found = stage_plan(layers, schedule, pipeline, self.family.leading(self.model)).of_kinds(kinds)
        if pipeline.overlap and num_microbatches in (None, self.train.microbatches):
            self._check_overlap(schedule, found)
        return found

    def _check_overlap(self, schedule: Schedule, stages: StagePlan) -> None:
        """`UserError` where a forward and a backward cannot go through their layers together, or never do."""
        parts = {"mesh.pipe": schedule.num_stages, "pipeline.chunks": self.pipeline.chunks}
        if not any(entry.is_pair for row in schedule.table for entry in row):
            if self.pipeline.schedule in PAIRING:
                choice = {"train.microbatches": self.train.microbatches, "mesh.pipe": schedule.num_stages}
                raise NoEffect("pipeline.overlap", True, choice, "leave it out, or use more microbatches")
            self._refuse_overlap()
        if any(stack.kinds for stack in stages.partitions):
            raise UserError(
                "pipeline.overlap true needs layers that are alike: in a pattern that never repeats each waits for the "
                "choice of its kind; leave it out"
            )
        lengths = sorted({length for part in stages.partitions for length in part.lengths})
        if len(stages.partitions) > 1:
            raise UserError(
                f"pipeline.overlap true needs one stack of layers, and model.family {self.model.family} has "
                f"{len(stages.partitions)}; leave it out"
            )
        if len(lengths) > 1:
            sizes = " x ".join(f"{name} {size}" for name, size in parts.items())
            raise UserError(
                f"pipeline.overlap true needs as many layers in each part of {sizes}, not "
                f"{either(list(map(str, lengths)))}; leave it out, or change model.num_layers or how layers are shared "
                "out (pipeline.stage_layers)"
            )

    def check_mesh(self, sizes: dict[str, int]) -> None:
        """`UserError` where batch, sequence, layers, vocabulary or stages do not fit a mesh of these sizes by flag."""
        counts = self.train.check(sizes)
        self.runtime.check(sizes["tensor"], self.train.microbatches)
        self.check_model(sizes, self.train.microbatches)
        if sizes["pipe"] > 1:
            self._check_schedule(sizes["pipe"], counts)
            self._check_hidden(sizes)

    def _check_hidden(self, sizes: Mapping[str, int]) -> None:
        """`NoEffect` where `pipeline.overlap` hides nothing on a mesh of these sizes by flag (-1: not known yet)."""
        if not self.pipeline.overlap:
            return
        if self.pipeline.schedule in SCHEDULES and self.pipeline.schedule not in PAIRING:
            self._refuse_overlap()
        within = [sizes["fsdp"], sizes["context"], sizes["tensor"], self.mesh.expert, self.mesh.expert_tensor]
        within += [sizes["data"]] if self.sharding.zero == "parameters" else []
        if set(within) == {1}:
            mend = "nothing travels inside of layers; leave it out"
            if self.family.experts(self.model) is None:
                raise NoEffect("pipeline.overlap", True, {"mesh.fsdp": 1, "mesh.context": 1, "mesh.tensor": 1}, mend)
            raise NoEffect("pipeline.overlap", True, {"mesh.expert": 1}, f"{mend}, or set --mesh.expert")

    def _refuse_overlap(self) -> NoReturn:
        """`NoEffect`, for the schedule has no forward and backward of a stage at one tick."""
        choice = {"pipeline.schedule": self.pipeline.schedule}
        raise NoEffect("pipeline.overlap", True, choice, f"leave it out, or use {either(PAIRING)}")

    def check_model(self, sizes: dict[str, int], num_microbatches: int | None = None) -> None:
        """`UserError` where the model, its sequences or its layers do not fit a mesh of these sizes.

        The settings of batches are not looked at; of a pipeline, so many microbatches (none: one a stage).
        """
        self.context.check(sizes, self.data.sequence_length)
        self.family.check(self.model, sizes, self.data.sequence_length, self.context)
        cuts = self.family.cuts(self.model)
        self.pipeline.check(sizes["pipe"], {} if cuts is None else {cuts.name: cuts.value})
        if sizes["pipe"] > 1:
            self.stage_plan(sizes["pipe"], num_microbatches or sizes["pipe"])

    def _check_schedule(self, num_stages: int, microbatches: tuple[int, ...]) -> None:
        """`UserError` unless the schedule runs every number of microbatches."""
        for count in microbatches:
            try:
                self.schedule(num_stages, count)
            except UserError as error:
                if count == self.train.microbatches:
                    raise
                raise UserError(f"train.batch_ramp has batches of {count} microbatches: {error}") from None


def configuration_type(words: Sequence[str]) -> type[Configuration]:
    """The type of the configuration that a command line asks for: its flags or its file name the family of models."""
    flags = [following for word, following in zip(words, [*words[1:], ""], strict=True) if word == "--model.family"]
    flags += [word.partition("=")[2] for word in words if word.startswith("--model.family=")]
    files = [Path(word) for word in words if word.endswith(FILE_ENDINGS) and not word.startswith("-")]
    names = flags or [read_file(path).get("model.family") for path in files if path.is_file()]
    return configuration_of(next((name for name in names if isinstance(name, str) and name), DECODER))


@functools.cache
def configuration_of(family: str) -> type[Configuration]:
    """`Configuration` with the settings of a family's models; a `UserError` where there is no such family."""
    config = family_named(family).config
    if family == DECODER:
        return Configuration
    section = (config, Field(default=config(family=family), description="The model."))
    return create_model(f"{config.__name__}Configuration", __base__=Configuration, model=section)
