"""A decoder's configuration: its pattern, what its layers are made of, and what must agree between them."""

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar, Literal, NoReturn

from pydantic import Field, model_validator

from jaxtron.config import NoEffect, UserError, format_value
from jaxtron.layers.config import CENTERED, RotaryConfig
from jaxtron.models.decoder.kinds import KINDS, LayerKind
from jaxtron.models.decoder.pattern import Pattern, dense_first, hybrid_pattern, parse
from jaxtron.models.decoder.settings import DecoderSettings
from jaxtron.models.fits import check_multiple
from jaxtron.sharding.config import ContextConfig

if TYPE_CHECKING:
    RecomputeName = str
else:
    # what is checked, and what --help prints, are the regions of the table
    RecomputeName = Literal[
        tuple(dict.fromkeys(name for kind in KINDS.values() for name in (*kind.parts, kind.module)))
    ]


class ModelConfig(DecoderSettings):
    """A decoder-only language model (GPT, Llama, PaLM, BLOOM, Nemotron, ...)."""

    FREE: ClassVar[str] = (
        "attention.implementation attention.deterministic recompute unroll fp8.scaling moe.slots moe.jitter "
        "moe.balance moe.balance_over moe.z_loss moe.capacity_factor moe.drop moe.exchange moe.buckets "
        "moe.implementation mamba.implementation delta.implementation"
    )
    CONTENT: ClassVar[str] = "vocab_multiple"

    recompute: Literal["none", "selective", "all_but_cores", "full"] | tuple[RecomputeName, ...] = "none"
    """Computed again in the backward: none, selective (attention cores that keep scores), all_but_cores (layers without
    attention cores that keep none), full (layers), or a list of names."""
    unroll: int | None = Field(default=None, ge=1)
    """Periods, or layers of a pattern that never repeats, unrolled in each iteration of the loop over them (none: 1).
    """

    @model_validator(mode="after")
    def _of_shares(self) -> "ModelConfig":
        """With the pattern that `hybrid` makes, from here on as if it had been given."""
        if self.hybrid is None:
            return self
        try:
            pattern = hybrid_pattern(*self.hybrid)
        except UserError as error:
            raise ValueError(str(error)) from None
        for name, value in (("pattern", pattern), ("num_layers", 1)):
            # a saved configuration names them too
            if name in self.model_fields_set and getattr(self, name) != value:
                self._refuse(name, "hybrid", f"leave one of them out: hybrid makes it {value}")
            object.__setattr__(self, name, value)
        return self

    @model_validator(mode="after")
    def _agree(self) -> "ModelConfig":
        try:
            _ = self.layout
        except UserError as error:
            raise ValueError(str(error)) from None
        given = self.model_fields_set
        if self.position != "rotary" and "rotary" in given and self.rotary != RotaryConfig():
            self._refuse("rotary", "position")
        if self.position != "rotary" and self.window_rotary is not None:
            self._refuse("window_rotary", "position")
        if self.position != "learned" and self.max_positions is not None:
            self._refuse("max_positions", "position")
        if self.norm not in CENTERED and self.norm_bias:
            self._refuse("norm_bias", "norm")
        if self.branch_norms and all(len(branch) == 1 for branch in self.layout.layers):
            self._refuse("branch_norms", "pattern", "leave it out, or put branches into a group such as (*-)")
        if self.branch_norms and self.norm_placement == "output":
            self._refuse("branch_norms", "norm_placement")
        if self.position in ("rotary", "alibi") and not any(kind.attends for kind in self.kinds):
            self._refuse("position", "pattern", "it has no attention; leave it out")
        self._refuse_ignored_fields()
        self._refuse_ignored_regions()
        if (self.attention.window is not None) != any(kind.attends == "window" for kind in self.kinds):
            windows = " or ".join(kind.symbol for kind in KINDS.values() if kind.attends == "window")
            raise ValueError(
                f"model.attention.window {format_value(self.attention.window)} and model.pattern {self.pattern!r} do "
                f"not agree: layers with a window are {windows}; change one of them"
            )
        for kind in self.kinds:
            kind.validate(self)
        self._check_rotary()
        return self

    def _check_rotary(self) -> None:
        heads = [kind.heads(self) for kind in self.kinds if kind.heads is not None]
        if self.window_rotary is not None and all(one.rotary == "window_rotary" for one in heads):
            self._refuse("window_rotary", "pattern", "all of its attention is in a window: say so by model.rotary")
        for one in heads if self.position == "rotary" else ():
            getattr(self, one.rotary).check(f"model.{one.rotary}", one.rotated)

    def _refuse_ignored_fields(self) -> None:
        """`NoEffect` for what only kinds of layers read that the pattern has not."""
        read = {field for kind in self.kinds for field in kind.fields}
        for field in dict.fromkeys(field for kind in KINDS.values() for field in kind.fields):
            # by value: a saved configuration names every field
            if field not in read and getattr(self, field) != type(self).model_fields[field].default:
                readers = (kind for kind in KINDS.values() if field in kind.fields)
                kinds = " or ".join(f"{kind.name} ({kind.symbol})" for kind in readers)
                self._refuse(field, "pattern", f"leave it out, or add {kinds} to the pattern")

    def _refuse_ignored_regions(self) -> None:
        """`NoEffect` for what `recompute` names that is not there, or is part of something else it names."""
        here = {name for kind in self.kinds for name in kind.regions}
        for name in sorted(self.recomputed - {"layer"} - here):
            self._refuse("recompute", "pattern", f"it has no {name}; leave that out")
        if self.recompute == "all_but_cores" and not self.selective & here:
            self._refuse("recompute", "pattern", "it has no attention; set full")
        for kind in self.kinds:
            inner = sorted(self.recomputed & set(kind.parts))
            if inner and kind.module in self.recomputed:
                raise ValueError(f"model.recompute {inner[0]} has no effect beside {kind.module}, which contains it")

    def _refuse(self, field: str, choice: str, mend: str = "leave it out") -> NoReturn:
        raise NoEffect(f"model.{field}", getattr(self, field), {f"model.{choice}": getattr(self, choice)}, mend)

    def check(self, sizes: Mapping[str, int], length: int, context: ContextConfig) -> None:
        """`UserError` where layers or vocabulary do not fit sequences so long on a mesh of these sizes by flag."""
        for kind in self.kinds:
            kind.check(self, sizes, length, context)
        check_multiple("the padded vocabulary (model.vocab_multiple)", self.padded_vocab, sizes["tensor"])

    @property
    def layout(self) -> Pattern:
        """The parsed pattern."""
        return dense_first(parse(self.pattern, self.num_layers), self.moe.leading_dense)

    @property
    def kinds(self) -> tuple[LayerKind, ...]:
        """The kinds of layers that the pattern has, in the table's order."""
        return tuple(kind for kind in KINDS.values() if self.layout.count(kind.symbol))

    @property
    def is_random(self) -> bool:
        """Whether a step draws random numbers."""
        draws = self.moe.jitter > 0 or (self.moe.capacity_factor is not None and self.moe.drop == "random")
        return self.dropout > 0 or self.attention_dropout > 0 or draws

    @property
    def output_std(self) -> float:
        """Initial standard deviation of projections back to the residual stream (GPT-2, Megatron)."""
        return self.initial_std / math.sqrt(self.num_branches)

    @property
    def num_branches(self) -> int:
        """Summands of the residual stream: two for each transformer layer."""
        return sum(map(len, self.layout.layers))

    @property
    def recomputed(self) -> frozenset[str]:
        """Names of the regions computed again in the backward; `layer` for all of it."""
        if isinstance(self.recompute, tuple):
            return frozenset(self.recompute)
        if self.recompute == "selective":
            return self.selective
        return frozenset() if self.recompute == "none" else frozenset({"layer"})

    @property
    def spared(self) -> frozenset[str]:
        """Regions inside of those that are not computed again, where they keep nothing quadratic in the sequence."""
        return self.selective if self.recompute == "all_but_cores" else frozenset()

    @property
    def selective(self) -> frozenset[str]:
        """Regions that `recompute: selective` names."""
        return frozenset(name for kind in KINDS.values() for name in kind.selective)
