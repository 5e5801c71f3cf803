"""What the conformance suite is run on: every family of models, and every kind of layer as a decoder of nothing else.

A new family is a line of `FAMILIES`. A new kind of layer is known by its entry in `KINDS`, and needs a line of
`SETTINGS` only if it has settings of its own that it cannot be without.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from jaxtron.data.batch import TokenBatch, stack_samples
from jaxtron.models.decoder.kinds import KINDS
from jaxtron.models.families import family_named, program_of
from jaxtron.run.configuration import Configuration, configuration_of
from jaxtron.typing import PyTree
from tests.support.equivalence import TOLERANCE
from tests.support.toy_kind import wave_known

ROWS, LENGTH, VOCAB = 16, 16, 60
# plain differentiation itself moves by up to 5.5e-5 where every parameter moves to a float beside it: norms of what is
# small scale its rounding up (`inner_norms`); that of gemma by up to 1.5e-5
# where answers are looked for, the softmax over places ignores the bias of the norm before the head: its gradient is 0,
# and what is seen of it (1.3e-5 of the floor) is the rounding of a sum whose terms cancel
TOLERANCES = {"m": 6e-5, "gemma": 2e-5, "answers": 3e-5}

# by symbol, what a small layer of the kind needs beside the sizes of `DECODER`
SETTINGS: dict[str, dict[str, Any]] = {
    "W": {"attention": {"window": 5}},
    "L": {
        "latent": {
            "q_lora_rank": 12,
            "kv_lora_rank": 10,
            "qk_nope_head_dim": 6,
            "qk_rope_head_dim": 4,
            "v_head_dim": 5,
        }
    },
    "E": {"bias": True, "moe": {"num_experts": 4, "balance": 0.3, "z_loss": 0.1}},
    # pieces of two positions on a mesh with context 4; with less in the norm, rounding of small numbers is scaled up
    "m": {"norm_epsilon": 1e-2, "mamba": {"state_size": 16, "conv_width": 3, "inner_norms": True}},
    "G": {
        "norm_epsilon": 1e-2,
        "delta": {
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 6,
            "linear_conv_kernel_dim": 3,
        },
    },
    "M": {"norm_epsilon": 1e-2, "mamba": {"state_size": 16, "head_dim": 8, "num_groups": 2, "conv_width": 3}},
}
DECODER: dict[str, Any] = {
    "num_layers": 4,
    "hidden_size": 32,
    "num_heads": 4,
    "vocab_size": VOCAB,
    "vocab_multiple": 64,
}

ENCODER: dict[str, Any] = {
    "num_layers": 4,
    "hidden_size": 32,
    "num_heads": 4,
    "vocab_size": VOCAB + 4,
    "vocab_multiple": 64,
}


def settings_of(*symbols: str) -> dict[str, Any]:
    """Of a decoder whose period has one layer of each of these kinds."""
    own: dict[str, Any] = {}
    for symbol in symbols:
        own |= SETTINGS.get(symbol, {})
    return {**DECODER, "pattern": "".join(symbols), "position": "none", **own}


# heads that are not as wide as the stream, a decoder longer than the encoder, distances beyond the last bucket
T5: dict[str, Any] = {
    "hidden_size": 32,
    "num_heads": 4,
    "head_dim": 6,
    "mlp_size": 40,
    "encoder_layers": 4,
    "decoder_layers": 2,
    "decoder_length": 24,
    # where relu bends, rounding decides on which side a number lies: with all parameters moved to a float beside them
    # plain differentiation itself moves by 1.8e-2
    "activation": "gelu_tanh",
    # the stream is small, scores are not scaled: with less in norms it moves by up to 1.5e-4
    "norm_epsilon": 0.3,
    "vocab_size": VOCAB + 10,
    "vocab_multiple": 64,
    "num_buckets": 8,
    "max_distance": 6,
    "denoising": {"rate": 0.3, "mean_length": 2, "sentinels": 8},
}

# by name of `model.family`: settings of a small one, the decoder's with every kind of layer
FAMILIES: dict[str, dict[str, Any]] = {
    "decoder": {**settings_of(*KINDS), "position": "rotary", "dropout": 0.1},
    # tokens of text, and eight sentinels, padding and an end
    "t5": {**T5, "dropout": 0.1, "attention_dropout": 0.1},
    "tests.toy_family": {"vocab_size": VOCAB, "encoder_layers": 4, "decoder_layers": 4},
    # tokens of text, and four special ones
    "bert": {**ENCODER, "norm_placement": "post", "dropout": 0.1},
    # several texts in each row
    "bert_task": {**ENCODER, "task": "choose", "choices": 3, "dropout": 0.1, "attention_dropout": 0.1},
    "metro": {**ENCODER, "activation": "gelu", "dropout": 0.1, "distance_buckets": 8, "max_distance": 9},
}
# decoders with the options that the one above has not, each once, by name; and what else a family computes
OPTIONS: dict[str, dict[str, Any]] = {
    "answers": {**ENCODER, "family": "bert_task", "task": "answer"},
    "gemma": {
        **DECODER,
        "pattern": "W*-",
        "num_kv_heads": 2,
        "norm": "rms_norm_1p",
        # what branches make is small, and with less in their norms rounding is scaled up
        "norm_epsilon": 0.3,
        "norm_placement": "both",
        "qk_norm": True,
        "position": "rotary",
        "rotary": {"scaling": {"kind": "linear", "factor": 8.0}},
        "window_rotary": {"base": 100.0, "fraction": 0.5},
        "activation": "geglu_tanh",
        "embedding_multiplier": 2.5,
        "residual_multiplier": 0.4,
        "logit_soft_cap": 3.0,
        "attention": {"window": 5, "soft_cap": 2.0, "output_gate": True},
    },
    # fewer key/value heads than parts of tensor
    "neox": {
        **DECODER,
        "pattern": "(*-)",
        "num_kv_heads": 2,
        "branch_norms": True,
        "norm_epsilon": 1e-2,
        "qkv_bias": False,
        "attention_output_bias": False,
        "qk_norm": "projection",
        "position": "rotary",
        "rotary": {"scaling": {"kind": "dynamic", "factor": 2.0, "original_length": LENGTH // 2}},
        "tied_head": False,
        "head_bias": True,
        "logit_scale": 3.0,
    },
    "olmo": {
        **DECODER,
        "pattern": "*E",
        "num_kv_heads": 2,
        "norm_placement": "output",
        "norm_epsilon": 1e-2,
        "bias": False,
        "norm_bias": True,
        "qkv_bias": True,
        "qk_norm": "each_head",
        "position": "rotary",
        "rotary": {
            "scaling": {
                "kind": "longrope",
                "factor": 4.0,
                "original_length": LENGTH // 2,
                "short_factors": [1.0] * 4,
                "long_factors": [1.0, 1.5, 2.0, 3.0],
            }
        },
        "moe": {"num_experts": 4},
    },
}


@dataclass(frozen=True, eq=False)
class Layout:
    """A mesh and how a step runs on it."""

    mesh: Mapping[str, int]
    microbatches: int = 2
    zero: str = "optimizer"
    schedule: str = "1f1b"
    parts: int = 1
    """Chunks that each stage of a pipeline has, of all stacks together."""
    context: Mapping[str, str] = field(default_factory=dict)

    @property
    def num_stages(self) -> int:
        return self.mesh.get("pipe", 1)

    def __str__(self) -> str:
        words = [f"{flag} {size}" for flag, size in self.mesh.items()]
        words += [self.schedule] if "pipe" in self.mesh else []
        return "-".join([*words, f"zero {self.zero}", f"microbatches {self.microbatches}"])


@dataclass(frozen=True, eq=False)
class Subject:
    """A small model."""

    name: str
    family: str
    settings: Mapping[str, Any]
    num_stacks: int
    """Those that a pipeline cuts."""
    kind: str | None = None
    """The symbol of the one kind of layer that it has."""
    lora: Mapping[str, Any] | None = None
    """Adapters of its linear layers, which alone are trained."""
    tolerance: float = TOLERANCE
    """Of its gradients, relative to the largest of a parameter."""

    def __str__(self) -> str:
        return self.name

    def configuration(self, layout: Layout, **changes: Any) -> Configuration:
        """Of one step of the model, with these changes of its settings."""
        pipeline: dict[str, Any] = {}
        if layout.num_stages > 1:
            pipeline = {"schedule": layout.schedule, "chunks": layout.parts // self.num_stacks}
        return (
            configuration_of(self.family)
            .model_validate(
                {
                    "model": {"family": self.family, **self.settings, **changes},
                    "train": {
                        "global_batch": ROWS,
                        "microbatches": layout.microbatches,
                        "precision": "fp32",
                        "lora": self.lora,
                    },
                    "data": {"sequence_length": LENGTH},
                    "mesh": {"data": 1, **layout.mesh},
                    "sharding": {"zero": layout.zero},
                    "context": layout.context,
                    "pipeline": pipeline,
                }
            )
            .resolved()
        )

    def fits(self, layout: Layout) -> bool:
        """Whether each stage can have chunks of every stack: an encoder-decoder is for schedules with several."""
        return layout.num_stages == 1 or layout.parts % self.num_stacks == 0

    def batch(self) -> PyTree:
        """Rows with ever fewer tokens that weigh, the last three with none, as the family makes them of text."""
        generator = np.random.default_rng(0)
        tokens, targets = generator.integers(0, VOCAB, (2, ROWS, LENGTH), dtype=np.int32)
        weights = generator.random((ROWS, LENGTH)) > np.arange(ROWS)[:, None] / (ROWS - 3)
        assert weights[0].all() and not weights[-3:].any()
        config = self.configuration(ONE_DEVICE)
        texts = Texts([TokenBatch(*row) for row in zip(tokens, targets, weights.astype(np.float32), strict=True)])
        samples = program_of(config.model).source(config.model, texts, None)
        return stack_samples([samples[number] for number in range(len(texts))])


class Texts(list[TokenBatch]):
    """A source of samples that are there already."""

    sequence_length = LENGTH


ONE_DEVICE = Layout({"data": 1})


def make_subject(family: str, settings: Mapping[str, Any], kind: str | None = None, name: str = "") -> Subject:
    """That of a family, or of a kind of layer, or of this name."""
    known = family_named(family)
    num_stacks = len(known.stacks(known.config.model_validate({**settings, "family": family})))
    tolerance = TOLERANCES.get(kind or name, TOLERANCE)
    return Subject(
        name or (KINDS[kind].name if kind else family), family, settings, num_stacks, kind, tolerance=tolerance
    )


FAMILY_SUBJECTS = tuple(make_subject(*line) for line in FAMILIES.items())
with wave_known():
    KIND_SUBJECTS = tuple(make_subject("decoder", settings_of(symbol), symbol) for symbol in KINDS)
OPTION_SUBJECTS = tuple(
    make_subject(settings.get("family", "decoder"), settings, name=name) for name, settings in OPTIONS.items()
)
SUBJECTS = FAMILY_SUBJECTS + KIND_SUBJECTS + OPTION_SUBJECTS
# every linear layer of every kind has an adapter
ADAPTED = replace(
    FAMILY_SUBJECTS[0], name="decoder with adapters", lora={"rank": 3, "alpha": 5, "dropout": 0.1, "targets": ("*",)}
)
