"""Orders of a tensor's rows that letters cannot say: projections of different sizes in one, rotated pairs that are
neighbours, positions that begin later, what a Mamba-2 layer multiplies or convolves as one. By the model, and the
parameter's name in its layer."""

from collections.abc import Callable, Iterable, Mapping, Sequence

from jaxtron.models.decoder.config import ModelConfig
from jaxtron.models.decoder.state_space import mamba2_heads
from jaxtron.weights.table import Rows


def side_by_side(model: ModelConfig, name: str) -> Rows:
    """All queries, then all keys, then all values (Phi-3)."""
    heads, keys = model.num_heads, model.kv_heads
    first, count = {"query": (0, heads), "key": (heads, keys), "value": (heads + keys, keys)}[_projection(name)]
    return Rows(_rows(range(first, first + count), model.head_size), (heads + 2 * keys) * model.head_size)


def by_group(model: ModelConfig, name: str) -> Rows:
    """Of each key head the queries that share it, the key and the value (Falcon)."""
    keys = model.kv_heads
    queries = model.num_heads // keys
    own = {"query": range(queries), "key": range(queries, queries + 1), "value": range(queries + 1, queries + 2)}
    heads = [group * (queries + 2) + place for group in range(keys) for place in own[_projection(name)]]
    return Rows(_rows(heads, model.head_size), keys * (queries + 2) * model.head_size)


def neighbours(model: ModelConfig, name: str) -> Rows:
    """Of queries or keys, whose rotated pairs are neighbours there, and halves here (GPT-J, Cohere)."""
    heads = model.num_heads if _projection(name) == "query" else model.kv_heads
    order = _halves(model, model.head_size)
    return Rows(_rows_in_order(range(heads), order), heads * len(order))


def neighbours_of_norm(model: ModelConfig, name: str) -> Rows:
    """The same of norms of each head."""
    return Rows(_halves(model, model.head_size), model.head_size, dim=1)


def neighbours_of_latents(model: ModelConfig, name: str) -> Rows:
    """Of what latent attention makes of the stream: the latent, then the part of keys that is rotated (DeepSeek)."""
    order = _after(model.latent.kv_lora_rank, model)
    return Rows(order, len(order))


def neighbours_of_latent_queries(model: ModelConfig, name: str) -> Rows:
    """Of each head of latent attention the part of queries that is not rotated, then that which is (DeepSeek)."""
    order = _after(model.latent.qk_nope_head_dim, model)
    return Rows(_rows_in_order(range(model.num_heads), order), model.num_heads * len(order))


def after(count: int) -> Callable[[ModelConfig, str], Rows]:
    """Positions that begin after so many rows, which are of no token (OPT)."""

    def of_model(model: ModelConfig, name: str) -> Rows:
        assert model.max_positions is not None
        return Rows(range(count, count + model.max_positions), count + model.max_positions)

    return of_model


def in_mixer(model: ModelConfig, name: str) -> Rows:
    """All gates of Mamba-2, then all x, B, C and steps."""
    heads, shared = mamba2_heads(model), model.mamba.num_groups * model.mamba.state_size
    inner = heads * model.mamba.head_dim
    return _block({"z": inner, "x": inner, "B": shared, "C": shared, "dt": heads}, _projection(name))


def in_convolution(model: ModelConfig, name: str) -> Rows:
    """All channels of Mamba-2's x, then those of B and C."""
    shared = model.mamba.num_groups * model.mamba.state_size
    inner = mamba2_heads(model) * model.mamba.head_dim
    return _block({"conv_x": inner, "conv_B": shared, "conv_C": shared}, _projection(name))


def _block(sizes: Mapping[str, int], own: str) -> Rows:
    """Those of one among blocks of these sizes, in their order."""
    names = list(sizes)
    first = sum(sizes[name] for name in names[: names.index(own)])
    return Rows(range(first, first + sizes[own]), sum(sizes.values()))


def _projection(name: str) -> str:
    """Of a name such as attention.query.kernel."""
    return name.split(".")[1]


def _rows(heads: Iterable[int], size: int) -> list[int]:
    """Of these heads, each of so many."""
    return _rows_in_order(heads, range(size))


def _rows_in_order(heads: Iterable[int], order: Sequence[int]) -> list[int]:
    """Of these heads, each in this order."""
    return [head * len(order) + place for head in heads for place in order]


def _halves(model: ModelConfig, size: int) -> list[int]:
    """Where so many dimensions of a head are there."""
    rotated = model.rotary.dimensions(size)
    return [*range(0, rotated, 2), *range(1, rotated, 2), *range(rotated, size)]


def _after(plain: int, model: ModelConfig) -> list[int]:
    """Where those of latent attention's that are rotated are, after so many others."""
    return [*range(plain), *(plain + place for place in _halves(model, model.latent.qk_rope_head_dim))]
