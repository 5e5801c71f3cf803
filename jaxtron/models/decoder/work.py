"""What a decoder takes of a device: work of each kind of layer by symbol, of a period of its pattern, of its ends."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

from jaxtron.kernels.grouped_matmul.config import tiled_rows
from jaxtron.layers.config import GATED
from jaxtron.models.decoder.config import ModelConfig
from jaxtron.models.decoder.cost import (
    embedding_parameters,
    layers_expert_parameters,
    layers_parameters,
    leading_parameters,
    table_parameters,
)
from jaxtron.models.decoder.kinds import (
    ATTENTION,
    DELTA,
    KINDS,
    LATENT,
    MAMBA,
    MAMBA1,
    MLP,
    MOE,
    WINDOW,
    LayerKind,
    expert_width,
    local_kv_heads,
)
from jaxtron.models.decoder.pattern import Branch
from jaxtron.models.decoder.state_space import (
    delta_key_heads,
    mamba1_channels,
    mamba1_rank,
    mamba2_groups,
    mamba2_heads,
)
from jaxtron.models.work.attention import (
    AttentionShapes,
    core,
    core_temporaries,
    latent_projections,
    projections,
)
from jaxtron.models.work.blocks import (
    added_up,
    eight_bits,
    embedding,
    mlp,
    mlp_temporaries,
    norm,
    put_together,
    residual,
    sent_as_bytes,
    token_head,
)
from jaxtron.models.work.experts import ExpertShapes, expert_rows, expert_temporaries, experts
from jaxtron.models.work.model import ModelWork, StackWork
from jaxtron.models.work.operations import PhaseWork, SlotWork
from jaxtron.models.work.shapes import Shapes, gather, gathered_weights
from jaxtron.models.work.ssm import (
    DeltaShapes,
    ScanShapes,
    SelectiveShapes,
    delta_mixer,
    delta_temporaries,
    mixer,
    mixer_temporaries,
    selective_mixer,
    selective_temporaries,
)

# by the regions of a kind of layer: of the whole branch and, apart from it, of the parts that can be recomputed alone
RegionWork = dict[str, SlotWork]


@dataclass(frozen=True)
class LayerWork:
    """One kind of residual branch, without its norm and the sum that ends it."""

    slots: Callable[[ModelConfig, Shapes], RegionWork]
    """Operations by the regions that `model.recompute` can name; what lies in a part is not counted in the whole."""
    temporaries: Callable[[ModelConfig, Shapes], float] = lambda model, shapes: 0.0
    """Bytes that one layer's backward needs beside what was kept; of kinds of one `module` those with most count."""
    beside: Callable[[ModelConfig, Shapes], float] = lambda model, shapes: 0.0
    """Bytes that its forward needs beside a backward; likewise."""
    gathers: bool = True
    """Whether it reads the whole sequence, and not a device's part of it along `tensor`."""
    scatters: bool = True
    """Whether it leaves partial sums along `tensor`."""
    transposed: Callable[[ModelConfig, Shapes, bool], int] = lambda model, shapes, in_loop: 0
    """Bytes of one row that a loop over layers keeps a second time, transposed; the last: whether it has several."""
    exchanged: Callable[[ModelConfig, Shapes], tuple[float, ...]] = lambda model, shapes: ()
    """Bytes of the arrays that devices with experts send each other in it."""
    kept: Callable[[ModelConfig, Shapes], float] = lambda model, shapes: 0.0
    """Bytes that it keeps of experts' rows, which depend on how many devices share them."""


