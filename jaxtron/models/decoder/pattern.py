"""The pattern language: a decoder as a string, one symbol a residual layer."""

import functools
import itertools
from collections import Counter
from dataclasses import dataclass, replace
from functools import cached_property

from jaxtron.config import UserError
from jaxtron.models.decoder.kinds import ATTENTION, KINDS, MAMBA, MLP, MOE
from jaxtron.words import plural

CUT = "|"
# a period of more residual layers is not compiled one layer after the other
LONGEST_PERIOD = 16
# of a pattern made by shares; the most periods are as many
MOST_LAYERS = 2**16

# One residual layer: the symbols that read the same normalized input and are added together.
Branch = tuple[str, ...]


@dataclass(frozen=True)
class Pattern:
    """A decoder's layers in order, as a repeated period; before it perhaps others, a few, which are like it.

    A `mixed` one is not worth repeating: its period is all layers, and a loop runs one after the other by their kinds.
    """

    period: tuple[Branch, ...]
    repeats: int
    parts: tuple[int, ...] | None = None
    """Periods between the cuts, leading ones among them, or layers of a mixed one; None where it has no `|`."""
    leading: tuple[tuple[Branch, ...], ...] = ()
    """The first periods, where they have an MLP in the place of experts."""
    mixed: bool = False

    @cached_property
    def layers(self) -> tuple[Branch, ...]:
        """Every residual layer in order."""
        return sum(self.leading, ()) + self.period * self.repeats

    @property
    def looped(self) -> int:
        """What a loop over layers runs one after the other: periods, or layers of a mixed pattern."""
        return len(self.period) if self.mixed else self.repeats

    @cached_property
    def alike(self) -> tuple[tuple[Branch, ...], ...]:
        """What differs among what the loop runs: a period, or of a mixed pattern each kind of layer as it comes."""
        return tuple((branch,) for branch in dict.fromkeys(self.period)) if self.mixed else (self.period,)

    @cached_property
    def kinds(self) -> dict[str, Branch]:
        """Of a mixed pattern what differs among its layers, by name, in the table's order."""
        found = sorted(set(self.period), key=lambda branch: [list(KINDS).index(symbol) for symbol in branch])
        return {layer_name(branch): branch for branch in found} if self.mixed else {}

    def count(self, *symbols: str) -> int:
        """How often these symbols occur in the whole decoder."""
        return sum(self._counts[symbol] for symbol in symbols)

    @cached_property
    def _counts(self) -> Counter[str]:
        return Counter(symbol for branch in self.layers for symbol in branch)


