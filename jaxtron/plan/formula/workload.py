"""What one GPU executes in a step, from shapes alone: products, streamed bytes and collectives, slot by slot.

A microbatch has n = b * s tokens on a device; the letters are those of 2205.05198: h hidden, a heads, t tensor parts.
"""

from dataclasses import dataclass, field, replace

from jaxtron.layers.config import GATED
from jaxtron.models.decoder.config import ModelConfig
from jaxtron.models.decoder.pattern import ATTENTIONS, MLP, WINDOW, Branch
from jaxtron.pipeline.schedules.figures import Slot
from jaxtron.plan.machine import CollectiveKind, Product
from jaxtron.plan.profile import Profile
from jaxtron.run.attention import select_attention
from jaxtron.run.configuration import Configuration

MASK_BYTES = 1
# Of Adam and clipping, for each parameter of a device's share: gradient for the norm 4; gradient, weight and moments
# read 16; weight and moments written 12; 2 for the working weight. SGD has one moment.
OPTIMIZER_BYTES = {"adamw": 34, "sgd": 26}


@dataclass(frozen=True)
class CollectiveWork:
    """`size` is the bytes of the whole array on one device; `purpose` names the field of `Overlap`."""

    kind: CollectiveKind
    size: float
    purpose: str
    count: float = 1.0


@dataclass(frozen=True)
class Work:
    """Operations of one slot on one device.

    `attention_flops` run in a fused kernel; `masked_flops` are those that it does not run, or runs again, against the
    papers' formulas, which count the whole square of scores once.
    """

    products: tuple[Product, ...] = ()
    attention_flops: float = 0.0
    masked_flops: float = 0.0
    stream: float = 0.0
    kernels: int = 0
    collectives: tuple[CollectiveWork, ...] = ()

    def __add__(self, other: "Work") -> "Work":
        return Work(
            self.products + other.products,
            self.attention_flops + other.attention_flops,
            self.masked_flops + other.masked_flops,
            self.stream + other.stream,
            self.kernels + other.kernels,
            self.collectives + other.collectives,
        )

    @property
    def flops(self) -> float:
        """FLOPs as the papers count them: the whole square of scores, whatever a kernel leaves out."""
        return sum(product.flops for product in self.products) + self.attention_flops + self.masked_flops


NOTHING = Work()


@dataclass(frozen=True)
class SlotWork:
    """What a piece of the model does in each slot of a microbatch; `weight` is part of the backward if not split."""

    forward: Work = NOTHING
    backward: Work = NOTHING
    weight: Work = NOTHING

    def __add__(self, other: "SlotWork") -> "SlotWork":
        return SlotWork(self.forward + other.forward, self.backward + other.backward, self.weight + other.weight)


@dataclass(frozen=True)
class Shapes:
    """Sizes on one device that all operations are made of."""

    model: ModelConfig
    profile: Profile
    sizes: dict[str, int]
    rows: int
    length: int
    gathered: int
    """Parts that weights are gathered from where they are used."""
    width: int
    """Bytes of an activation."""

    @property
    def tensor(self) -> int:
        """Parts of heads, MLP and vocabulary."""
        return self.sizes["tensor"]

    @property
    def parts(self) -> int:
        """Devices that a sequence lies on."""
        return self.sizes["context"]

    @property
    def tokens(self) -> float:
        """Of a microbatch on a device."""
        return self.rows * self.length / self.parts

    @property
    def own_tokens(self) -> float:
        """Those whose norms, dropout and residuals this device computes."""
        return self.tokens / self.tensor if self.profile.sequence_sharded else self.tokens

    @property
    def residual_bytes(self) -> float:
        """Of the whole residual stream of a microbatch."""
        return self.tokens * self.model.hidden_size * self.width

    @property
    def heads(self) -> float:
        """Query heads of a device."""
        return self.model.num_heads / self.tensor

    @property
    def kv_heads(self) -> float:
        """Key/value heads that a device computes: all of them where they do not split."""
        return self.model.kv_heads / self.tensor if self.model.kv_heads % self.tensor == 0 else self.model.kv_heads

    @property
    def mlp_width(self) -> float:
        """MLP channels of a device."""
        return self.model.mlp_width / self.tensor

    @property
    def vocab(self) -> float:
        """Rows of the tables of a device."""
        return self.model.padded_vocab / self.tensor


def shapes_of(config: Configuration, sizes: dict[str, int], profile: Profile, kind: str) -> Shapes:
    """The sizes of a configuration on a mesh of these sizes by axis, of GPUs of this kind (`Gpu.device_kind`)."""
    shards = sizes["data"] * sizes["fsdp"]
    backends = select_attention(config, sizes["context"], kind).values()
    if profile.attention == "plain" and all(backend.name != "materialized" for backend in backends):
        profile = replace(profile, attention="fused")
    return Shapes(
        model=config.model,
        profile=profile,
        sizes=sizes,
        rows=config.train.global_batch // (config.train.microbatches * shards),
        length=config.data.sequence_length,
        gathered=sizes["fsdp"] * (sizes["data"] * sizes["context"] if config.sharding.zero == "parameters" else 1),
        width=4 if config.train.precision == "fp32" else 2,
    )