def decoder_work(model: ModelConfig, shapes: Shapes) -> ModelWork:
    """One stack, whose layers are periods of the pattern, or of several kinds."""
    tables = embedding_parameters(model, shapes.length, shapes.tensor)
    leading = leading_parameters(model, shapes.tensor)
    vocab, hidden = model.padded_vocab / shapes.tensor, model.hidden_size
    passes = 2 + model.embedding_norm + (model.position == "learned")
    first, *others = (_alike(model, shapes, layers) for layers in model.layout.alike)
    enter = embedding(shapes, hidden, tables, passes=passes, dropout=model.dropout > 0) + _leading(model, shapes)
    return ModelWork(
        stacks=(replace(first, enter=enter), *others),
        head=token_head(shapes, hidden, vocab),
        outer_parameters=table_parameters(model, shapes.length, shapes.tensor) + leading,
        stream=shapes.stream_bytes(hidden),
        head_matrix=vocab * hidden,
        logits=shapes.tokens * vocab,
        exchanged=tuple(
            size
            for branch in model.layout.period
            for symbol in branch
            for size in LAYER_WORK[symbol].exchanged(model, shapes)
        ),
    )


def _alike(model: ModelConfig, shapes: Shapes, layers: tuple[Branch, ...]) -> StackWork:
    """What a loop over layers runs in one iteration, recomputation in the backward."""
    all_experts = layers_expert_parameters(model, layers)
    dense = layers_parameters(model, layers, shapes.tensor) - all_experts
    experts = all_experts / (shapes.sizes["expert"] * shapes.sizes["expert_tensor"])
    return StackWork(
        layer=_layers(model, shapes, layers) + gathered_weights(shapes, dense, experts),
        parameters=dense,
        expert_parameters=experts,
        expert_kept=sum(
            LAYER_WORK[symbol].kept(model, shapes)
            for branch in layers
            for symbol in branch
            if not {"layer", KINDS[symbol].module} & model.recomputed
        ),
        temporaries=_most(model, shapes, layers, lambda work: work.temporaries),
        beside=_most(model, shapes, layers, lambda work: work.beside),
        transposed=_transposed(model, shapes, layers, in_loop=False),
        transposed_in_loop=_transposed(model, shapes, layers, in_loop=True),
        recomputed=model.recomputed,
    )


def _leading(model: ModelConfig, shapes: Shapes) -> SlotWork:
    """Periods that lead the others: part of what enters the stack, their forward runs again in its backward."""
    found = SlotWork()
    for layers in model.layout.leading:
        found += _layers(model, shapes, layers)
        found += SlotWork(backward=_layers(model, shapes, layers).forward)
    return found + gathered_weights(shapes, leading_parameters(model, shapes.tensor))


def _layers(model: ModelConfig, shapes: Shapes, layers: tuple[Branch, ...]) -> SlotWork:
    """Some residual layers, recomputation in the backward."""
    found = again = SlotWork()
    # what keeps scores drops them, and runs again
    spared = model.spared if shapes.profile.attention == "fused" else frozenset()
    for branch in layers:
        found += _branch(model, shapes, branch)
        again += _branch(model, shapes, branch, without=spared)
    return found + SlotWork(backward=again.forward) if "layer" in model.recomputed else found


def _branch(model: ModelConfig, shapes: Shapes, branch: Branch, *, without: frozenset[str] = frozenset()) -> SlotWork:
    """One residual layer: a norm, what reads it, and the residual sum of each; `without` are regions left out."""
    found = _norms(model, shapes, branch)
    for symbol in branch:
        slots, kind = LAYER_WORK[symbol].slots(model, shapes), KINDS[symbol]
        regions = {name: work for name, work in slots.items() if name not in without}
        if _is_of_eight_bits(model, kind):
            regions = {**regions, kind.module: eight_bits(shapes, model.hidden_size, regions[kind.module])}
        found += _recomputed(model, shapes, kind, regions)
        found += residual(shapes, model.hidden_size, dropout=model.dropout > 0, scattered=LAYER_WORK[symbol].scatters)
    return sent_as_bytes(found) if all(_is_of_eight_bits(model, KINDS[symbol]) for symbol in branch) else found


def _norms(model: ModelConfig, shapes: Shapes, branch: Branch) -> SlotWork:
    """Norms of what branches read, and what of it is put together; norms of what they make."""
    gathers = [LAYER_WORK[symbol].gathers for symbol in branch]
    reads = gathers if model.branch_norms else [any(gathers)]
    if model.norm_placement == "output":
        found = put_together(shapes, model.hidden_size) if any(gathers) else SlotWork()
    else:
        found = SlotWork()
        for gathered in reads:
            found += norm(shapes, model.hidden_size, gathered=gathered)
    for _ in branch if model.norm_placement != "input" else ():
        found += norm(shapes, model.hidden_size, gathered=False)
    return found


