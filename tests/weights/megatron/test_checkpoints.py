"""Tensors of Megatron-LM's checkpoints, bit for bit, whichever processes saved them in whichever format."""

from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest

from jaxtron.config import UserError, load
from jaxtron.data.config import DataConfig
from jaxtron.run.configuration import Configuration, TrainConfig
from jaxtron.run.session import make_session, make_trainer
from jaxtron.sharding.rules import use
from jaxtron.weights.hub import hub_settings
from jaxtron.weights.load import load_parameters
from jaxtron.weights.megatron.arrays import into_groups
from jaxtron.weights.megatron.files import open_checkpoint
from tests.megatron import fixtures
from tests.megatron.writer import write_ranks
from tests.support.logits import logits
from tests.weights.megatron.models import (
    ARGS,
    DIM,
    EXPERTS,
    GPT2,
    GROUPS,
    HEADS,
    HIDDEN,
    LAYERS,
    Arrays,
    parallelism,
    rank_models,
    saved_by_ranks,
    saved_distributed,
    whole_tensors,
)

TYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


def read(folder: Path, groups: int = GROUPS) -> Arrays:
    """All tensors of a checkpoint, queries, keys and values in one again."""
    files, _ = open_checkpoint(folder)
    found = {name: files.read(name) for name in files.tensors}
    assert {name: array.shape for name, array in found.items()} == {
        name: stored.shape for name, stored in files.tensors.items()
    }
    joined = {}
    for name, array in found.items():
        before, qkv, rest = name.partition(".linear_qkv.")
        part, _, kind = rest.partition(".")
        if not qkv:
            joined[name] = array[None] if name.endswith("gate_weight") else array
        elif part == "query":
            parts = [found[f"{before}{qkv}{one}.{kind}"] for one in ("query", "key", "value")]
            joined[f"{before}{qkv}{kind}"] = into_groups(*parts, groups, DIM)
    return joined


def check_same(found: Arrays, expected: Arrays) -> None:
    """Names, shapes and bits."""
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        wide = array.astype(np.float32)
        assert found[name].shape == wide.shape, name
        assert found[name].tobytes() == wide.tobytes(), name


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(
    ("tensor", "stages", "old"), [(1, 1, False), (2, 2, False), (2, 1, True), (1, 4, False)], ids=str
)
def test_ranks_of_dense_models(tensor: int, stages: int, old: bool, dtype: str, tmp_path: Path):
    for name, args in {"llama": ARGS, "gpt2": GPT2}.items():
        arrays = whole_tensors(args, TYPES[dtype])
        folder = saved_by_ranks(tmp_path / name, args, arrays, tensor=tensor, stages=stages, old=old)
        check_same(read(folder, GROUPS if name == "llama" else HEADS), arrays)


@pytest.mark.parametrize("form", ["grouped", "sequential"])
@pytest.mark.parametrize("mesh", [(1, 1, 1), (1, 1, 2), (2, 2, 4)], ids=str)
def test_ranks_of_experts(mesh: tuple[int, int, int], form: str, tmp_path: Path):
    arrays = whole_tensors(EXPERTS)
    tensor, stages, expert = mesh
    folder = saved_by_ranks(tmp_path, EXPERTS, arrays, experts=form, tensor=tensor, stages=stages, expert=expert)
    check_same(read(folder), arrays)


