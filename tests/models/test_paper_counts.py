"""The configurations of the papers: their layouts, parameters and operations are those that the papers print."""

import functools
import math
import re
from pathlib import Path

import jax
import pytest

from jaxtron.config import load
from jaxtron.gpus import gpu_named
from jaxtron.models.decoder.cost import (
    hardware_flops_per_token,
    model_flops_per_token,
    num_active_parameters,
    num_parameters,
    period_parameters,
)
from jaxtron.models.encoder.cost import embedding_parameters, layer_parameters
from jaxtron.models.program import make_parts
from jaxtron.plan.formula.memory_model import Estimator
from jaxtron.run.configuration import Configuration, configuration_type
from jaxtron.sharding.blueprint import Blueprint
from jaxtron.sharding.folding import FLAGS
from jaxtron.sharding.mesh import abstract_mesh
from jaxtron.sharding.rules import make_rules, use

ROOT = Path(__file__).parents[2]
NAMES = sorted(path.stem for path in (ROOT / "configs").glob("*.yaml"))

# 1909.08053, Tables 1 and 2: layers, hidden size, heads, model-parallel GPUs, all GPUs, billions of parameters
GPT2 = {
    "gpt2_scaling_1.2b": (40, 1536, 16, 1, 64, "1.2"),
    "gpt2_scaling_2.5b": (54, 1920, 20, 2, 128, "2.5"),
    "gpt2_scaling_4.2b": (64, 2304, 24, 4, 256, "4.2"),
    "gpt2_scaling_8.3b": (72, 3072, 32, 8, 512, "8.3"),
    "gpt2_355m": (24, 1024, 16, 1, 64, "0.355"),
    "gpt2_2.5b": (54, 1920, 20, 2, 128, "2.5"),
    "gpt2_8.3b": (72, 3072, 24, 8, 512, "8.3"),
}

# 1909.08053, Table 4: layers, hidden size, heads, all GPUs, billions of parameters; and of Sec. 4.2 the steps
BERT = {
    "bert_336m": (24, 1024, 16, 128, "0.336", 2_000_000),
    "bert_1.3b": (24, 2048, 32, 256, "1.3", 2_000_000),
    "bert_3.9b": (48, 2560, 40, 512, "3.9", 1_500_000),
}

# 2204.06644: layers, of those that fill masks, hidden size, heads, GPUs, millions of parameters of what is kept (those
# of its authors' encoders with a vocabulary of 128,000), learning rate, steps, clipping
METRO = {
    "metro_base": (12, 4, 768, 12, 64, 184, 4e-4, 125_000, 0.0),
    "metro_large": (24, 6, 1024, 16, 256, 434, 1e-4, 2_000_000, 2.0),
}

# 2104.04473, Table 1: layers, hidden size, heads, tensor and pipeline sizes, GPUs, batch, billions of parameters;
# and from the authors' script for it: microbatch and layers of a chunk (none: not interleaved)
PTDP = {
    "ptdp_1.7b": (24, 2304, 24, 1, 1, 32, 512, "1.7", 16, None),
    "ptdp_3.6b": (30, 3072, 32, 2, 1, 64, 512, "3.6", 16, None),
    "ptdp_7.5b": (36, 4096, 32, 4, 1, 128, 512, "7.5", 16, None),
    "ptdp_18.4b": (40, 6144, 48, 8, 1, 256, 1024, "18.4", 8, None),
    "ptdp_39.1b": (48, 8192, 64, 8, 2, 512, 1536, "39.1", 4, None),
    "ptdp_76.1b": (60, 10240, 80, 8, 4, 1024, 1792, "76.1", 2, 5),
    "ptdp_145.6b": (80, 12288, 96, 8, 8, 1536, 2304, "145.6", 2, 5),
    "ptdp_310.1b": (96, 16384, 128, 8, 16, 1920, 2160, "310.1", 1, 3),
    "ptdp_529.6b": (105, 20480, 128, 8, 35, 2520, 2520, "529.6", 1, 1),
    "ptdp_1008b": (128, 25600, 160, 8, 64, 3072, 3072, "1008.0", 1, None),
}