def _is_of_eight_bits(model: ModelConfig, kind: LayerKind) -> bool:
    """Whether projections of such layers are counted as products of 8-bit numbers: those with scales of blocks, whose
    kernel was never timed, as wide ones."""
    return model.fp8.scaling == "current" and "fp8" in kind.fields


def _recomputed(model: ModelConfig, shapes: Shapes, kind: LayerKind, regions: RegionWork) -> SlotWork:
    """A branch with the forward of what `model.recompute` names of it in its backward too."""
    found = sum(regions.values(), start=SlotWork())
    if kind.module in model.recomputed:
        size = shapes.stream_bytes(model.hidden_size)
        gathered = gather(shapes, size) if LAYER_WORK[kind.symbol].gathers else ()
        return found + SlotWork(backward=found.forward + PhaseWork(collectives=gathered))
    # what keeps no scores is not run again for their sake
    has_scores = model.recompute != "selective" or shapes.profile.attention != "fused"
    for name in kind.parts:
        if name in model.recomputed and (has_scores or name not in kind.selective):
            found += SlotWork(backward=regions[name].forward)
    return found


def _most(
    model: ModelConfig,
    shapes: Shapes,
    layers: tuple[Branch, ...],
    of: Callable[[LayerWork], Callable[[ModelConfig, Shapes], float]],
) -> float:
    """Bytes that layers need: of all modules that a layer can have, each the most of its kinds."""
    modules: dict[str, float] = {}
    # layers that lead a pattern have further kinds
    here = {symbol for branch in layers for symbol in branch}
    for kind in [kind for kind in model.kinds if kind.symbol in here] if model.layout.mixed else model.kinds:
        needed = of(LAYER_WORK[kind.symbol])(model, shapes)
        modules[kind.module] = max(modules.get(kind.module, 0.0), needed)
    return sum(modules.values())


def _transposed(model: ModelConfig, shapes: Shapes, layers: tuple[Branch, ...], *, in_loop: bool) -> int:
    """Bytes of one row of these layers that a loop over layers keeps a second time; one over kinds transposes nothing,
    for each branch reads its own layer."""
    if "layer" in model.recomputed or model.layout.mixed:
        return 0
    kept = (symbol for branch in layers for symbol in branch if KINDS[symbol].module not in model.recomputed)
    return sum(LAYER_WORK[symbol].transposed(model, shapes, in_loop) for symbol in kept)


def _attention_layer(model: ModelConfig, shapes: Shapes, *, in_window: bool = False) -> AttentionShapes:
    return AttentionShapes(
        hidden=model.hidden_size,
        heads=model.num_heads / shapes.tensor,
        # all of them where they do not split
        kv_heads=local_kv_heads(model, shapes.tensor),
        head_size=model.head_size,
        value_size=model.head_size,
        window=model.attention.window or shapes.length if in_window else None,
        rotary=model.position == "rotary",
        bias=model.has_qkv_bias,
        output_bias=model.has_attention_output_bias,
        gate=model.attention.output_gate,
        dropout=model.attention_dropout > 0,
    )


def _attention(model: ModelConfig, shapes: Shapes, *, in_window: bool = False) -> RegionWork:
    layer = _attention_layer(model, shapes, in_window=in_window)
    return {"attention": projections(shapes, layer), "attention_core": core(shapes, layer)}


def _scores(model: ModelConfig, shapes: Shapes) -> float:
    return core_temporaries(shapes, _attention_layer(model, shapes))


def _latent_layer(model: ModelConfig, shapes: Shapes) -> AttentionShapes:
    layer, latent = _attention_layer(model, shapes), model.latent
    of_latents = {"bias": model.bias, "output_bias": model.bias, "gate": False}
    return replace(layer, kv_heads=layer.heads, head_size=latent.key_dim, value_size=latent.v_head_dim, **of_latents)


