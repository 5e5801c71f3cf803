"""What one GPU executes in a step, from shapes alone: products, streamed bytes and collectives, slot by slot.

A microbatch has n = b * s tokens on a device; the letters are those of 2205.05198: h hidden, a heads, t tensor parts.
"""

from dataclasses import dataclass, replace

from jaxtron.models.decoder.config import ModelConfig
from jaxtron.models.decoder.kinds import local_kv_heads
from jaxtron.plan.machine import CollectiveKind, Product
from jaxtron.plan.profile import Profile
from jaxtron.run.attention import select_attention
from jaxtron.run.configuration import Configuration

# of a number in float32, and of a dropout's mask
FLOAT, MASK_BYTES = 4, 1


@dataclass(frozen=True)
class CollectiveWork:
    """`size` is the bytes of the whole array on one device; `purpose` names the field of `Overlap`."""

    kind: CollectiveKind
    size: float
    purpose: str
    count: float = 1.0


@dataclass(frozen=True)
class PhaseWork:
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

    def __add__(self, other: "PhaseWork") -> "PhaseWork":
        return PhaseWork(
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


NOTHING = PhaseWork()


@dataclass(frozen=True)
class SlotWork:
    """What a piece of the model does in each slot of a microbatch; `weight` is part of the backward if not split."""

    forward: PhaseWork = NOTHING
    backward: PhaseWork = NOTHING
    weight: PhaseWork = NOTHING

    def __add__(self, other: "SlotWork") -> "SlotWork":
        return SlotWork(self.forward + other.forward, self.backward + other.backward, self.weight + other.weight)


# by the regions of a kind of layer: of the whole branch and, apart from it, of the parts that can be recomputed alone
RegionWork = dict[str, SlotWork]


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
    def kv_heads(self) -> int:
        """Key/value heads that a device computes: all of them where they do not split."""
        return local_kv_heads(self.model, self.tensor)

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


def linear(shapes: Shapes, inputs: float, outputs: float) -> SlotWork:
    """A product with a weight, the input's gradient, and the weight's, which is added to a float32 sum."""
    n, width = shapes.tokens, shapes.width
    bias = PhaseWork(stream=n * outputs * width, kernels=1) if shapes.model.bias else NOTHING
    return SlotWork(
        forward=PhaseWork((Product(n, outputs, inputs, width=width, output_width=width),)),
        backward=PhaseWork((Product(n, inputs, outputs, width=width, output_width=width),)),
        weight=PhaseWork((Product(inputs, outputs, n, width=width, output_width=8),)) + bias,
    )


def dropout_bytes(shapes: Shapes) -> float:
    """Of the mask, where the residual stream has dropout."""
    return shapes.own_tokens * shapes.model.hidden_size * MASK_BYTES if shapes.model.dropout > 0 else 0.0


def gather(shapes: Shapes, size: float, purpose: str = "tensor") -> tuple[CollectiveWork, ...]:
    """The sequence's parts put together; nothing where it was not split."""
    return over_tensor(shapes, "all_gather", size, purpose) if shapes.profile.sequence_sharded else ()


def scatter(shapes: Shapes, size: float) -> tuple[CollectiveWork, ...]:
    """Partial sums added: to parts of the sequence, or to the whole of it everywhere."""
    return over_tensor(shapes, "reduce_scatter" if shapes.profile.sequence_sharded else "all_reduce", size)


def over_tensor(
    shapes: Shapes, kind: CollectiveKind, size: float, purpose: str = "tensor"
) -> tuple[CollectiveWork, ...]:
    """A collective of tensor parallelism; nothing on one part."""
    return (CollectiveWork(kind, size, purpose),) if shapes.tensor > 1 else ()


def gathered_weights(shapes: Shapes, parameters: float) -> SlotWork:
    """Weights gathered at use in 16 bits, again in the backward, and their gradients reduced there (ZeRO-3)."""
    if shapes.gathered == 1:
        return SlotWork()
    size = parameters * shapes.width
    gathered = PhaseWork(collectives=(CollectiveWork("all_gather", size, "fsdp"),))
    return SlotWork(gathered, gathered, PhaseWork(collectives=(CollectiveWork("reduce_scatter", size, "fsdp"),)))