# 2205.05198, Tables 3 and 5: layers, hidden size, heads, tensor and pipeline sizes, GPUs, batch, microbatch,
# seconds of a step, model and hardware FLOPs in percent of the peak
SELECTIVE = {
    "gpt_22b": (48, 6144, 64, 8, 1, 8, 4, 4, 1.10, 41.5, 43.7),
    "gpt_175b": (96, 12288, 96, 8, 8, 64, 64, 1, 13.75, 51.4, 52.8),
    "gpt_530b": (105, 20480, 128, 8, 35, 280, 280, 1, 37.83, 56.0, 57.0),
    "gpt_1t": (128, 25600, 160, 8, 64, 512, 512, 1, 71.49, 56.3, 57.0),
}

# Other papers: tensor, pipeline and data sizes. Those of PaLM, Yi and Llama, but for 405B, are ours.
LAYOUTS = {
    "mt_nlg_530b": (8, 35, 8),
    "bloom_176b": (4, 12, 8),
    "nemotron_4_15b": (8, 1, 96),
    "llama_3.1_405b": (8, 16, 128),
    "palm_8b": (2, 1, 32),
    "palm_62b": (8, 4, 16),
    "palm_540b": (8, 20, 16),
    "yi_6b": (2, 1, 32),
    "yi_34b": (8, 1, 32),
    "llama_2_7b": (2, 1, 64),
    "llama_2_13b": (4, 1, 64),
    "llama_2_70b": (8, 4, 16),
    "llama_3_8b": (2, 1, 32),
    "llama_3_70b": (8, 4, 16),
}

# Mixtures: tensor, pipeline, data and expert sizes, which of 8x22B, G8T8, 8x70B and Qwen2 are those of 2504.14960,
# Table 3, and of E8T2 those of 2412.09952; billions of all parameters and of those of a token, as they are known
MIXTURES = {
    "mixtral_8x7b": (2, 2, 16, 8, "46.7", "12.9"),
    "mixtral_8x22b": (2, 8, 8, 8, "140.6", "39.2"),
    "mixtral_8x22b_g8t8": (4, 8, 4, 8, "140.6", None),
    "qwen2_57b_a14b": (2, 4, 8, 4, "57.4", "14.2"),
    "llama_3_8x70b": (8, 16, 2, 8, "465.2", None),
    # of all layers; the paper's 34.4 and 11.8 are those of some
    "llama_3_8b_e8t2": (2, 4, 64, 8, "47.5", "13.7"),
    "nemotron_4_15b_e8g1t2": (4, 4, 8, 8, None, None),
    "nemotron_4_15b_e8g8t8": (4, 4, 8, 8, None, None),
    "qwen3_30b_a3b": (1, 2, 16, 8, "30.5", "3.4"),
    # the paper's 3.61 are those without the table that tokens are looked up in
    "gpt_oss_20b": (1, 2, 16, 8, "20.9", "4.2"),
    # 2412.19437, Sec. 3.2: 16 stages, experts over 64 devices, 2,048 GPUs
    "deepseek_v3": (1, 16, 128, 64, "671.0", "37.6"),
}