def _latent(model: ModelConfig, shapes: Shapes) -> RegionWork:
    layer, latent = _latent_layer(model, shapes), model.latent
    widths = (latent.kv_lora_rank, latent.qk_rope_head_dim)
    return {
        "attention": latent_projections(shapes, layer, latent.q_lora_rank, *widths),
        "attention_core": core(shapes, layer),
    }


def _latent_scores(model: ModelConfig, shapes: Shapes) -> float:
    return core_temporaries(shapes, _latent_layer(model, shapes))


def _mlp(model: ModelConfig, shapes: Shapes) -> RegionWork:
    is_gated = model.activation in GATED
    return {"mlp": mlp(shapes, model.hidden_size, _mlp_width(model, shapes), gated=is_gated, bias=model.has_mlp_bias)}


def _mlp_temporaries(model: ModelConfig, shapes: Shapes) -> float:
    return mlp_temporaries(shapes, model.hidden_size, _mlp_width(model, shapes))


def _mlp_width(model: ModelConfig, shapes: Shapes) -> float:
    return model.mlp_width / shapes.tensor


def _expert_layer(model: ModelConfig, shapes: Shapes) -> ExpertShapes:
    """Rows are those of layers/moe/sizes.py; an implementation that has no empty ones sends what was chosen."""
    moe, tokens = model.moe, shapes.own_tokens
    parts, widths = shapes.sizes["expert"], shapes.sizes["expert_tensor"]
    own, grouped, gathers, has_rounds = moe.num_experts // parts, False, False, True
    sent = pairs = tokens * moe.top_k
    multiplied = pairs * widths
    if shapes.profile.expert_rows == "round":
        gathers = moe.exchange == "all_gather"
        room = None if moe.capacity_factor is None else round(shapes.rows) * moe.capacity(shapes.length)
        some = round(tokens) * (parts * widths if gathers else 1)
        moe = moe.with_buckets(some, parts, widths, room, has_kernel=shapes.grouped_products)
        grouped, (rows, pairs, has_rounds) = moe.buckets == "device", moe.round_of(some, parts, room)
        multiplied = moe.multiplied(some, parts, widths, room)
        buckets = moe.num_buckets(parts)
        sent, pairs = rows * buckets, pairs * buckets
    came, held = (size * (1 if gathers else widths) for size in (sent, pairs))
    return ExpertShapes(
        hidden=model.hidden_size,
        num_experts=moe.num_experts,
        top_k=moe.top_k,
        sent=sent,
        came=came,
        held=tiled_rows(round(held), own) if grouped else held,
        multiplied=multiplied,
        own=own,
        width=expert_width(model) / widths,
        inputs=2 if model.activation in GATED else 1,
        has_rounds=has_rounds,
        gathers=gathers,
        grouped=grouped,
        bias=model.expert_bias,
    )


def _moe(model: ModelConfig, shapes: Shapes) -> RegionWork:
    """Router and experts, and the MLP that all tokens go through."""
    found, hidden, shared = experts(shapes, _expert_layer(model, shapes)), model.hidden_size, model.moe.shared_size
    if shared:
        found += put_together(shapes, hidden) + added_up(shapes, hidden)
        found += mlp(shapes, hidden, shared / shapes.tensor, gated=model.activation in GATED, bias=model.expert_bias)
    return {"moe": found}


def _moe_temporaries(model: ModelConfig, shapes: Shapes) -> float:
    needed = expert_temporaries(shapes, _expert_layer(model, shapes))
    shared = model.moe.shared_size / shapes.tensor
    return needed + (mlp_temporaries(shapes, model.hidden_size, shared) if shared else 0.0)


def _moe_beside(model: ModelConfig, shapes: Shapes) -> float:
    return expert_rows(shapes, _expert_layer(model, shapes))


def _moe_kept(model: ModelConfig, shapes: Shapes) -> float:
    return _expert_layer(model, shapes).kept(shapes)