@pytest.mark.parametrize("form", ["stacked", "numbered", "single"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_distributed(form: str, dtype: str, tmp_path: Path):
    for name, args, mesh in (("llama", ARGS, (2, 1)), ("gpt2", GPT2, (2, 1)), ("experts", EXPERTS, (2, 2))):
        arrays = whole_tensors(args, TYPES[dtype])
        is_common = name == "gpt2"
        folder = saved_distributed(
            tmp_path / name, args, arrays, tensor=mesh[0], expert=mesh[1], form=form, common=is_common
        )
        check_same(read(folder, HEADS if name == "gpt2" else GROUPS), arrays)


@pytest.mark.parametrize("counts", [(2, 2), (3, 1)], ids=str)
def test_interleaved_stages(counts: tuple[int, int], tmp_path: Path):
    """Chunks of stages count their layers from 0, and need not have as many."""
    arrays = whole_tensors(ARGS)
    ranks: dict[str, dict[str, Any]] = {}
    # layers by chunk and stage, in order
    parts = [[0], [1], [2], [3]] if counts == (2, 2) else [[0, 1], [2], [], [3]]
    for number, layers in enumerate(parts):
        chunk, stage = divmod(number, 2)
        model = {
            f"decoder.layers.{place}.{name.split('.', 3)[3]}": array
            for place, layer in enumerate(layers)
            for name, array in arrays.items()
            if name.startswith(f"decoder.layers.{layer}.")
        }
        outside = ["embedding."] * (number == 0) + ["decoder.final", "output_layer."] * (number == 3)
        model |= {name: array for name, array in arrays.items() if name.startswith(tuple(outside))}
        ranks.setdefault(f"00_{stage:03d}", {})[f"model{chunk}"] = model
    check_same(read(write_ranks(tmp_path, ranks, ARGS | parallelism(stages=2))), arrays)


OLD_NAMES = {
    "embedding.": "language_model.embedding.",
    "decoder.layers.": "language_model.{}.layers.",
    "decoder.final_layernorm": "language_model.{}.final_{}",
    "output_layer": "language_model.output_layer",
    ".input_layernorm.": ".input_{}.",
    ".pre_mlp_layernorm.": ".post_attention_{}.",
    ".self_attention.": ".{}.",
    ".linear_qkv.": ".query_key_value.",
    ".linear_proj.": ".dense.",
    ".linear_fc1.": ".dense_h_to_4h.",
    ".linear_fc2.": ".dense_4h_to_h.",
}


def old_name(name: str, layers: str, norm: str, attention: str) -> str:
    """A tensor's before Megatron's core."""
    words = {"decoder.layers.": layers, "decoder.final_layernorm": layers, ".self_attention.": attention}
    for new, old in OLD_NAMES.items():
        fills = [words[new], norm] if new == "decoder.final_layernorm" else [words.get(new, norm)]
        name = name.replace(new, old.format(*fills))
    return name


def nested(model: Arrays, depth: int) -> dict[str, Any]:
    """In dictionaries by the first parts of their names."""
    found: dict[str, Any] = {}
    for name, array in model.items():
        *folders, last = name.split(".", depth)
        tree = found
        for folder in folders:
            tree = tree.setdefault(folder, {})
        tree[last] = array
    return found


@pytest.mark.parametrize("version", [0.0, None, 1.0, 2.0, 3.0], ids=str)
def test_names_and_orders_of_old_versions(version: float | None, tmp_path: Path):
    """Before version 2 queries, keys and values of heads lay otherwise; before core all names were others."""
    arrays = whole_tensors(GPT2)
    words = ("transformer", "layernorm", "attention") if not version else ("encoder", "norm", "self_attention")
    ranks = {}
    for rank, model in rank_models(arrays, tensor=2, stages=2, is_gated=False):
        heads = HEADS // 2
        for name in [name for name in model if "linear_qkv" in name]:
            rows = model[name].reshape(heads, 3, DIM, -1)
            if not version:
                rows = rows.transpose(1, 0, 2, 3)
            elif version < 2:
                rows = rows.transpose(0, 2, 1, 3)
            model[name] = np.ascontiguousarray(rows).reshape(model[name].shape)
        named = {old_name(name, *words): array for name, array in model.items()}
        if rank[1] == 1:
            # the last stage's copy of a tied head
            named["word_embeddings_for_head.weight"] = np.split(arrays["embedding.word_embeddings.weight"], 2)[rank[0]]
        ranks[f"{rank[0]:02d}_{rank[1]:03d}"] = {"model": nested(named, 3)}
    folder = write_ranks(tmp_path, ranks, GPT2 | parallelism(2, 2), version=version, old=not version)
    found = read(folder, HEADS)
    table = found.pop("output_layer.weight")
    assert np.array_equal(table, arrays["embedding.word_embeddings.weight"])
    check_same(found, arrays)


def test_what_transformer_engine_fuses_and_leaves_in_files(tmp_path: Path):
    arrays = whole_tensors(ARGS)
    fused = {
        "input_layernorm.": "self_attention.linear_qkv.layer_norm_",
        "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
    }
    model: dict[str, Any] = {}
    for name, array in arrays.items():
        for old, new in fused.items():
            name = name.replace(old, new)
        model[name] = array
    model["decoder.layers.0.self_attention.linear_qkv._extra_state"] = None
    model["decoder.layers.0.mlp.linear_fc1._extra_state"] = np.zeros(8, np.uint8)
    model["rotary_pos_emb.inv_freq"] = np.ones(3, np.float32)
    check_same(read(write_ranks(tmp_path, {"00": {"model": model, "optimizer": {"state": arrays}}}, ARGS)), arrays)


def test_views_with_strides_of_their_own(tmp_path: Path):
    arrays = whole_tensors(ARGS)
    name = "decoder.layers.1.mlp.linear_fc2.weight"
    base = np.random.default_rng(1).standard_normal((12, HIDDEN)).astype(np.float32)
    arrays[name] = base.T
    assert not arrays[name].flags.c_contiguous
    folder = write_ranks(tmp_path, {"00": {"model": arrays}}, ARGS)
    assert open_checkpoint(folder)[0].read(name).tobytes() == np.ascontiguousarray(base.T).tobytes()


def test_norms_by_the_root_mean_square_whose_scale_is_stored_less_one(tmp_path: Path):
    arrays = whole_tensors(ARGS)
    found = read(saved_by_ranks(tmp_path, ARGS | {"layernorm_zero_centered_gamma": True}, arrays))
    for name, array in arrays.items():
        expected = array + 1 if name.endswith("norm.weight") else array
        assert np.array_equal(found[name], expected), name


def test_directories_of_runs_and_of_iterations(tmp_path: Path):
    arrays = whole_tensors(ARGS)
    folder = saved_by_ranks(tmp_path, ARGS, arrays)
    check_same(read(folder / "iter_0000007"), arrays)
    (folder / "iter_0000007").rename(folder / "release")
    (folder / "latest_checkpointed_iteration.txt").write_text("release\n")
    check_same(read(folder), arrays)
    (folder / "latest_checkpointed_iteration.txt").write_text("8")
    with pytest.raises(UserError, match="says that iter_0000008 is the newest, and it is not there"):
        open_checkpoint(folder)


@pytest.mark.parametrize("name", fixtures.NAMES)
def test_what_megatron_wrote_computes_what_megatron_computes(name: str, rules_for, tmp_path: Path):
    """Both formats of all processes have the same bits, and the logits are those of Megatron-LM's whole model."""
    folder = fixtures.unpack(name, tmp_path)
    leaves, config = {}, None
    for form in ("torch", "torch_dist"):
        config = load(Configuration, None, ["--data.sequence_length", "12"], under=hub_settings(folder / form))
        with use(rules_for(data=1)):
            train = TrainConfig(global_batch=fixtures.logits(folder)[0].shape[0], precision="fp32")
            run = Configuration(model=config.model, train=train, data=DataConfig(sequence_length=12))
            trainer = make_trainer(run)
            params = load_parameters(folder / form, config.model, trainer.blueprint, trainer.partitions)
            leaves[form] = [np.asarray(leaf) for leaf in jax.tree.leaves(params)]
            if form == "torch_dist":
                tokens, expected = fixtures.logits(folder)
                found = logits(trainer, params, tokens)[..., : expected.shape[-1]]
    assert all(map(np.array_equal, *leaves.values()))
    assert np.abs(expected).max() > 2
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-5)


def test_parameters_are_the_same_on_a_mesh(tmp_path: Path):
    folder = saved_distributed(tmp_path, EXPERTS, whole_tensors(EXPERTS), tensor=2, expert=2)
    found = []
    for flags, devices in (("", 1), ("--mesh.pipe 2 --mesh.tensor 2 --mesh.expert 2 --mesh.fsdp 2", 8)):
        words = ["--data.sequence_length", "16", "--train.global_batch", "16", *flags.split()]
        config = load(Configuration, None, words, under=hub_settings(folder))
        session = make_session(config, jax.devices()[:devices], trains=False)
        with session.use():
            params = load_parameters(folder, config.model, session.blueprint, session.trainer.partitions)
        leaves = zip(session.blueprint.names.items(), jax.tree.leaves(params), strict=True)
        found.append({name: np.asarray(leaf)[tuple(map(slice, spec.shape))] for (name, spec), leaf in leaves})
    assert LAYERS == 4 and found[0].keys() == found[1].keys()
    assert all(np.array_equal(found[0][name], found[1][name]) for name in found[0])