# Models with state-space layers and what the study compares them with: sizes of the mesh that are not 1, and parameters
# as they are printed. 2406.07887 ran on 1,024 GPUs, 4 parts x 256 replicas; layouts of longer sequences are ours.
STATE_SPACE = {
    "mamba2_130m": ({"data": 8}, None),
    "mamba2_370m": ({"data": 8}, None),
    "mamba2_780m": ({"data": 8}, None),
    "mamba2_1.3b": ({"data": 8}, "1.3"),
    "mamba2_2.7b": ({"data": 8}, "2.7"),
    "mamba2_8b": ({"data": 256, "tensor": 4}, "8.24"),
    "mamba2_hybrid_8b": ({"data": 256, "tensor": 4}, "8.66"),
    "mamba2_hybrid_8b_16k": ({"data": 64, "context": 4, "tensor": 4}, "8.66"),
    "mamba2_hybrid_8b_32k": ({"data": 32, "context": 8, "tensor": 4}, "8.66"),
    "mamba2_hybrid_8b_128k": ({"data": 16, "context": 16, "tensor": 4}, "8.66"),
    "transformer_8b": ({"data": 256, "tensor": 4}, "8.53"),
    # called 840M, which with this vocabulary none of them has
    "mamba2_840m": ({"data": 256}, None),
    "mamba2_hybrid_840m": ({"data": 256}, None),
    "transformer_840m": ({"data": 256}, None),
    "nemotron_h_8b": ({"data": 192, "tensor": 4}, "8.1"),
    "bamba_9b": ({"fsdp": 192}, "9.78"),
}

# Mamba: tensor and data sizes, layers and hidden size, billions of parameters; layouts are ours but for that of 8B
MAMBA = {
    "mamba_130m": (1, 8, 24, 768, None),
    "mamba_370m": (1, 16, 48, 1024, None),
    "mamba_790m": (1, 16, 48, 1536, None),
    "mamba_1.4b": (1, 32, 48, 2048, None),
    "mamba_2.8b": (1, 64, 64, 2560, None),
    "mamba_8b": (4, 256, 56, 4096, "8.15"),
}

# The parameters that the released weights of these have, and for PaLM what its Table 1 prints, in billions
RELEASED = {
    "t5_small": 60_506_624,
    "t5_base": 222_903_552,
    "t5_large": 737_668_096,
    "t5_3b": 2_851_598_336,
    "t5_11b": 11_307_321_344,
    "t5_v1_1_small": 76_961_152,
    "t5_v1_1_base": 247_577_856,
    "t5_v1_1_large": 783_150_080,
    "t5_v1_1_xl": 2_849_757_184,
    "t5_v1_1_xxl": 11_135_332_352,
    "llama_2_7b": 6_738_415_616,
    "llama_2_13b": 13_015_864_320,
    "llama_2_70b": 68_976_648_192,
    "llama_3_8b": 8_030_261_248,
    "llama_3_70b": 70_553_706_496,
    "llama_3.1_405b": 405_853_388_800,
    "yi_6b": 6_061_035_520,
    "yi_34b": 34_388_917_248,
    "mixtral_8x7b": 46_702_792_704,
    "mamba_130m": 129_135_360,
    "mamba_370m": 371_516_416,
    "mamba_790m": 793_204_224,
    "mamba_1.4b": 1_372_178_432,
    "mamba_2.8b": 2_768_345_600,
    "qwen3_30b_a3b": 30_532_122_624,
    "deepseek_v3": 671_026_404_352,
    "gpt_oss_20b": 20_914_757_184,
}
PALM = {"palm_8b": 8.63, "palm_62b": 62.50, "palm_540b": 540.35}

A100, H100 = 312e12, 989e12


@functools.cache
def configuration(name: str, *flags: str) -> Configuration:
    path = ROOT / "configs" / f"{name}.yaml"
    return load(configuration_type([str(path)]), path, flags).resolved()


def sizes(config: Configuration) -> dict[str, int]:
    """The mesh that the file spells out; what it leaves to fill is one."""
    return {axis: max(getattr(config.mesh, axis), 1) for axis in FLAGS}


def count(name: str) -> int:
    config = configuration(name)
    return config.family.num_parameters(config.model, config.data.sequence_length)


def flops_per_step(name: str) -> tuple[float, float]:
    """Model and hardware FLOPs."""
    config = configuration(name)
    tokens = config.train.global_batch * config.data.sequence_length
    arguments = config.model, config.data.sequence_length
    return tokens * model_flops_per_token(*arguments), tokens * hardware_flops_per_token(*arguments)


def shape(name: str) -> tuple[int, int, int]:
    model = configuration(name).model
    return model.num_layers, model.hidden_size, model.num_heads


