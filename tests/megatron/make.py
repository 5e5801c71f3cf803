"""Writes the fixtures beside this file: checkpoints of small random models as Megatron-LM itself writes them.

    pip install torch==2.14.1 megatron-core==0.19.2 einops packaging pydantic regex psutil
    python -m tests.megatron.make [NAME ...]

Each is an archive of three things: `torch_dist` and `torch`, the same model in both formats by the processes of its
mesh, and `logits.npz`, which one process computed with the whole model in float32. Everything runs on CPUs. Weights are
small multiples of `STEP`, which bfloat16 has exactly; norms, biases and buffers are as random as matrices.
"""

import argparse
import contextlib
import os
import shutil
import sys
import tarfile
import tempfile
import types
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# its kernels are traced for GPUs otherwise
os.environ["TORCHDYNAMO_DISABLE"] = "1"

import numpy as np
import torch
from torch import distributed, multiprocessing

STEP = 1 / 64
ROWS, LENGTH, ITERATION = 2, 12, 7
COMMON = (
    "--num-layers 4 --hidden-size 32 --num-attention-heads 4 --seq-length 16 --max-position-embeddings 16 "
    "--vocab-size 90 --make-vocab-size-divisible-by 16 --tokenizer-type NullTokenizer --micro-batch-size 1 "
    "--train-iters 1 --lr 1e-4 --transformer-impl local --use-cpu-initialization --no-persist-layer-norm "
    "--no-gradient-accumulation-fusion --no-masked-softmax-fusion --no-rope-fusion "
)
LLAMA = (
    "--swiglu --normalization RMSNorm --disable-bias-linear --untie-embeddings-and-output-weights "
    "--position-embedding-type rope --group-query-attention --num-query-groups 2 --ffn-hidden-size 40 "
)


@dataclass(frozen=True)
class Model:
    """Its flags, and the mesh that saves it."""

    flags: str
    tensor: int = 1
    pipeline: int = 1
    expert: int = 1
    chunks: int = 1
    """Of each pipeline stage."""
    is_half: bool = False
    """Saved in bfloat16; logits are of float32 always."""


MODELS = {
    "gpt": Model("", tensor=2, pipeline=2),
    "llama": Model(
        f"{LLAMA} --kv-channels 12 --rotary-base 500 --rotary-percent 0.5 --use-rope-scaling --qk-layernorm "
        "--add-qkv-bias",
        tensor=2,
        pipeline=2,
        chunks=2,
        is_half=True,
    ),
    "moe": Model(
        f"{LLAMA} --num-experts 4 --moe-ffn-hidden-size 24 --moe-router-topk 2 --moe-layer-freq ([0]*1+[1]*3) "
        "--moe-shared-expert-intermediate-size 20 --moe-shared-expert-gate --moe-router-score-function sigmoid "
        "--moe-router-enable-expert-bias --moe-router-topk-scaling-factor 1.5 --moe-router-num-groups 2 "
        "--moe-router-group-topk 1",
        tensor=2,
        pipeline=2,
        expert=2,
    ),
    "mixtral": Model(f"{LLAMA} --num-experts 4 --moe-ffn-hidden-size 24 --moe-router-topk 2", expert=2),
}
WHOLE = Model("")


def on_cpus() -> None:
    """What Megatron-LM asks of GPUs, answered without one."""
    properties = types.SimpleNamespace(major=9, minor=0, name="none", total_memory=2**36, multi_processor_count=1)
    torch.cuda.get_device_properties = lambda *_: properties
    torch.cuda.current_device = lambda: "cpu"
    torch.cuda.synchronize = torch.cuda.empty_cache = lambda *_: None
    torch.Tensor.cuda = lambda self, *_, **__: self
    random = __import__("megatron.core.tensor_parallel.random", fromlist=["CudaRNGStatesTracker"])
    random.CudaRNGStatesTracker.fork = lambda *_: contextlib.nullcontext()


