"""Adapters as peft stores them, both ways: pairs of a model's linear layers by the names of a family's tensors.

What is one tensor there and several parameters here (GPT-2's queries, keys and values) has one pair there: on the way
out the ranks stand side by side, each for its own rows; on the way in each parameter takes what is its, or all of it.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import inf, sqrt
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from jaxtron.config import UserError, shown
from jaxtron.config.json_text import each_once
from jaxtron.layers.config import LoraConfig
from jaxtron.models.decoder.config import ModelConfig
from jaxtron.weights.files import MOST_REASON, finite_float32
from jaxtron.weights.table import BY_KIND, STACKED, Tensor, TensorTable

TENSORS, SETTINGS = "adapter_model.safetensors", "adapter_config.json"
PICKLE = "adapter_model.bin"
# NumPy's kinds of types: its own, and bfloat16, which it does not know
FLOATS = "fV"
BEGINNING, WEIGHT = "base_model.model.", ".weight"
A, B = ".lora.a", ".lora.b"
MOST_NAMES = 3
# keys of adapter_config.json that change what is computed, with the values that this does not
UNKNOWN = {
    "use_dora": (False, None),
    "bias": ("none", None),
    "modules_to_save": (None, []),
    "target_parameters": (None, []),
    "lora_bias": (False, None),
    "layer_replication": (None,),
    "megatron_config": (None,),
    "alora_invocation_tokens": (None,),
    "use_qalora": (False, None),
}


@dataclass(frozen=True)
class _Entry:
    """A pair here, and where it is in a pair there."""

    layer: str
    row: int | None
    tensor: Tensor
    several: bool
    gate: int | None
    """Of matrices side by side."""
    blocks: Mapping[str, int]
    """Letters of the tensor's rows that tell it from others, and its place along them."""

    @property
    def inputs(self) -> list[str]:
        """Letters of the parameter's inputs."""
        return [letter for letter in self.tensor.dims.split() if letter in self.in_word]

    @property
    def outputs(self) -> list[str]:
        """Letters of the parameter's outputs, without that which counts pairs."""
        return _outputs(self.tensor)[self.several :]

    @property
    def in_word(self) -> str:
        """The word of the tensor's columns."""
        return _in_word(self.tensor)

    @property
    def out_word(self) -> str:
        """That of its rows."""
        return next(word for word in self.tensor.stored.split() if word != self.in_word)

    def own(self, arrays: Mapping[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """Its `a` [inputs, rank] and `b` [rank, outputs], views of the parameters."""
        a, b = arrays[self.layer + A], arrays[self.layer + B]
        if self.row is not None:
            a, b = a[self.row], b[self.row]
        return (a, b) if self.gate is None else (a[..., self.gate, :], b[self.gate])

    def order(self) -> tuple[list[int], list[int]]:
        """Axes of `a`, and of `b` without the blocks, in the order in which they are there; the rank last."""
        inputs, outputs = self.inputs, self.outputs
        a = [inputs.index(letter) for letter in self.in_word]
        b = [1 + outputs.index(letter) for letter in self.out_word if letter not in self.blocks]
        return [*a, len(a)], [*b, 0]

    def sizes(self, b: np.ndarray, counts: Mapping[str, int]) -> list[int]:
        """Of the tensor's rows, by the letters of their word."""
        own = dict(zip(self.outputs, b.shape[1:], strict=True)) | dict(counts)
        return [own[letter] for letter in self.out_word]

    def block(self) -> tuple[Any, ...]:
        """Its rows among all."""
        return tuple(self.blocks.get(letter, slice(None)) for letter in self.out_word)


def write_adapters(
    directory: Path,
    arrays: Mapping[str, np.ndarray],
    table: TensorTable,
    model: ModelConfig,
    lora: LoraConfig,
    base: str,
) -> None:
    """Writes peft's two files; `arrays` are the adapters' parameters by name, layers in the model's order.

    `base` is what the file says the model is, and `table` its family's.
    """
    tensors: dict[str, np.ndarray] = {}
    ranks: dict[str, int] = {}
    fan_in_fan_out = False
    for module, entries in _modules(arrays, table, model):
        one, rank = entries[0], lora.rank
        counts = _counts(entries[0], arrays)
        total = rank * len(entries)
        a = np.concatenate([_matrix(entry.own(arrays)[0], entry.order()[0]) for entry in entries])
        b = np.zeros((*one.sizes(one.own(arrays)[1], counts), total), np.float32)
        for number, entry in enumerate(entries):
            columns = slice(number * rank, (number + 1) * rank)
            b[(*entry.block(), columns)] = entry.own(arrays)[1].transpose(entry.order()[1])
        tensors[f"{BEGINNING}{module}.lora_A{WEIGHT}"] = np.ascontiguousarray(a)
        tensors[f"{BEGINNING}{module}.lora_B{WEIGHT}"] = np.ascontiguousarray(b.reshape(-1, total))
        ranks[_end(module)] = total
        fan_in_fan_out = fan_in_fan_out or one.tensor.stored.split()[0] == one.in_word
    alpha = lora.scale * (sqrt(lora.rank) if lora.rslora else lora.rank)
    wider = {end: rank for end, rank in ranks.items() if rank != lora.rank}
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": lora.rank,
        "lora_alpha": alpha,
        "use_rslora": lora.rslora,
        "target_modules": sorted(ranks),
        "rank_pattern": wider,
        # the scale of a wider one is that of all
        "alpha_pattern": {
            end: lora.scale * (sqrt(rank) if lora.rslora else rank) for end, rank in wider.items()
        },
        "fan_in_fan_out": fan_in_fan_out,
        "bias": "none",
        "lora_dropout": lora.dropout,
        "use_dora": False,
        "inference_mode": True,
        "modules_to_save": None,
    }  # fmt: skip
    directory.mkdir(parents=True, exist_ok=True)
    save_file(tensors, directory / TENSORS, {"format": "pt"})
    (directory / SETTINGS).write_text(json.dumps(settings, indent=2) + "\n")


def read_adapters(
    directory: Path, shapes: Mapping[str, tuple[int, ...]], table: TensorTable, model: ModelConfig, lora: LoraConfig
) -> dict[str, np.ndarray]:
    """The adapters' parameters of these shapes, by name, layers in the model's order, of peft's two files.

    A `UserError` unless the files have just the layers that have adapters here, with their rank, and nothing besides.
    Another scale is put into B.
    """
    settings, tensors = _open(directory)
    arrays = {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}
    modules = dict(_modules(arrays, table, model))
    names = {f"{BEGINNING}{module}.{pair}{WEIGHT}" for module in modules for pair in ("lora_A", "lora_B")}
    missing, left = sorted(names - tensors.keys()), sorted(tensors.keys() - names)
    if missing or left:
        found = [f"lacks {_listed(missing)}"] * bool(missing) + [f"has {_listed(left)} beside them"] * bool(left)
        raise UserError(
            f"{directory} {' and '.join(found)}: train.lora.targets are to name the layers of its target_modules "
            f"{shown(settings.get('target_modules'))}"
        )
    for module, entries in modules.items():
        a, b = (tensors[f"{BEGINNING}{module}.{pair}{WEIGHT}"] for pair in ("lora_A", "lora_B"))
        factor = _scale(settings, module, len(a)) / lora.scale
        one, counts = entries[0], _counts(entries[0], arrays)
        rows, width = one.sizes(one.own(arrays)[1], counts), int(np.prod(one.own(arrays)[0].shape[:-1]))
        if a.shape != (len(a), width) or b.shape != (int(np.prod(rows)), len(a)):
            raise UserError(
                f"{directory} has {module} of shapes {list(a.shape)} and {list(b.shape)}, which is no pair of a layer "
                f"with {width} inputs and {int(np.prod(rows))} outputs: it is of another model"
            )
        for number, entry in enumerate(entries):
            own_a, own_b = entry.own(arrays)
            part = b.reshape(*rows, len(a))[entry.block()]
            columns = _columns(part, lora.rank, number, len(entries), f"{directory} has {module}")
            order_a, order_b = entry.order()
            wide = a[columns].T.reshape(*(own_a.shape[axis] for axis in order_a))
            own_a[...] = wide.transpose(np.argsort(order_a))
            own_b[...] = factor * part[..., columns].transpose(np.argsort(order_b))
    return arrays


def _columns(part: np.ndarray, rank: int, number: int, count: int, where: str) -> slice:
    """Those of a pair of this rank among the columns of the rows that are its."""
    total = part.shape[-1]
    used = {int(column) // rank for column in np.flatnonzero(part.reshape(-1, total).any(0))}
    if total % rank or len(used) > 1:
        raise UserError(f"{where} with rank {total}, and train.lora.rank is {rank}: give --train.lora.rank {total}")
    place = used.pop() if used else number if total == rank * count else 0
    return slice(place * rank, (place + 1) * rank)


def _matrix(a: np.ndarray, order: list[int]) -> np.ndarray:
    """`a` as [rank, inputs]."""
    return a.transpose(order).reshape(-1, a.shape[-1]).T


def _counts(entry: _Entry, arrays: Mapping[str, np.ndarray]) -> dict[str, int]:
    """Sizes of the letters that tell blocks apart."""
    found = {}
    for letter in entry.blocks:
        is_shared = letter == entry.tensor.shared
        b = arrays[entry.layer + B]
        found[letter] = len(entry.tensor.parameters) if is_shared else b.shape[0 if entry.row is None else 1]
    return found


def _modules(
    arrays: Mapping[str, np.ndarray], table: TensorTable, model: ModelConfig
) -> Iterator[tuple[str, list[_Entry]]]:
    """The names of peft's modules, and the pairs here that are in each."""
    found: dict[str, list[_Entry]] = {}
    for name in arrays:
        if not name.endswith(A):
            continue
        layer, a, b = name.removesuffix(A), arrays[name], arrays[name.removesuffix(A) + B]
        is_stacked = layer.startswith((STACKED, BY_KIND))
        for row in range(len(a)) if is_stacked else (None,):
            place = table.place(model, f"{layer}.kernel", row)
            if place.rows is not None:
                raise UserError(
                    f"adapters of {place.tensors[0]}, whose rows are several projections' or in another order than "
                    f"here, are not known: leave {place.name.removesuffix('.kernel')} out of train.lora.targets"
                )
            tensor, dims = place.tensor, place.tensor.dims.split()
            several = a.ndim + b.ndim - 2 - 2 * is_stacked > len(dims)
            blocks = {tensor.shared: tensor.parameters.index(place.name)} if tensor.shared else {}
            for gate in range(b.shape[is_stacked]) if several else (None,):
                own, number = dict(blocks), 0
                if gate is not None and tensor.counted:
                    number = gate
                elif gate is not None:
                    own[_outputs(tensor)[0]] = gate
                module = place.tensors[number].removesuffix(WEIGHT)
                found.setdefault(module, []).append(_Entry(layer, row, tensor, several, gate, own))
    yield from found.items()


def _in_word(tensor: Tensor) -> str:
    """The word of the inputs, with which a parameter's dimensions begin."""
    return next(word for word in tensor.stored.split() if tensor.dims[0] in word)


def _outputs(tensor: Tensor) -> list[str]:
    """Letters of a parameter's outputs."""
    return [letter for letter in tensor.dims.split() if letter not in _in_word(tensor)]


def _open(directory: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Settings and tensors; `UserError` where one is missing, or not understood."""
    try:
        settings = json.loads((directory / SETTINGS).read_text(encoding="utf-8"), object_pairs_hook=each_once)
    except OSError as error:
        raise UserError(
            f"cannot read {directory / SETTINGS}: {error.strerror}; give a directory that peft saved"
        ) from None
    except (ValueError, RecursionError):
        settings = None
    if not isinstance(settings, dict):
        raise UserError(f"{directory / SETTINGS} is not a JSON object; bring back a good copy")
    if settings.get("peft_type") != "LORA":
        raise UserError(f"{directory / SETTINGS} has peft_type {shown(settings.get('peft_type'))}: only LORA is known")
    for name, values in UNKNOWN.items():
        if settings.get(name, values[0]) not in values:
            raise UserError(f"{directory / SETTINGS} has {name} {shown(settings[name])}, which is not known here")
    path = directory / TENSORS
    if not path.is_file():
        other = f", only {PICKLE}, a pickle, which can run code," if (directory / PICKLE).is_file() else ""
        raise UserError(f"{directory} has no {TENSORS}{other}: save the adapters again by peft's save_pretrained")
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        reason = str(error).splitlines()[0][:MOST_REASON]
        raise UserError(f"{path} is no whole file of safetensors: {reason}; bring back a good copy") from None
    return settings, {name: _pair(value, name, path) for name, value in tensors.items()}


def _pair(values: np.ndarray, name: str, path: Path) -> np.ndarray:
    """One of a pair in float32; `UserError` for what is no matrix of finite numbers."""
    if values.ndim != 2 or 0 in values.shape or values.dtype.kind not in FLOATS:
        raise UserError(
            f"{path} has {name} of shape {list(values.shape)} in {values.dtype}, which is no matrix of an adapter; "
            "bring back a good copy"
        )
    return finite_float32(values, name, path)


def _scale(settings: Mapping[str, Any], module: str, rank: int) -> float:
    """What multiplies a module's product there."""
    alpha, patterns = settings.get("lora_alpha", 8), settings.get("alpha_pattern") or {}
    if not isinstance(patterns, dict):
        raise UserError(f"alpha_pattern is {shown(patterns)}, which is no object of numbers; bring back a good copy")
    for end, own in patterns.items():
        if f".{module}".endswith(f".{end}"):
            alpha = own
    if type(alpha) not in (int, float) or not 0 < alpha < inf:
        raise UserError(f"lora_alpha is {shown(alpha)}, which is no number above 0; bring back a good copy")
    return alpha / (sqrt(rank) if settings.get("use_rslora") else rank)


def _end(module: str) -> str:
    """The end of a module's name that is the same in all layers."""
    return ".".join(module.split(".")[-2:])


def _listed(names: list[str]) -> str:
    some = ", ".join(names[:MOST_NAMES])
    return some if len(names) <= MOST_NAMES else f"{some} and {len(names) - MOST_NAMES:,} more"