def period(shapes: Shapes) -> SlotWork:
    """One period of the model's pattern, recomputation in the backward."""
    recomputed = shapes.model.recomputed
    found = SlotWork()
    for branch in shapes.model.layout.period:
        found += _branch(shapes, branch)
    if "layer" in recomputed:
        found += SlotWork(backward=found.forward)
    return found + _gathered_weights(shapes, period_parameters(shapes))


def period_parameters(shapes: Shapes) -> float:
    """Parameters of a period on a device, whole over the batch axes."""
    model, hidden = shapes.model, shapes.model.hidden_size
    attention = hidden * model.head_size * (2 * shapes.heads + 2 * shapes.kv_heads)
    mlp = hidden * shapes.mlp_width * (3 if model.activation in GATED else 2)
    layout, period_layers = model.layout, len(model.layout.period)
    attentions, mlps = (
        sum(branch.count(symbol) for branch in layout.period for symbol in symbols) for symbols in (ATTENTIONS, (MLP,))
    )
    vectors = period_layers * hidden * (2 if model.norm != "rms_norm" and model.bias else 1)
    if model.bias:
        vectors += attentions * (hidden + model.head_size * (shapes.heads + 2 * shapes.kv_heads))
        vectors += mlps * (hidden + shapes.mlp_width * (2 if model.activation in GATED else 1))
    return attentions * attention + mlps * mlp + vectors


def embedding_parameters(shapes: Shapes) -> float:
    """Parameters of the embedding and the learned positions on a device."""
    model = shapes.model
    positions = (model.max_positions or shapes.length) if model.position == "learned" else 0
    return model.hidden_size * (shapes.vocab + positions)


def table_parameters(shapes: Shapes) -> float:
    """Those of the embedding and of a head of its own; every stage holds them."""
    return embedding_parameters(shapes) + (0 if shapes.model.tied_head else shapes.model.hidden_size * shapes.vocab)


def embedding(shapes: Shapes) -> SlotWork:
    """Look-up in the vocabulary-sharded table, positions and dropout; the gradient is added row by row in float32."""
    model, width = shapes.model, shapes.width
    size = shapes.residual_bytes
    passes = 2 + model.embedding_norm + (model.position == "learned")
    drop = _dropout_bytes(shapes) + passes * 2 * shapes.own_tokens * model.hidden_size * width
    back = shapes.tokens * model.hidden_size * (width + 8)
    reduced = _scatter(shapes, size)
    returned = _gather(shapes, size)
    table = _gathered_weights(shapes, embedding_parameters(shapes))
    return table + SlotWork(
        forward=Work(stream=2 * size + drop, kernels=3, collectives=reduced),
        backward=Work(stream=back + drop, kernels=3, collectives=returned),
    )


def head(shapes: Shapes) -> SlotWork:
    """Final norm, head and loss with their gradients, which are formed at once in the last stage's forward."""
    n, h, v = shapes.tokens, shapes.model.hidden_size, shapes.vocab
    size = shapes.residual_bytes
    stream = n * v * shapes.profile.logit_bytes + 8 * shapes.own_tokens * h * shapes.width
    products = (
        Product(n, v, h, width=shapes.width, output_width=0),
        Product(n, h, v, width=shapes.width, output_width=shapes.width),
        Product(v, h, n, width=shapes.width, output_width=8),
    )
    sums = _tensor(shapes, "all_reduce", 12.0 * n)
    moved = (*_gather(shapes, size), *_scatter(shapes, size), *sums)
    weights = _gathered_weights(shapes, h * v)
    work = Work(products, stream=stream, kernels=8, collectives=moved)
    return SlotWork(forward=work + weights.forward + weights.weight)


def _branch(shapes: Shapes, branch: Branch) -> SlotWork:
    """One residual layer: a norm, what reads it, and the residual sum of each."""
    model, width = shapes.model, shapes.width
    stream = shapes.own_tokens * model.hidden_size * width
    gather = _gather(shapes, shapes.residual_bytes)
    again = _gather(shapes, shapes.residual_bytes, "regather")
    # norm: input read, output written; backward: input, its gradient and the residual's read, their sum written
    found = SlotWork(
        forward=Work(stream=2 * stream, kernels=1, collectives=gather),
        backward=Work(stream=4 * stream, kernels=2, collectives=_scatter(shapes, shapes.residual_bytes)),
        weight=Work(collectives=again),
    )
    for symbol in branch:
        found += _mlp(shapes) if symbol == MLP else _attention(shapes, symbol == WINDOW)
        found += _residual(shapes)
    return found


