"""A run of Hugging Face weights: a checkpoint of step 0 with the model alone, written a layer at a time."""

from typing import Any

import jax
import numpy as np

from jaxtron.checkpoint.names import nest
from jaxtron.checkpoint.parts import PartsWriter, new_checkpoint
from jaxtron.checkpoint.record import CheckpointRecord
from jaxtron.config import UserError
from jaxtron.convert.bare import bare_session
from jaxtron.convert.carried import keep
from jaxtron.convert.target import check_room, whole_directory
from jaxtron.convert.transfer import TransferRequest
from jaxtron.data.tokenizers import load_tokenizer
from jaxtron.generate.origin import KEPT
from jaxtron.run.configuration import Configuration
from jaxtron.run.history import CONFIG_FILE, MODEL_ALONE, write_record
from jaxtron.run.session import RunSession
from jaxtron.run.state import divided
from jaxtron.weights.load import WeightReader, open_weights, partition_of, wanted_rows
from jaxtron.words import plural, readable_bytes


def write_run(request: TransferRequest, config: Configuration) -> None:
    """Writes the run of a directory's model; `UserError` where its files are not whole, with nothing written."""
    tokenizer = load_tokenizer(config.data.tokenizer, end_of_document=config.data.end_of_document)
    if tokenizer is None:
        raise UserError(f"--data.tokenizer {config.data.tokenizer} is made of the data of a training; give another")
    if tokenizer.vocab_size > config.model.vocab_size:
        raise UserError(
            f"the tokenizer {config.data.tokenizer} has {tokenizer.vocab_size} tokens, more than the model's "
            f"{config.model.vocab_size}; give the model's with --data.tokenizer"
        )
    session = bare_session(config)
    model = session.config.model
    with open_weights(request.source) as (files, table):
        reader = WeightReader(files, table, model)
        reader.check(list(wanted_rows(session.blueprint, table, model, session.trainer.partitions)))
        print(f"reading {plural(len(files.tensors), 'tensor')}, {readable_bytes(files.num_bytes)}, of {request.source}")
        with whole_directory("--to", request.target) as made:
            keep(request.source, made)
            config = _with_kept_tokenizer(config, request)
            extra = {
                MODEL_ALONE: True,
                "position": 0,
                "tokenizer": tokenizer.fingerprint,
                "settings": config.model_dump(mode="json"),
            }
            with session.use():
                abstract = divided(session.blueprint, session.blueprint.abstract)
                record = CheckpointRecord(0, extra, session.layer_order.on_disk(abstract))
            check_room(f"--to {request.target}", made, 4 * session.blueprint.num_parameters)
            with new_checkpoint(made / "checkpoints", record, nest(abstract)) as writer:
                _write_parameters(session, reader, writer, {name: field for field, name in fields(abstract)})
            origin = {"weights": str(request.source.absolute()), "given": request.name}
            notes: dict[str, Any] = {"converted": origin}
            write_record(made, config, [], step=0, notes=notes, advice="make room and give the same command again")
    count = session.blueprint.num_parameters
    print(f"{count:,} parameters in {request.target}: python -m jaxtron.train {request.target / CONFIG_FILE}")


def fields(state: dict[str, Any]) -> list[tuple[str, str]]:
    """Of each array of a model's state, the field of the state that it is in, and its name in the model."""
    return [
        (str(path[0].key), ".".join(str(getattr(key, "key", key)) for key in path[1:]))  # pyright: ignore
        for path, _ in jax.tree.leaves_with_path(state)
    ]


def _write_parameters(session: RunSession, reader: WeightReader, writer: PartsWriter, field_of: dict[str, str]) -> None:
    """All of them, row by row."""
    for name, spec in session.blueprint.names.items():
        partition = partition_of(name, session.trainer.partitions)
        rows = (None,) if partition is None else range(partition.num_layers)
        array = writer.array(f"{field_of[name]}.{name}", stacked=partition is not None)
        shape = spec.shape if partition is None else spec.shape[1:]
        for row in rows:
            values = reader.row(name, shape, row).astype(spec.dtype, copy=False)
            # no file has the padding of the vocabulary
            rest = [(0, whole - size) for whole, size in zip(shape, values.shape, strict=True)]
            array.write(row, np.pad(values, rest) if any(map(any, rest)) else values)


def _with_kept_tokenizer(config: Configuration, request: TransferRequest) -> Configuration:
    """The configuration with the run's own copy of the tokenizer, if that is the directory's."""
    kept = request.target.absolute() / KEPT
    for path in request.source.absolute().iterdir():
        if str(path) == config.data.tokenizer:
            data = config.data.model_copy(update={"tokenizer": str(kept / path.name)})
            return config.model_copy(update={"data": data})
    return config
