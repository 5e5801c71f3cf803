"""Small models whose tensors are known, and the ways in which Megatron-LM's processes save them."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxtron.weights.megatron.names import joined
from tests.megatron.writer import write_distributed, write_ranks

HIDDEN, HEADS, GROUPS, DIM, LAYERS, VOCABULARY = 8, 4, 2, 6, 4, 32
ARGS: dict[str, Any] = {
    "num_layers": LAYERS,
    "hidden_size": HIDDEN,
    "num_attention_heads": HEADS,
    "group_query_attention": True,
    "num_query_groups": GROUPS,
    "kv_channels": DIM,
    "ffn_hidden_size": 12,
    "padded_vocab_size": VOCABULARY,
    "make_vocab_size_divisible_by": 16,
    "max_position_embeddings": 16,
    "position_embedding_type": "rope",
    "normalization": "RMSNorm",
    "swiglu": True,
    "add_bias_linear": False,
    "untie_embeddings_and_output_weights": True,
}
# each with its head alone, tables of positions, biases, no gates
GPT2: dict[str, Any] = {
    **{
        key: value
        for key, value in ARGS.items()
        if not key.startswith(("group", "num_query", "norm", "swiglu", "untie"))
    },
    "position_embedding_type": "learned_absolute",
    "add_bias_linear": True,
}
EXPERTS: dict[str, Any] = {
    **ARGS,
    "num_experts": 4,
    "moe_ffn_hidden_size": 10,
    "moe_shared_expert_intermediate_size": 6,
    "moe_shared_expert_gate": True,
}
Arrays = dict[str, np.ndarray]


def whole_tensors(args: Mapping[str, Any], dtype: Any = np.float32) -> Arrays:
    """All tensors of a model by the table's names, queries, keys and values in one, of random numbers."""
    random = np.random.default_rng(0)
    has_bias, is_plain = args["add_bias_linear"], args.get("normalization") != "RMSNorm"
    groups = args["num_query_groups"] if args.get("group_query_attention") else HEADS
    rows, gates = (HEADS + 2 * groups) * DIM, 2 if args.get("swiglu") else 1
    shapes: dict[str, tuple[int, ...]] = {"embedding.word_embeddings.weight": (VOCABULARY, HIDDEN)}

    def norm(name: str) -> None:
        shapes[f"{name}.weight"] = (HIDDEN,)
        if is_plain:
            shapes[f"{name}.bias"] = (HIDDEN,)

    def linear(name: str, outputs: int, inputs: int) -> None:
        shapes[f"{name}.weight"] = (outputs, inputs)
        if has_bias:
            shapes[f"{name}.bias"] = (outputs,)

    if args["position_embedding_type"] == "learned_absolute":
        shapes["embedding.position_embeddings.weight"] = (args["max_position_embeddings"], HIDDEN)
    for layer in range(args["num_layers"]):
        before = f"decoder.layers.{layer}"
        norm(f"{before}.input_layernorm")
        linear(f"{before}.self_attention.linear_qkv", rows, HIDDEN)
        linear(f"{before}.self_attention.linear_proj", HIDDEN, HEADS * DIM)
        norm(f"{before}.pre_mlp_layernorm")
        if "num_experts" not in args:
            linear(f"{before}.mlp.linear_fc1", gates * args["ffn_hidden_size"], HIDDEN)
            linear(f"{before}.mlp.linear_fc2", HIDDEN, args["ffn_hidden_size"])
            continue
        count, width = args["num_experts"], args["moe_ffn_hidden_size"]
        shared = args["moe_shared_expert_intermediate_size"]
        shapes |= {
            f"{before}.mlp.router.weight": (count, HIDDEN),
            f"{before}.mlp.experts.linear_fc1.weight": (count, gates * width, HIDDEN),
            f"{before}.mlp.experts.linear_fc2.weight": (count, HIDDEN, width),
            f"{before}.mlp.shared_experts.linear_fc1.weight": (gates * shared, HIDDEN),
            f"{before}.mlp.shared_experts.linear_fc2.weight": (HIDDEN, shared),
            f"{before}.mlp.shared_experts.gate_weight": (1, HIDDEN),
        }
    norm("decoder.final_layernorm")
    if args.get("untie_embeddings_and_output_weights"):
        shapes["output_layer.weight"] = (VOCABULARY, HIDDEN)
    return {name: random.standard_normal(shape).astype(np.float32).astype(dtype) for name, shape in shapes.items()}


def rank_part(name: str, array: np.ndarray, rank: int, count: int, is_gated: bool) -> np.ndarray:
    """What one of `count` tensor-parallel ranks has of a tensor, as a view of it where it can be."""
    how = joined(name, is_gated=is_gated)
    if how == "same" or count == 1:
        return array
    if how == "columns":
        return np.split(array, count, -1)[rank]
    place = array.ndim - 2 if "experts.linear" in name and ".shared" not in name else 0
    if how == "rows":
        return np.split(array, count, place)[rank]
    return np.concatenate([np.split(half, count, place)[rank] for half in np.split(array, 2, place)], place)