def arguments(name: str, mesh: Model) -> Any:
    """Those of a training on this mesh."""
    from megatron.training.arguments import add_megatron_arguments, validate_args

    words = f"{COMMON} {MODELS[name].flags} --tensor-model-parallel-size {mesh.tensor} --pipeline-model-parallel-size "
    words += f"{mesh.pipeline} --expert-model-parallel-size {mesh.expert}"
    words += " --bf16" * mesh.is_half
    if mesh.chunks > 1:
        words += f" --num-virtual-stages-per-pipeline-rank {mesh.chunks}"
    args = add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False)).parse_args(words.split())
    args.rank, args.world_size = distributed.get_rank(), distributed.get_world_size()
    args = validate_args(args)
    multiple = args.make_vocab_size_divisible_by * args.tensor_model_parallel_size
    args.padded_vocab_size = -(-args.vocab_size // multiple) * multiple
    return args


def build(args: Any, mesh: Model) -> list[torch.nn.Module]:
    """The chunks of the model that this process has."""
    from megatron.core import parallel_state
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
    from megatron.training.argument_utils import core_transformer_config_from_args

    config, found = core_transformer_config_from_args(args), []
    for chunk in range(mesh.chunks):
        stage = {"vp_stage": chunk if mesh.chunks > 1 else None}
        spec = get_gpt_decoder_block_spec(
            config, use_transformer_engine=False, normalization=args.normalization, **stage
        )
        model = GPTModel(
            config,
            spec,
            args.padded_vocab_size,
            args.max_position_embeddings,
            pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, **stage),
            post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, **stage),
            parallel_output=False,
            share_embeddings_and_output_weights=not args.untie_embeddings_and_output_weights,
            position_embedding_type=args.position_embedding_type,
            rotary_percent=args.rotary_percent,
            rotary_base=args.rotary_base,
            rope_scaling=args.use_rope_scaling,
            rope_scaling_factor=args.rope_scaling_factor,
            **stage,
        )
        found.append(model)
    return found


def randomize(model: torch.nn.Module) -> None:
    """Every parameter and buffer, in multiples of `STEP`."""
    generator = np.random.default_rng(0)
    for name, array in model.state_dict().items():
        if isinstance(array, torch.Tensor):
            is_vector = array.ndim < 2
            numbers = generator.standard_normal(tuple(array.shape)) * (0.2 if is_vector else 0.3)
            numbers += is_vector and "norm" in name and name.endswith("weight")
            whole = np.clip(np.rint(numbers / STEP), -127, 127)
            array.copy_(torch.from_numpy((whole * STEP).astype(np.float32)))


def work(rank: int, name: str, mesh: Model, folder: str, source: str | None, port: int) -> None:
    """What one process of a mesh does: the model anew, or of a checkpoint; then both formats, and perhaps logits."""
    count = mesh.tensor * mesh.pipeline * mesh.expert
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(count), LOCAL_RANK="0", CUDA_DEVICE_MAX_CONNECTIONS="1")
    distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=count)
    from megatron.core import dist_checkpointing, parallel_state

    on_cpus()
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=mesh.tensor,
        pipeline_model_parallel_size=mesh.pipeline,
        expert_model_parallel_size=mesh.expert,
        virtual_pipeline_model_parallel_size=mesh.chunks if mesh.chunks > 1 else None,
    )
    args = arguments(name, mesh)
    chunks = build(args, mesh)
    keys = ["model"] if len(chunks) == 1 else [f"model{number}" for number in range(len(chunks))]
    if source is None:
        randomize(chunks[0])
    else:
        wanted = {key: chunk.sharded_state_dict() for key, chunk in zip(keys, chunks, strict=True)}
        strict = dist_checkpointing.validation.StrictHandling.ASSUME_OK_UNEXPECTED
        loaded = dist_checkpointing.load(wanted, source, strict=strict)
        for key, chunk in zip(keys, chunks, strict=True):
            chunk.load_state_dict(loaded[key], strict=False)
            if mesh.is_half:
                chunk.bfloat16()
    rest = {"args": args, "checkpoint_version": 3.0, "iteration": ITERATION}
    save_distributed(
        Path(folder), rest | {key: chunk.sharded_state_dict() for key, chunk in zip(keys, chunks, strict=True)}
    )
    save_ranks(
        Path(folder),
        mesh,
        rest | {key: chunk.state_dict_for_save_checkpoint() for key, chunk in zip(keys, chunks, strict=True)},
    )
    if source is None:
        save_logits(Path(folder), chunks[0], args.vocab_size)
    distributed.barrier()
    distributed.destroy_process_group()