def abstract_model(config: Configuration) -> Blueprint:
    return make_parts(config.model, "float32", config.stage_plan(sizes(config)["pipe"])).blueprint


def specs_on(config: Configuration, plan: Blueprint) -> list:
    """Where every parameter lies on the configuration's own mesh; a `UserError` where a size does not divide."""
    rules = make_rules(abstract_mesh(config.mesh, math.prod(sizes(config).values())), config.sharding)
    return [rules.parameter_layout(spec.axes, spec.shape).spec for spec in jax.tree.leaves(plan.parameters)]


def test_every_configuration_of_a_paper_is_tested_here():
    tiny = {"bert_tiny", "metro_tiny", "t5_tiny", "gpt_tiny", "moe_tiny", "mamba_tiny", "hybrid_tiny"}
    t5 = {name for name in RELEASED if name.startswith("t5_")}
    others = tiny | {"gpt_1b", "shakespeare_char", "llama3_8b_128k", "wikitext2"}
    papers = {*GPT2, *PTDP, *SELECTIVE, *LAYOUTS, *MIXTURES, *STATE_SPACE, *MAMBA, *BERT, *METRO}
    assert papers | t5 == {*NAMES} - others


@pytest.mark.parametrize("name", NAMES)
def test_it_fits_its_mesh_and_has_as_many_parameters_as_the_real_model(name, rules_for):
    config = configuration(name)
    config.check_mesh(sizes(config))
    with use(rules_for()):
        plan = abstract_model(config)
    assert plan.num_parameters == count(name)
    assert len(specs_on(config, plan)) == len(jax.tree.leaves(plan.parameters))


def test_a_trillion_parameters_fit_3072_gpus_too(rules_for):
    config = configuration("gpt_1t", "--mesh.data", "6", "--train.global_batch", "3072")
    assert math.prod(sizes(config).values()) == 3072
    config.check_mesh(sizes(config))
    with use(rules_for()):
        specs_on(config, abstract_model(config))