def stage_of(name: str, stages: int, layers: int) -> int:
    """The pipeline stage of a tensor, layers being shared out evenly."""
    if name.startswith("embedding."):
        return 0
    if not name.startswith("decoder.layers."):
        return stages - 1
    return int(name.split(".")[2]) * stages // layers


def rank_models(
    arrays: Arrays, *, tensor: int = 1, stages: int = 1, expert: int = 1, is_gated: bool, layers: int = LAYERS
) -> Iterator[tuple[tuple[int, int, int], Arrays]]:
    """The model of each rank, layers by their numbers there and experts together."""
    for rank in np.ndindex(tensor, stages, expert):
        found = {}
        for name, array in arrays.items():
            if stage_of(name, stages, layers) != rank[1]:
                continue
            part = rank_part(name, array, rank[0], tensor, is_gated)
            if "mlp.experts." in name:
                part = np.split(part, expert)[rank[2]]
            if name.startswith("decoder.layers."):
                _, _, number, rest = name.split(".", 3)
                name = f"decoder.layers.{int(number) - rank[1] * layers // stages}.{rest}"
            found[name] = part
        yield (rank[0], rank[1], rank[2]), found


def apart(model: Arrays, form: str) -> Arrays:
    """Experts one by one, by the names of the grouped module or of the sequential one."""
    found = {}
    for name, array in model.items():
        before, experts, rest = name.partition("mlp.experts.")
        if not experts:
            found[name] = array
            continue
        for number, one in enumerate(array):
            own = f"{rest}{number}" if form == "grouped" else f"local_experts.{number}.{rest}"
            found[before + experts + own] = one
    return found


def saved_by_ranks(
    folder: Path, args: Mapping[str, Any], arrays: Arrays, *, experts: str = "grouped", old: bool = False, **mesh: int
) -> Path:
    """The older format, by the processes of a mesh."""
    ranks = {}
    for rank, model in rank_models(arrays, is_gated=bool(args.get("swiglu")), layers=args["num_layers"], **mesh):
        name = f"{rank[0]:02d}" + (f"_{rank[1]:03d}" if mesh.get("stages", 1) > 1 else "")
        name += f"_{rank[2]:03d}" if mesh.get("expert", 1) > 1 else ""
        ranks[name] = {"model": apart(model, experts)}
    return write_ranks(folder, ranks, args | parallelism(**mesh), old=old)


def parallelism(tensor: int = 1, stages: int = 1, expert: int = 1) -> dict[str, int]:
    """The arguments that say what mesh it was."""
    return {
        "tensor_model_parallel_size": tensor,
        "pipeline_model_parallel_size": stages,
        "expert_model_parallel_size": expert,
    }


FUSED = {
    "input_layernorm.": "self_attention.linear_qkv.layer_norm_",
    "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
}


def boxes_of(
    name: str, array: np.ndarray, tensor: int, expert: int, is_gated: bool
) -> list[tuple[tuple[int, ...], np.ndarray]]:
    """A tensor as the ranks of a mesh save it, each box by its offsets; halves of gates are boxes of their own."""
    place = array.ndim - 2 if "experts.linear" in name and ".shared" not in name else 0
    how, last = joined(name, is_gated=is_gated), array.ndim - 1
    cuts = {"rows": (place, tensor), "halves": (place, 2 * tensor), "columns": (last, tensor), "same": (0, 1)}[how]
    boxes = [((0,) * array.ndim, array)]
    for axis, count in (cuts, (0, expert if "mlp.experts." in name else 1)):
        boxes = [
            (
                tuple(
                    offset + (number * part.shape[axis] if here == axis else 0) for here, offset in enumerate(offsets)
                ),
                part,
            )
            for offsets, box in boxes
            for number, part in enumerate(np.split(box, count, axis))
        ]
    return boxes


def saved_distributed(
    folder: Path,
    args: Mapping[str, Any],
    arrays: Arrays,
    *,
    tensor: int = 1,
    expert: int = 1,
    form: str = "stacked",
    **how: Any,
) -> Path:
    """`torch_dist`: layers in one tensor (stacked), by numbers (numbered), also experts and halves apart (single)."""
    tensors: dict[str, list[tuple[tuple[int, ...], np.ndarray]]] = {}
    is_gated = bool(args.get("swiglu"))
    for name, array in arrays.items():
        boxes = boxes_of(name, array, tensor, expert, is_gated)
        for old, new in FUSED.items():
            name = name.replace(old, new)
        if name.startswith("decoder.layers.") and form == "stacked":
            _, _, number, rest = name.split(".", 3)
            name = f"decoder.layers.{rest}"
            boxes = [((int(number), *offsets), box[None]) for offsets, box in boxes]
        if form == "single" and "mlp.experts." in name:
            for number, one in enumerate(array):
                own = name.replace("mlp.experts.", f"mlp.experts.experts.{number}.")
                halves = zip("wv", np.split(one, 2), strict=True) if "fc1" in name else [("", one)]
                tensors |= {f"{own}_{half}" if half else own: [((0, 0), part)] for half, part in halves}
            continue
        tensors.setdefault(name.replace("mlp.experts.", "mlp.experts.experts."), []).extend(boxes)
    return write_distributed(folder, tensors, args | parallelism(tensor, expert=expert), **how)
