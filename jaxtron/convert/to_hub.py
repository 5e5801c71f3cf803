"""A run's model as Hugging Face's files: a checkpoint's arrays, each piece read once, put where the tensors lie."""

import json
from collections.abc import Mapping
from math import prod
from pathlib import Path

import ml_dtypes
import numpy as np

from jaxtron.checkpoint.names import first_difference
from jaxtron.checkpoint.parts import open_parts
from jaxtron.checkpoint.record import CheckpointRecord, DamageError
from jaxtron.checkpoint.restore import MOST_TRIES, committed_steps, step_path
from jaxtron.config import UserError
from jaxtron.convert.bare import bare_session
from jaxtron.convert.carried import give_back
from jaxtron.convert.from_hub import fields
from jaxtron.convert.merging import Merging
from jaxtron.convert.target import check_room, whole_directory
from jaxtron.convert.transfer import OF_FILES, TransferRequest
from jaxtron.data.tokenizers import load_tokenizer
from jaxtron.generate.origin import began_with
from jaxtron.models.families import program_of
from jaxtron.models.family import FamilyConfig
from jaxtron.run.configuration import Configuration
from jaxtron.run.history import CONFIG_FILE
from jaxtron.run.restored import check_trained_settings, diverged
from jaxtron.run.session import RunSession
from jaxtron.run.state import divided
from jaxtron.sharding.parameters import ParameterSpec
from jaxtron.weights.config_json import CONFIG_JSON
from jaxtron.weights.hub import SaidModel
from jaxtron.weights.load import partition_of
from jaxtron.weights.rows import write_part
from jaxtron.weights.shards import DTYPES, make_shards
from jaxtron.weights.table import TensorTable, own_shape
from jaxtron.words import plural, readable_bytes

# of a tokenizer's, said again where the run's is another than the one that it began with
OF_TOKENIZER = ("bos_token_id", "decoder_start_token_id", "eos_token_id", "pad_token_id", "sep_token_id")
LARGEST = {
    "fp32": float(np.finfo(np.float32).max),
    "fp16": float(np.finfo(np.float16).max),
    "bf16": float(ml_dtypes.finfo(ml_dtypes.bfloat16).max),
}


def write_weights(request: TransferRequest, trained: Configuration, said: SaidModel, dtype: str) -> None:
    """Writes the directory of a run's checkpoint; `UserError` where that is not whole, with nothing written."""
    session = bare_session(trained)
    for tries in range(MOST_TRIES):
        step = _step(request)
        path = step_path(request.source / "checkpoints", step)
        try:
            _write(request, trained, session, said, dtype, step)
            return
        except (DamageError, OSError, ValueError) as error:
            is_there = path.exists()
            if isinstance(error, UserError) or (is_there and not isinstance(error, DamageError)):
                raise
            # a run that goes on replaced it by a newer one while it was read
            if is_there or request.step is not None or tries == MOST_TRIES - 1:
                what = str(error) if is_there else "it was replaced while it was read"
                raise UserError(f"checkpoint {path} cannot be used: {what}; give another --step") from None


def _step(request: TransferRequest) -> int:
    """The checkpoint's that is asked for."""
    directory = request.source / "checkpoints"
    steps = committed_steps(directory)
    if not steps:
        raise UserError(f"no finished checkpoint in {directory}; train first, or bring back a good copy")
    if request.step is not None and request.step not in steps:
        there = ", ".join(map(str, steps))
        raise UserError(f"no finished checkpoint of step {request.step} in {directory}; there are those of {there}")
    return steps[-1] if request.step is None else request.step


def _write(
    request: TransferRequest, trained: Configuration, session: RunSession, said: SaidModel, dtype: str, step: int
) -> None:
    path = step_path(request.source / "checkpoints", step)
    record, stored = open_parts(path)
    check_trained_settings(record.extra, trained, request.source / CONFIG_FILE)
    named = _names_there(session, record, path)
    model, table = session.config.model, said.family.tensors
    specs = session.blueprint.names
    own = {name: spec for name, spec in specs.items() if spec.role != "adapter"}
    lora = trained.train.lora
    merging = None if lora is None else Merging(stored, specs, named, lora.scale)
    shapes, wide = _shapes(session, own, table, model)
    dtypes = {name: "fp32" if name in wide else dtype for name in shapes}
    with whole_directory("--to", request.target) as made:
        num_bytes = sum(prod(shape) * DTYPES[dtypes[name]][0].itemsize for name, shape in shapes.items())
        check_room(f"--to {request.target}", made, num_bytes)
        print(
            f"writing {plural(len(shapes), 'tensor')}, {readable_bytes(num_bytes)}, of step {step} of {request.source}"
        )
        shards = make_shards(made, shapes, dtypes, request.shard_bytes)
        for name in own:
            fill = _Filler(session, table, model, name, shards.tensors)
            pair = None if merging is None else merging.pair(name)
            for starts, part in stored.parts(named[name]):
                part = part if pair is None else pair.added_to(starts, part)
                _check_numbers(name, part, dtypes[fill.tensors[0]], path)
                fill(starts, part)
        shards.close()
        values = dict(said.values)
        if not give_back(began_with(request.source), trained.data.tokenizer, made):
            values = {key: value for key, value in values.items() if key not in OF_TOKENIZER} | _ends(trained)
        names = {ours: theirs for theirs, ours in OF_FILES.items()}
        values |= {"torch_dtype": names[dtype]}
        (made / CONFIG_JSON).write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    kind = said.values["architectures"][0]
    told = "" if merging is None else ", adapters merged"
    print(f"{sum(map(prod, shapes.values())):,} parameters of a {kind} in {request.target}, {dtype}{told}")