def _residual(shapes: Shapes) -> SlotWork:
    """What a branch ends with: its partial sums reduced, dropout, and the sum with the residual stream."""
    stream = shapes.own_tokens * shapes.model.hidden_size * shapes.width
    drop = _dropout_bytes(shapes)
    return SlotWork(
        forward=Work(stream=3 * stream + drop, kernels=1, collectives=_scatter(shapes, shapes.residual_bytes)),
        backward=Work(
            stream=(2 * stream if drop else 0) + drop,
            kernels=1,
            collectives=_gather(shapes, shapes.residual_bytes),
        ),
    )


def _attention(shapes: Shapes, in_window: bool) -> SlotWork:
    model, n, d = shapes.model, shapes.tokens, shapes.model.head_size
    heads, kv_heads = shapes.heads, shapes.kv_heads
    projections = _linear(shapes, model.hidden_size, (heads + 2 * kv_heads) * d)
    projections += _linear(shapes, heads * d, model.hidden_size)
    core = _core(shapes, in_window)
    if model.position == "rotary":
        rotated = Work(stream=2 * n * (heads + kv_heads) * d * shapes.width, kernels=1)
        projections += SlotWork(forward=rotated, backward=rotated)
    found = projections + core + _travelling(shapes)
    if "attention" in model.recomputed:
        gathered = Work(collectives=_gather(shapes, shapes.residual_bytes))
        return found + SlotWork(backward=found.forward + gathered)
    if "attention_core" in model.recomputed:
        return found + SlotWork(backward=core.forward)
    return found


def _travelling(shapes: Shapes) -> SlotWork:
    """Keys and values of the other parts of a sequence, and their gradients' sums in float32 on the way back.

    A ring sends what an all-gather and a reduce-scatter do; other methods send no more.
    """
    if shapes.parts == 1:
        return SlotWork()
    elements = 2 * shapes.tokens * shapes.parts * shapes.kv_heads * shapes.model.head_size
    gather = CollectiveWork("all_gather", elements * shapes.width, "context")
    back = (gather, CollectiveWork("reduce_scatter", 4 * elements, "context"))
    return SlotWork(forward=Work(collectives=(gather,)), backward=Work(collectives=back))


def _core(shapes: Shapes, in_window: bool) -> SlotWork:
    """Scores, softmax, dropout and the mix of values; a kernel leaves out what is outside of a window."""
    model, s, d = shapes.model, shapes.length, shapes.model.head_size
    count, queries = shapes.rows * shapes.heads, s / shapes.parts
    square = count * queries * s
    drops = model.attention_dropout > 0
    if shapes.profile.attention == "fused":
        # forward two products of the half below the diagonal; the backward makes the scores again: five
        product = 2.0 * square * d
        if in_window:
            # of a window as many scores a query as it is long: the formulas count no more either
            inside = count * queries * d * min(model.attention.window or s, s)
            kernel = {"attention_flops": 4.0 * inside, "stream": 4 * count * queries * d * shapes.width, "kernels": 1}
            again = {"attention_flops": 10.0 * inside, "masked_flops": -2.0 * inside}
            return SlotWork(Work(**kernel), Work(**{**kernel, **again}))
        keys = count * queries * d * shapes.width
        return SlotWork(
            forward=Work(attention_flops=product, masked_flops=product, stream=4 * keys, kernels=1),
            # the formulas count four products; of five halves run
            backward=Work(attention_flops=2.5 * product, masked_flops=1.5 * product, stream=8 * keys, kernels=2),
        )
    wide = 4 if shapes.profile.attention == "plain" else 2
    narrow = shapes.width
    scores = Product(queries, s, d, count, narrow, output_width=wide)
    mix = Product(queries, d, s, count, narrow, output_width=narrow)
    # softmax: scores read (twice more for maximum and sum without a kernel of its own), probabilities written
    softmax = square * (wide * (3 if wide == 4 else 1) + narrow)
    dropped = square * (2 * narrow + MASK_BYTES) if drops else 0
    back = square * (2 * narrow + wide)
    return SlotWork(
        forward=Work((scores, mix), stream=softmax + dropped, kernels=2 + drops),
        backward=Work(
            (
                Product(s, s, d, count, narrow, output_width=narrow),
                Product(s, d, s, count, narrow, output_width=narrow),
                Product(s, d, s, count, narrow, output_width=narrow),
                Product(s, d, s, count, narrow, output_width=narrow),
            ),
            stream=back + dropped,
            kernels=2 + drops,
        ),
    )