def save_distributed(folder: Path, state: dict[str, Any]) -> None:
    """`torch_dist`, by all processes."""
    from megatron.core import dist_checkpointing

    directory = folder / "torch_dist" / f"iter_{ITERATION:07d}"
    directory.mkdir(parents=True, exist_ok=True)
    distributed.barrier()
    dist_checkpointing.save(state, str(directory))
    (directory.parent / "latest_checkpointed_iteration.txt").write_text(str(ITERATION))


def save_ranks(folder: Path, mesh: Model, state: dict[str, Any]) -> None:
    """`torch`, by each process that has parameters of its own."""
    from megatron.core import parallel_state
    from megatron.training.checkpointing import get_checkpoint_name

    path = Path(
        get_checkpoint_name(
            str(folder / "torch"),
            ITERATION,
            tensor_rank=parallel_state.get_tensor_model_parallel_rank(),
            pipeline_rank=parallel_state.get_pipeline_model_parallel_rank(),
            pipeline_parallel=mesh.pipeline > 1,
            expert_rank=parallel_state.get_expert_model_parallel_rank(),
            expert_parallel=mesh.expert > 1,
        )
    )
    path.parent.mkdir(parents=True)
    torch.save(state, path)
    (folder / "torch" / "latest_checkpointed_iteration.txt").write_text(str(ITERATION))


def save_logits(folder: Path, model: torch.nn.Module, vocabulary: int) -> None:
    """Of random tokens, with the padding of the vocabulary."""
    tokens = torch.from_numpy(np.random.default_rng(1).integers(0, vocabulary, (ROWS, LENGTH)))
    places = torch.arange(LENGTH)[None].expand(ROWS, -1)
    hidden = torch.triu(torch.ones(LENGTH, LENGTH, dtype=torch.bool), 1)[None, None]
    with torch.no_grad():
        logits = model.eval()(tokens, places, hidden).float().numpy()
    np.savez(folder / "logits.npz", tokens=tokens.numpy().astype(np.int32), logits=logits)
    print(f"logits up to {np.abs(logits).max():.1f}")


def record(name: str, port: int) -> None:
    """The fixture of one model."""
    mesh = MODELS[name]
    with tempfile.TemporaryDirectory() as place:
        whole, parallel = Path(place) / "whole", Path(place) / name
        parallel.mkdir()
        multiprocessing.spawn(work, (name, WHOLE, str(whole), None, port), nprocs=1)
        source = str(whole / "torch_dist" / f"iter_{ITERATION:07d}")
        count = mesh.tensor * mesh.pipeline * mesh.expert
        multiprocessing.spawn(work, (name, mesh, str(parallel), source, port + 1), nprocs=count)
        shutil.move(whole / "logits.npz", parallel)
        path = Path(__file__).parent / f"{name}.tar.xz"
        with tarfile.open(path, "w:xz") as archive:
            archive.add(parallel, name, filter=without_owner)
    print(f"{path.name}: {path.stat().st_size:,} bytes")


def without_owner(member: tarfile.TarInfo) -> tarfile.TarInfo:
    """A member of an archive that says nothing of who made it."""
    member.uid = member.gid = member.mtime = 0
    member.uname = member.gname = ""
    return member


if __name__ == "__main__":
    for place, name in enumerate(sys.argv[1:] or MODELS):
        record(name, 29500 + os.getpid() % 1000 + 2 * place)