def _names_there(session: RunSession, record: CheckpointRecord, path: Path) -> dict[str, str]:
    """The checkpoint's names of the parameters; `UserError` where it is of another model."""
    with session.use():
        abstract = divided(session.blueprint, session.blueprint.abstract)
        wanted = session.layer_order.on_disk(abstract)
    there = {name: array for name, array in record.arrays.items() if name.partition(".")[0] in abstract}
    if difference := first_difference(there, wanted):
        raise UserError(f"checkpoint {path} is of another model than the configuration here: {difference}")
    return {name: f"{field}.{name}" for field, name in fields(abstract)}


def _shapes(
    session: RunSession, specs: Mapping[str, ParameterSpec], table: TensorTable, model: FamilyConfig
) -> tuple[dict[str, tuple[int, ...]], set[str]]:
    """Of all tensors by name, those of parameters with these; and the names of those that are float32 always."""
    found, wide = {}, set()
    for name, spec in specs.items():
        partition = partition_of(name, session.trainer.partitions)
        shape = spec.shape if partition is None else spec.shape[1:]
        for row in (None,) if partition is None else range(partition.num_layers):
            place = table.place(model, name, row)
            stored = place.stored_shape(own_shape(place.tensor, model, shape))
            found |= dict.fromkeys(place.tensors, stored)
            wide |= set(place.tensors) if place.tensor.is_wide else set()
    return found, wide


class _Filler:
    """Puts pieces of a parameter, as checkpoints have it, where the file's tensors lie."""

    def __init__(
        self, session: RunSession, table: TensorTable, model: FamilyConfig, name: str, tensors: Mapping[str, np.ndarray]
    ) -> None:
        self._table, self._model, self._name, self._tensors = table, model, name, tensors
        shape = session.blueprint.names[name].shape
        self._is_stacked = partition_of(name, session.trainer.partitions) is not None
        self._shape = shape[1:] if self._is_stacked else shape
        # of one parameter they are alike
        self.tensors = table.place(model, name, 0 if self._is_stacked else None).tensors

    def __call__(self, starts: tuple[int, ...], part: np.ndarray) -> None:
        """A piece that begins there."""
        if not self._is_stacked:
            self._put(None, part, starts)
            return
        for number, values in enumerate(part):
            self._put(starts[0] + number, values, starts[1:])

    def _put(self, row: int | None, values: np.ndarray, starts: tuple[int, ...]) -> None:
        place = self._table.place(self._model, self._name, row)
        shape = own_shape(place.tensor, self._model, self._shape)
        write_part(place, [self._tensors[name] for name in place.tensors], shape, values, starts)


def _check_numbers(name: str, part: np.ndarray, dtype: str, path: Path) -> None:
    """`UserError` where numbers are not finite, or would not be."""
    # NaN if any is
    largest = float(np.abs(part).max(initial=0.0))
    if not np.isfinite(largest):
        raise diverged(path.parent, int(path.name.removeprefix("step_")), f"{name} has numbers that are not finite")
    if largest > LARGEST[dtype]:
        raise UserError(f"{name} has numbers up to {largest:.3g}, too large for {dtype}; give --dtype bf16")


def _ends(trained: Configuration) -> dict[str, int]:
    """The tokens by which text begins and ends, where the run's tokenizer says so and needs no data for it."""
    tokenizer = load_tokenizer(trained.data.tokenizer, end_of_document=trained.data.end_of_document)
    if tokenizer is None:
        return {}
    if trained.family.writes == "answer":
        try:
            text = program_of(trained.model).answers(trained.model, tokenizer, None, None)
        except UserError:
            # a vocabulary without room for what begins an answer: such a model was never trained here
            return {}
        return {"decoder_start_token_id": text.begin, "eos_token_id": text.end, "pad_token_id": text.begin}
    return {} if tokenizer.end_of_document is None else {"eos_token_id": tokenizer.end_of_document}