@pytest.mark.parametrize("name", GPT2)
def test_megatron_lm_tables(name):
    layers, hidden, heads, tensor, gpus, billions = GPT2[name]
    config = configuration(name)
    assert shape(name) == (layers, hidden, heads)
    assert sizes(config) == {"pipe": 1, "data": gpus // tensor, "fsdp": 1, "context": 1, "tensor": tensor}
    assert (config.train.global_batch, config.data.sequence_length, config.model.padded_vocab) == (512, 1024, 51200)
    # to as many digits as are printed; 355,788,800 is printed as 355M
    assert abs(count(name) / 1e9 - float(billions)) < (0.001 if "0.355" == billions else 0.05)


@pytest.mark.parametrize("name", BERT)
def test_berts_of_megatron_lm(name):
    layers, hidden, heads, gpus, billions, steps = BERT[name]
    config = configuration(name)
    assert shape(name) == (layers, hidden, heads) and hidden == 64 * heads
    assert math.prod(sizes(config).values()) == gpus
    train = config.train
    assert (train.steps, train.global_batch, train.precision, config.model.padded_vocab) == (steps, 1024, "fp16", 30720)
    assert (config.optimizer.learning_rate, config.optimizer.warmup_steps) == (1e-4, 10_000)
    assert config.optimizer.decay_steps in (None, 2_000_000) and config.model.pairs == "order"
    # to as many digits as are printed: 336,429,058 and 3,869,588,482; the second is 1,281,001,474
    assert abs(count(name) / 1e9 - float(billions)) < (0.0005 if billions == "0.336" else 0.05)


@pytest.mark.parametrize("name", METRO)
def test_metro_lms(name):
    layers, auxiliary, hidden, heads, gpus, millions, rate, steps, clip = METRO[name]
    config = configuration(name)
    model, train, optimizer = config.model, config.train, config.optimizer
    assert shape(name) == (layers, hidden, heads) and model.auxiliary_layers == auxiliary
    assert math.prod(sizes(config).values()) == gpus and model.padded_vocab == 128_000
    # 1.05 million tokens
    assert (train.steps, train.global_batch * config.data.sequence_length) == (steps, 2**20)
    assert (optimizer.learning_rate, optimizer.clip_norm, optimizer.warmup_steps) == (rate, clip, 10_000)
    assert (optimizer.beta2, optimizer.epsilon, optimizer.weight_decay) == (0.98, 1e-6, 0.01)
    kept = embedding_parameters(model, 512) + layers * layer_parameters(model)
    assert round(kept / 1e6) == millions


@pytest.mark.parametrize("name", PTDP)
def test_rows_of_2104_04473(name):
    layers, hidden, heads, tensor, pipe, gpus, batch, billions, microbatch, chunk = PTDP[name]
    config = configuration(name)
    data = gpus // (tensor * pipe)
    assert shape(name) == (layers, hidden, heads)
    assert sizes(config) == {"pipe": pipe, "data": data, "fsdp": 1, "context": 1, "tensor": tensor}
    assert config.train.global_batch == batch == config.train.microbatches * data * microbatch
    assert f"{count(name) / 1e9:.1f}" == billions
    assert config.pipeline.schedule == ("interleaved" if chunk else "1f1b")
    assert set(config.stage_plan(pipe).partitions[0].lengths) == {chunk or layers // pipe}
    # Eq. 3, with every layer computed again
    expected = 96 * batch * 2048 * layers * hidden**2 * (1 + 2048 / (6 * hidden) + 51200 / (16 * layers * hidden))
    assert flops_per_step(name)[1] == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("name", [*GPT2, *PTDP, *SELECTIVE, "mt_nlg_530b"])
def test_a_gpt_has_the_parameters_of_equation_two_and_a_final_norm(name):
    # 2104.04473, Eq. 2 in whole numbers: 12 l h^2 (1 + 13/12h + (V + s)/12lh); the final norm's scale and bias are 2 h
    layers, hidden, _ = shape(name)
    length = configuration(name).data.sequence_length
    equation = 12 * layers * hidden**2 + 13 * layers * hidden + (51200 + length) * hidden
    assert count(name) == equation + 2 * hidden


@pytest.mark.parametrize("name", SELECTIVE)
def test_rows_of_2205_05198(name):
    layers, hidden, heads, tensor, pipe, gpus, batch, microbatch, seconds, model_percent, hardware_percent = SELECTIVE[
        name
    ]
    config = configuration(name)
    assert shape(name) == (layers, hidden, heads)
    assert sizes(config) == {"pipe": pipe, "data": 1, "fsdp": 1, "context": 1, "tensor": tensor}
    assert pipe * tensor == gpus
    assert (config.train.global_batch, config.train.microbatches) == (batch, batch // microbatch)
    assert config.pipeline.chunks == (3 if name in ("gpt_175b", "gpt_530b") else 1)
    model, hardware = flops_per_step(name)
    scale = 72 * batch * layers * 2048 * hidden**2
    head = 51200 / (12 * layers * hidden)
    assert model == pytest.approx(scale * (1 + 2048 / (6 * hidden) + head), rel=1e-12)
    # App. A counts three times the two products that are computed again
    printed = scale * (1 + 2048 / (3 * hidden) + head)
    assert model + 3 * (hardware - model) == pytest.approx(printed, rel=1e-12)
    # seconds are printed to 1% (22B) or better
    for flops, percent in ((model, model_percent), (printed, hardware_percent)):
        assert 100 * flops / (seconds * gpus * A100) == pytest.approx(percent, abs=0.2)


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts_of_other_papers(name):
    tensor, pipe, data = LAYOUTS[name]
    assert sizes(configuration(name)) == {"pipe": pipe, "data": data, "fsdp": 1, "context": 1, "tensor": tensor}


def test_mt_nlg():
    # 2201.11990, Sec. 2.4: seconds of a step and hardware TFLOP/s of a GPU, on 280, 350 and 420 nodes
    assert shape("mt_nlg_530b") == shape("gpt_530b")
    model, hardware = flops_per_step("mt_nlg_530b")
    for nodes, seconds, printed in ((280, 60.1, 126), (350, 50.2, 121), (420, 44.4, 113)):
        assert hardware / (seconds * nodes * 8) / 1e12 == pytest.approx(printed, abs=0.75)
    # PaLM (2204.02311, p. 9) makes the first 30.2% of the peak, without what is computed again
    assert 100 * model / (60.1 * 2240 * A100) == pytest.approx(30.2, abs=0.05)
    config = configuration("mt_nlg_530b", "--mesh.data", "10", "--train.microbatches", "192", "--train.batch_ramp=none")
    config.check_mesh({**sizes(config), "data": 10})


def test_bloom():
    # 2211.05100: 176,247M parameters
    assert round(count("bloom_176b") / 1e6) == 176_247
    config = configuration("bloom_176b")
    assert (config.model.vocab_size, config.model.padded_vocab) == (250_680, 250_880)
    assert config.stage_plan(12).partitions[0].lengths == (5, *[6] * 10, 5)
    assert config.train.global_batch == config.train.microbatches * 8 * 2


def test_nemotron():
    # 2402.16819, Sec. 2: 3.2 billion parameters of embeddings and 12.5 billion others
    config = configuration("nemotron_4_15b")
    tables = 2 * 256_000 * 6144
    assert config.model.padded_vocab == 256_000
    assert tables == pytest.approx(3.2e9, abs=0.06e9)
    assert f"{(count('nemotron_4_15b') - tables) / 1e9:.1f}" == "12.5"
    # Table 2: 0.57 s a step is 34.3% of the peak; half of the last digit of the time is 0.9%
    model, _ = flops_per_step("nemotron_4_15b")
    assert 100 * model / (0.57 * 768 * H100) == pytest.approx(34.3, rel=0.01)
    # the rows of Table 2: also 288 replicas share the state of 6144 channels
    for replicas, batch in ((96, 384), (192, 768), (288, 1152)):
        flags = ("--mesh.data", str(replicas), "--train.global_batch", str(batch))
        row = configuration("nemotron_4_15b", *flags)
        row.check_mesh(sizes(row))
        rules = make_rules(abstract_mesh(row.mesh, math.prod(sizes(row).values())), row.sharding)
        layout = rules.parameter_layout(("vocab", "embed"), (256_000, 6144))
        assert rules.part(layout) == (32_000, math.ceil(6144 / replicas))


@pytest.mark.parametrize("name", PALM)
def test_palm(name):
    # 540,356,474,880 is printed as 540.35 billion
    assert abs(count(name) / 1e9 - PALM[name]) < 0.01
    model = configuration(name).model
    assert (model.head_size, model.kv_heads, model.mlp_width) == (256, 1, 4 * model.hidden_size)


def test_palm_540b_stages_and_heads():
    config = configuration("palm_540b")
    assert config.model.num_heads * config.model.head_size == 12_288
    assert config.stage_plan(20).partitions[0].lengths == (5, *[6] * 18, 5)


@pytest.mark.parametrize("name", MIXTURES)
def test_mixtures(name):
    tensor, pipe, data, expert, total, active = MIXTURES[name]
    config = configuration(name)
    assert sizes(config) == {"pipe": pipe, "data": data, "fsdp": 1, "context": 1, "tensor": tensor}
    assert (config.mesh.expert, config.mesh.expert_tensor) == (expert, 1)
    found = count(name), num_active_parameters(config.model, config.data.sequence_length)
    for parameters, billions in zip(found, (total, active), strict=True):
        assert billions is None or f"{parameters / 1e9:.1f}" == billions
    # FLOPs are those of the dense model with as many parameters, but for the look-up and the square of scores
    model, length = config.model, config.data.sequence_length
    heads = next(kind.heads for kind in model.kinds if kind.heads)(model)
    seen = {"all": length, "window": model.attention.window or 0}
    seen_by_all = sum(model.layout.count(kind.symbol) * seen[kind.attends] for kind in model.kinds if kind.attends)
    scores = 6 * seen_by_all * model.num_heads * (heads.key + heads.value)
    table = 6 * model.padded_vocab * model.hidden_size
    assert model_flops_per_token(model, length) == pytest.approx(6 * found[1] - table + scores, rel=1e-3)


@pytest.mark.parametrize("name", STATE_SPACE)
def test_state_space_models(name):
    mesh, billions = STATE_SPACE[name]
    config = configuration(name)
    assert sizes(config) == {flag: mesh.get(flag, 1) for flag in ("pipe", "data", "fsdp", "context", "tensor")}
    # 8,654,517,248 is printed as 8.66 billion, and 8,540,135,424 as 8.53
    assert billions is None or abs(count(name) / 1e9 - float(billions)) < (0.011 if len(billions) == 4 else 0.05)
    # four million tokens a step, of the smaller Mamba-2 half a million or one
    tokens = config.train.global_batch * config.data.sequence_length
    assert tokens == 2**22 or name.startswith(("mamba2_1", "mamba2_2", "mamba2_3", "mamba2_7", "nemotron", "bamba"))


@pytest.mark.parametrize("name", [name for name in STATE_SPACE if not name.startswith("transformer")])
def test_parameters_of_state_space_models_are_those_of_the_released_code(name):
    # rows of the first product: z, x, B, C and the heads' steps; a convolution of width 4 with a bias over x, B, C
    model, layers = configuration(name).model, "".join(map("".join, configuration(name).model.layout.layers))
    hidden, state, groups = model.hidden_size, 128, model.mamba.num_groups
    inner, heads = 2 * hidden, 2 * hidden // 64
    mixer = hidden * (2 * inner + 2 * groups * state + heads) + 5 * (inner + 2 * groups * state) + 3 * heads + inner
    attention = 2 * hidden * (hidden + 8 * 128) if hidden == 4096 else 2 * hidden * (hidden + 8 * 64)
    mlp = (3 if model.activation == "swiglu" else 2) * hidden * model.mlp_width
    sizes = {"M": mixer + inner * hidden, "*": attention, "-": mlp}
    tables = hidden * model.padded_vocab * (1 if model.tied_head else 2)
    assert count(name) == tables + hidden + sum(sizes[symbol] + hidden for symbol in layers)
    assert groups == (1 if model.tied_head or name == "bamba_9b" else 8)


def test_patterns_of_hybrids():
    # Megatron-LM's examples/mamba, and the released configurations of Nemotron-H and Bamba
    found = {name: configuration(name).model.pattern for name in STATE_SPACE}
    eight = "M-M-M--M-M*-M-M-M-M--M*-M-M-M-M-M*--M-M-M-M-M*-M--M-M-M-"
    assert {found[f"mamba2_hybrid_8b{length}"] for length in ("", "_16k", "_32k", "_128k")} == {eight}
    assert found["mamba2_hybrid_840m"] == "M-M-M--M-*M-M-M-M--*M-M-M-M-*M--M-M-M-*M-M--M-M-"
    counts = [found["nemotron_h_8b"].count(symbol) for symbol in "M*-"]
    assert counts == [24, 4, 24] and found["nemotron_h_8b"].split("*")[1:4] == ["-M-M-M-M-M"] * 3
    layers = found["bamba_9b"].split("-")[:-1]
    assert len(layers) == 32 and [number for number, layer in enumerate(layers) if layer == "*"] == [9, 18, 27]


def test_experts_of_upcycled_models_have_the_dense_models_parameters():
    # 2410.07524: E copies of the MLP, whole or cut in G, each token through T of them
    dense = configuration("nemotron_4_15b").model
    mlps = 2 * dense.num_layers * dense.hidden_size * dense.mlp_width
    for name, experts, parts, chosen in (("e8g1t2", 8, 1, 2), ("e8g8t8", 64, 8, 8)):
        config = configuration(f"nemotron_4_15b_{name}")
        routers = dense.num_layers * dense.hidden_size * experts
        assert (config.model.moe.num_experts, config.model.moe.top_k) == (experts, chosen)
        assert count(f"nemotron_4_15b_{name}") == count("nemotron_4_15b") + 7 * mlps + routers
        active = num_active_parameters(config.model, 4096)
        assert active == count("nemotron_4_15b") + (chosen // parts - 1) * mlps + routers
    # with a vocabulary of 32,000 rows the Mixtral that was released first
    assert num_parameters(configuration("mixtral_8x22b", "--model.vocab_size", "32000").model, 4096) == 140_620_634_112


def test_gpt_oss():
    # 2508.10925, Table 1: billions of parameters of the MLPs, of attention, of tables, all, and active
    config = configuration("gpt_oss_20b")
    model, table = config.model, 201_088 * 2880
    layers = period_parameters(model) * model.num_layers
    experts = 24 * (32 * (3 * 2880**2 + 3 * 2880) + 32 * (2880 + 1))
    attention = layers - experts - 4 * model.num_layers * 2880
    active = num_active_parameters(model, 4096) - table
    found = [f"{number / 1e9:.2f}" for number in (experts, attention, 2 * table, count("gpt_oss_20b"), active)]
    assert found == ["19.12", "0.64", "1.16", "20.91", "3.61"]
    # windows of 128 tokens in every other layer, the first among them
    assert "".join(map("".join, model.layout.layers)) == "WE*E" * 12 and model.attention.window == 128


@pytest.mark.parametrize(
    ("name", "gpu"),
    [
        ("llama_3_8x70b", "h100"),
        ("deepseek_v3", "h100"),
        ("gpt_oss_20b", "h100"),
        ("mamba2_2.7b", "a100"),
        ("mamba2_8b", "h100"),
        pytest.param("mamba2_hybrid_8b_128k", "h100", marks=pytest.mark.slow),
        pytest.param("bamba_9b", "a100", marks=pytest.mark.slow),
    ],
)
def test_they_fit_their_gpus(name, gpu):
    config = configuration(name)
    memory = Estimator(config).memory(config, sizes(config), gpu_named(gpu))
    assert memory.fits and memory.total <= 80e9


@pytest.mark.parametrize("name", MAMBA)
def test_mamba(name):
    tensor, data, layers, hidden, billions = MAMBA[name]
    config = configuration(name)
    assert (config.model.layout.layers, config.model.hidden_size) == ((("m",),) * layers, hidden)
    assert sizes(config) == {"pipe": 1, "data": data, "fsdp": 1, "context": 1, "tensor": tensor}
    assert billions is None or f"{count(name) / 1e9:.2f}" == billions


@pytest.mark.parametrize("name", RELEASED)
def test_as_many_parameters_as_the_released_weights(name):
    assert count(name) == RELEASED[name]


def test_llama_405b_has_a_layer_less_at_both_ends():
    # 2407.21783, Sec. 3.3.2, whose stages of 8 layers are two parts of 4 here
    assert configuration("llama_3.1_405b").stage_plan(16).partitions[0].lengths == (3, *[4] * 30, 3)


def test_the_page_of_configurations_says_what_the_files_say():
    page = (ROOT / "docs" / "configurations.md").read_text()
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in page.splitlines() if "](../configs/" in line
    ]
    found = {re.findall(r"configs/(.+)\.yaml\)", row[0])[0]: row for row in rows}
    assert sorted(found) == NAMES
    for name, (_, _, _, layout, gpus, parameters) in found.items():
        mesh = sizes(configuration(name))
        assert layout == f"{mesh['tensor']} x {mesh['pipe']} x {mesh['data']}"
        assert (gpus, parameters) == (f"{math.prod(mesh.values()):,}", f"{count(name):,}")
    for name in MIXTURES:
        config = configuration(name)
        active = num_active_parameters(config.model, config.data.sequence_length)
        assert re.search(rf"^\| {name} \| .* \| {active:,} \| {config.mesh.expert} \|$", page, re.MULTILINE), name