@functools.cache
def parse(text: str, repeats: int = 1) -> Pattern:
    """The layers of `text` repeated, reduced to their smallest period; bad text is a `UserError` naming the place.

    `*` attention, `W` attention in a window, `-` MLP, `(*-)` both in parallel on one norm (GPT-J, PaLM); `|` cuts the
    layers into pipeline stages. Mixed is what never repeats although layers do, or only after many, or is cut elsewhere
    than between periods.
    """
    layers: list[Branch] = []
    cuts: list[int] = []
    index = 0
    while index < len(text):
        if text[index] == CUT:
            if len(layers) == (cuts[-1] if cuts else 0) or index == len(text) - 1:
                raise _error(text, index, "no layers on one side of this cut")
            cuts.append(len(layers))
            index += 1
            continue
        is_group = text[index] == "("
        end = text.find(")", index) if is_group else index + 1
        branch = tuple(text[index + is_group : end])
        if is_group and (end < 0 or len(branch) < 2):
            raise _error(text, index, "a group needs two or more symbols and a closing ')'")
        for place, symbol in enumerate(branch, index + is_group):
            if symbol not in KINDS:
                raise _error(text, place, f"unknown symbol {symbol!r}")
            if symbol in text[index:place]:
                raise _error(text, place, f"{symbol!r} twice in the group {text[index : end + 1]}")
        # each is the layer's one module of that name
        modules = [KINDS[symbol].module for symbol in branch]
        for module in modules:
            if modules.count(module) > 1:
                raise _error(text, index, f"two kinds of {module} in one group")
        layers.append(branch)
        index = end + is_group
    if not layers or repeats < 1:
        raise UserError(
            f"model.pattern {text!r} with model.num_layers {repeats} has no layer; a decoder needs at least one"
        )
    if cuts and repeats > 1:
        raise UserError(
            f"model.pattern {text!r} with | spells out all layers and cannot repeat {repeats} times; set "
            "model.num_layers 1"
        )
    layers *= repeats
    pattern = _reduce(layers)
    size, ends = len(pattern.period), [*cuts, len(layers)]
    never_repeats = pattern.repeats == 1 and len(set(layers)) < len(layers)
    if never_repeats or size > LONGEST_PERIOD or any(end % size for end in ends):
        pattern, size = Pattern(tuple(layers), 1, mixed=True), 1
    parts = tuple((end - start) // size for start, end in itertools.pairwise([0, *ends]))
    return replace(pattern, parts=parts) if cuts else pattern


def layer_name(branch: Branch) -> str:
    """A residual layer's name among the parameters of a mixed pattern."""
    return "_".join(KINDS[symbol].layer or KINDS[symbol].module for symbol in branch)


def layer_kinds(pattern: Pattern) -> tuple[str, ...]:
    """The name of each layer of a mixed pattern; () of others, whose periods are alike."""
    return tuple(map(layer_name, pattern.period)) if pattern.mixed else ()


def hybrid_pattern(attention: float, mlp: float, num_layers: int) -> str:
    """Mamba-2 layers with these shares of attention and MLPs, both spread evenly (2406.07887, Appendix A).

    Attention is between runs of other layers that are as long as can be alike; then MLPs take the places of Mamba-2, so
    that the last layer is one. Megatron's `--hybrid-attention-ratio` and `--hybrid-mlp-ratio` make the same pattern.
    """
    given = f"model.hybrid {attention:g} {mlp:g} {num_layers}"
    if not 1 <= num_layers <= MOST_LAYERS:
        raise UserError(f"{given}: the last is the number of layers, from 1 to {MOST_LAYERS:,}")
    # a large share of many layers is no number to round
    attentions, mlps = (round(num_layers * min(share, 2.0)) for share in (attention, mlp))
    if min(attention, mlp) < 0 or attentions + mlps > num_layers:
        raise UserError(f"{given}: shares of attention and MLPs are 0 or more and together 1 at most")
    for share, count, name in ((attention, attentions, "attention"), (mlp, mlps, "MLPs")):
        if share and not count:
            none = f"{share:g} of {plural(num_layers, 'layer')} is no layer of {name}"
            raise UserError(f"{given}: {none}; raise the share, or set it to 0")
    layers = [MAMBA.symbol] * num_layers
    for symbol, count, before in ((ATTENTION.symbol, attentions, 1), (MLP.symbol, mlps, 0)):
        free = [place for place, other in enumerate(layers) if other == MAMBA.symbol]
        # layers that stay in each run; of attention there is a run before the first and after the last
        run = left = (len(free) - count) / (count + before) if count else 0.0
        for place in free if count else ():
            if left < 0.5:
                layers[place], left = symbol, left + run
            else:
                left -= 1
    return "".join(layers)


def dense_first(pattern: Pattern, count: int) -> Pattern:
    """The pattern with an MLP in the place of its first `count` mixtures of experts, in whole periods where it has."""
    if count == 0:
        return pattern
    here = sum(branch.count(MOE.symbol) for branch in pattern.period)
    if here == 0:
        return pattern
    name, most = f"model.moe.leading_dense {count}", here - 1 if pattern.mixed else here * (pattern.repeats - 1)
    if any(MLP.symbol in branch and MOE.symbol in branch for branch in pattern.period):
        raise UserError(f"{name} puts an MLP in the place of experts, where model.pattern has one in the same group")
    if count % here and not pattern.mixed:
        raise UserError(f"{name} is not a multiple of {here}, the layers with experts in a period of model.pattern")
    if count > most:
        raise UserError(
            f"{name} is more than {most}: {'one layer' if pattern.mixed else 'a period'} of model.pattern must be left "
            "with its experts; lower it, or add layers"
        )
    if pattern.mixed:
        return replace(pattern, period=_dense(pattern.period, count))
    periods = count // here
    return replace(pattern, repeats=pattern.repeats - periods, leading=(_dense(pattern.period, here),) * periods)


def _dense(layers: tuple[Branch, ...], count: int) -> tuple[Branch, ...]:
    """With an MLP in the place of the first `count` mixtures, of which a layer has one at most."""
    found = []
    for branch in layers:
        takes = MOE.symbol in branch and count > 0
        count -= takes
        found.append(tuple(MLP.symbol if takes and symbol == MOE.symbol else symbol for symbol in branch))
    return tuple(found)


def _reduce(layers: list[Branch]) -> Pattern:
    total = len(layers)
    for size in range(1, total + 1):
        if total % size == 0 and layers[:size] * (total // size) == layers:
            return Pattern(tuple(layers[:size]), total // size)
    raise AssertionError("a sequence is its own period")


def _error(text: str, index: int, why: str) -> UserError:
    known = ", ".join(f"{symbol} {kind.name}" for symbol, kind in KINDS.items())
    return UserError(f"model.pattern {text!r}, symbol {index + 1}: {why} (known: {known}, (..) parallel, {CUT} cut)")