def _mlp(shapes: Shapes) -> SlotWork:
    model, f = shapes.model, shapes.mlp_width
    inputs = 2 if model.activation in GATED else 1
    found = _linear(shapes, model.hidden_size, inputs * f) + _linear(shapes, f, model.hidden_size)
    stream = shapes.tokens * f * shapes.width
    found += SlotWork(
        forward=Work(stream=(inputs + 1) * stream, kernels=1),
        backward=Work(stream=(2 * inputs + 1) * stream, kernels=1),
    )
    if "mlp" in model.recomputed:
        gathered = Work(collectives=_gather(shapes, shapes.residual_bytes))
        return found + SlotWork(backward=found.forward + gathered)
    return found


def _linear(shapes: Shapes, inputs: float, outputs: float) -> SlotWork:
    """A product with a weight, the input's gradient, and the weight's, which is added to a float32 sum."""
    n, width = shapes.tokens, shapes.width
    bias = Work(stream=n * outputs * width, kernels=1) if shapes.model.bias else NOTHING
    return SlotWork(
        forward=Work((Product(n, outputs, inputs, width=width, output_width=width),)),
        backward=Work((Product(n, inputs, outputs, width=width, output_width=width),)),
        weight=Work((Product(inputs, outputs, n, width=width, output_width=8),)) + bias,
    )


def _dropout_bytes(shapes: Shapes) -> float:
    """Of the mask, where the residual stream has dropout."""
    return shapes.own_tokens * shapes.model.hidden_size * MASK_BYTES if shapes.model.dropout > 0 else 0.0


def _gather(shapes: Shapes, size: float, purpose: str = "tensor") -> tuple[CollectiveWork, ...]:
    """The sequence's parts put together; nothing where it was not split."""
    return _tensor(shapes, "all_gather", size, purpose) if shapes.profile.sequence_sharded else ()


def _scatter(shapes: Shapes, size: float) -> tuple[CollectiveWork, ...]:
    """Partial sums added: to parts of the sequence, or to the whole of it everywhere."""
    return _tensor(shapes, "reduce_scatter" if shapes.profile.sequence_sharded else "all_reduce", size)


def _tensor(shapes: Shapes, kind: CollectiveKind, size: float, purpose: str = "tensor") -> tuple[CollectiveWork, ...]:
    return (CollectiveWork(kind, size, purpose),) if shapes.tensor > 1 else ()


def _gathered_weights(shapes: Shapes, parameters: float) -> SlotWork:
    """Weights gathered at use in 16 bits, again in the backward, and their gradients reduced there (ZeRO-3)."""
    if shapes.gathered == 1:
        return SlotWork()
    size = parameters * shapes.width
    gather = Work(collectives=(CollectiveWork("all_gather", size, "fsdp"),))
    return SlotWork(gather, gather, Work(collectives=(CollectiveWork("reduce_scatter", size, "fsdp"),)))


@dataclass(frozen=True)
class Once:
    """What a stage does once a step: parameters of a device, and bytes of its collectives."""

    parameters: float
    """Of the device's share, which the optimizer updates."""
    reduced: tuple[CollectiveWork, ...] = field(default=())
    gathered: tuple[CollectiveWork, ...] = field(default=())
    tables: tuple[CollectiveWork, ...] = field(default=())
    """Gradients of the embedding and the head, which all stages hold, summed over `pipe`."""


def once(config: Configuration, shapes: Shapes, periods: int) -> Once:
    """The step's end on a stage with so many periods: gradients in float32, weights in the step's precision."""
    zero, sizes = config.sharding.zero, shapes.sizes
    # what sums gradients at the end of a step shares the state too
    data = sizes["data"] * shapes.parts
    local = (periods * period_parameters(shapes) + table_parameters(shapes)) / shapes.gathered
    tables = ()
    if sizes["pipe"] > 1:
        rest = table_parameters(shapes) / shapes.gathered / (data if zero == "optimizer" else 1)
        tables = (CollectiveWork("all_reduce", 4 * rest, "pipe"),)
    if zero == "parameters" or data == 1:
        return Once(local, tables=tables)
    if zero == "none":
        return Once(local, (CollectiveWork("all_reduce", 4 * local, "data"),), tables=tables)
    # what is gathered again at use stays in float32 until then
    width = shapes.width if sizes["fsdp"] == 1 else 4
    return Once(
        local / data,
        (CollectiveWork("reduce_scatter", 4 * local, "data"),),
        (CollectiveWork("all_gather", width * local, "data"),),
        tables=tables,
    )


def slot_work(slots: SlotWork, slot: Slot, *, split: bool) -> Work:
    """What a slot of a schedule runs; a backward that is not split has the weight gradient too."""
    if slot == "backward" and not split:
        return slots.backward + slots.weight
    return getattr(slots, slot)