def _moe_exchanged(model: ModelConfig, shapes: Shapes) -> tuple[float, ...]:
    return _expert_layer(model, shapes).exchanged(shapes)


def _mamba_layer(model: ModelConfig, shapes: Shapes) -> ScanShapes:
    mamba = model.mamba
    return ScanShapes(
        hidden=model.hidden_size,
        heads=mamba2_heads(model) / shapes.tensor,
        head_dim=mamba.head_dim,
        groups=mamba2_groups(model, shapes.tensor),
        state_size=mamba.state_size,
    )


def _mamba(model: ModelConfig, shapes: Shapes) -> RegionWork:
    return {"mamba": mixer(shapes, _mamba_layer(model, shapes))}


def _mamba_temporaries(model: ModelConfig, shapes: Shapes) -> float:
    return mixer_temporaries(shapes, _mamba_layer(model, shapes))


def _mamba1_layer(model: ModelConfig, shapes: Shapes) -> SelectiveShapes:
    return SelectiveShapes(
        hidden=model.hidden_size,
        channels=mamba1_channels(model) / shapes.tensor,
        rank=mamba1_rank(model),
        state_size=model.mamba.state_size,
    )


def _mamba1(model: ModelConfig, shapes: Shapes) -> RegionWork:
    return {"mamba": selective_mixer(shapes, _mamba1_layer(model, shapes))}


def _mamba1_temporaries(model: ModelConfig, shapes: Shapes) -> float:
    return selective_temporaries(shapes, _mamba1_layer(model, shapes))


def _mamba1_whole(model: ModelConfig, shapes: Shapes, in_loop: bool) -> int:
    # of one row and where channels are split: what is convolved, and of a whole sequence the other arrays so wide
    if shapes.rows != 1 or shapes.tensor == 1 or not in_loop:
        return 0
    arrays = 4 if shapes.parts == 1 else 1
    return round(arrays * shapes.length // shapes.parts * shapes.width * _mamba1_layer(model, shapes).channels)


def _delta_layer(model: ModelConfig, shapes: Shapes) -> DeltaShapes:
    delta = model.delta
    return DeltaShapes(
        hidden=model.hidden_size,
        heads=delta.linear_num_value_heads / shapes.tensor,
        head_dim=delta.linear_value_head_dim,
        key_heads=delta_key_heads(model, shapes.tensor),
        key_dim=delta.linear_key_head_dim,
    )


def _delta(model: ModelConfig, shapes: Shapes) -> RegionWork:
    return {"delta": delta_mixer(shapes, _delta_layer(model, shapes))}


def _delta_temporaries(model: ModelConfig, shapes: Shapes) -> float:
    return delta_temporaries(shapes, _delta_layer(model, shapes))


def _delta_inputs(model: ModelConfig, shapes: Shapes, in_loop: bool) -> int:
    # of several rows: all that the input's product makes
    if shapes.rows == 1 or not in_loop:
        return 0
    layer = _delta_layer(model, shapes)
    made = 2 * layer.inner + layer.shared + 2 * layer.heads
    return round(shapes.length // shapes.parts * shapes.width * made)


# by symbol, the keys of kinds.py: KINDS
LAYER_WORK = {
    ATTENTION.symbol: LayerWork(_attention, _scores),
    WINDOW.symbol: LayerWork(partial(_attention, in_window=True), _scores),
    LATENT.symbol: LayerWork(_latent, _latent_scores, gathers=False),
    MLP.symbol: LayerWork(_mlp, _mlp_temporaries),
    MOE.symbol: LayerWork(
        _moe,
        _moe_temporaries,
        _moe_beside,
        gathers=False,
        scatters=False,
        exchanged=_moe_exchanged,
        kept=_moe_kept,
    ),
    MAMBA1.symbol: LayerWork(_mamba1, _mamba1_temporaries, transposed=_mamba1_whole),
    MAMBA.symbol: LayerWork(_mamba, _mamba_temporaries),
    DELTA.symbol: LayerWork(_delta, _delta_temporaries, transposed=_delta_inputs),
}
