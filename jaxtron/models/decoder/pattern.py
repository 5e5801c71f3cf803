"""The pattern language: a decoder as a string, one symbol a residual layer."""

import functools
from dataclasses import dataclass, replace

from jaxtron.config import UserError
from jaxtron.models.decoder.kinds import ATTENTION, KINDS, MAMBA, MLP, MOE

CUT = "|"

# One residual layer: the symbols that read the same normalized input and are added together.
Branch = tuple[str, ...]


@dataclass(frozen=True)
class Pattern:
    """A decoder's layers in order, as a repeated period; before it perhaps others, a few, which are like it."""

    period: tuple[Branch, ...]
    repeats: int
    parts: tuple[int, ...] | None = None
    """Periods between the cuts, leading ones among them; None where the pattern has no `|`."""
    leading: tuple[tuple[Branch, ...], ...] = ()
    """The first periods, where they have an MLP in the place of experts."""

    @property
    def layers(self) -> tuple[Branch, ...]:
        """Every residual layer in order."""
        return sum(self.leading, ()) + self.period * self.repeats

    def count(self, *symbols: str) -> int:
        """How often these symbols occur in the whole decoder."""
        return sum(branch.count(symbol) for branch in self.layers for symbol in symbols)


@functools.cache
def parse(text: str, repeats: int = 1) -> Pattern:
    """The layers of `text` repeated, reduced to their smallest period; bad text is a `UserError` naming the place.

    `*` attention, `W` attention in a window, `-` MLP, `(*-)` both in parallel on one norm (GPT-J, PaLM); `|` cuts the
    layers into pipeline stages, between periods.
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
    pattern = _reduce(layers * repeats)
    return replace(pattern, parts=_parts(text, pattern, [*cuts, len(layers)])) if cuts else pattern


def hybrid_pattern(attention: float, mlp: float, num_layers: int) -> str:
    """Mamba-2 layers with these shares of attention and MLPs, both spread evenly (2406.07887, Appendix A).

    Attention is between runs of other layers that are as long as can be alike; then MLPs take the places of Mamba-2, so
    that the last layer is one. Megatron's `--hybrid-attention-ratio` and `--hybrid-mlp-ratio` make the same pattern.
    """
    attentions, mlps = round(num_layers * attention), round(num_layers * mlp)
    if min(attention, mlp) < 0 or num_layers < 1 or attentions + mlps > num_layers:
        raise UserError(
            f"model.hybrid {attention:g} {mlp:g} {num_layers}: shares of attention and MLPs are 0 or more and "
            "together 1 at most, of one layer or more"
        )
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
    """The pattern with an MLP in the place of its first `count` mixtures of experts; these are whole periods."""
    here = sum(branch.count(MOE.symbol) for branch in pattern.period)
    if count == 0 or here == 0:
        return pattern
    name, most = f"model.moe.leading_dense {count}", here * (pattern.repeats - 1)
    if any(MLP.symbol in branch and MOE.symbol in branch for branch in pattern.period):
        raise UserError(f"{name} puts an MLP in the place of experts, where model.pattern has one in the same group")
    if count % here:
        raise UserError(f"{name} is not a multiple of {here}, the layers with experts in a period of model.pattern")
    if count > most:
        raise UserError(
            f"{name} is more than {most}: a period of model.pattern must be left with its experts; lower it, or add "
            "layers"
        )
    periods = count // here
    dense = tuple(
        tuple(MLP.symbol if symbol == MOE.symbol else symbol for symbol in branch) for branch in pattern.period
    )
    return replace(pattern, repeats=pattern.repeats - periods, leading=(dense,) * periods)


def _parts(text: str, pattern: Pattern, ends: list[int]) -> tuple[int, ...]:
    """Periods of each part, of those that end after so many layers."""
    size = len(pattern.period)
    for number, end in enumerate(ends, 1):
        if end % size:
            names = ("".join(branch) for branch in pattern.period)
            period = "".join(f"({name})" if len(name) > 1 else name for name in names)
            raise UserError(
                f"model.pattern {text!r}: cut {number}, after {end} layers, is not between repeats of its period "
                f"{period!r}; stages are whole periods: move the | or change the layers"
            )
    return tuple((end - start) // size for start, end in zip([0, *ends], ends, strict=False))


def _reduce(layers: list[Branch]) -> Pattern:
    total = len(layers)
    for size in range(1, total + 1):
        if total % size == 0 and layers[:size] * (total // size) == layers:
            return Pattern(tuple(layers[:size]), total // size)
    raise AssertionError("a sequence is its own period")


def _error(text: str, index: int, why: str) -> UserError:
    known = ", ".join(f"{symbol} {kind.name}" for symbol, kind in KINDS.items())
    return UserError(f"model.pattern {text!r}, symbol {index + 1}: {why} (known: {known}, (..) parallel, {CUT} cut)")
