"""`jaxtron.Session`: a configuration on devices, for programs and notebooks."""

import functools
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from jaxtron.api.batches import check_batch, check_rows, fill_rows, placed_batch, token_batch
from jaxtron.api.devices import devices_for, start
from jaxtron.api.drawing import drawn
from jaxtron.api.html import html_lines
from jaxtron.api.layout import LayoutTable, layout_of, mesh_text
from jaxtron.api.settings import Source, load
from jaxtron.api.tables import Edits, check_used, edited
from jaxtron.api.text import Speaker, sampling
from jaxtron.checkpoint.manager import Checkpoints
from jaxtron.config import UserError
from jaxtron.data.batch import TokenBatch
from jaxtron.data.dataset import Data
from jaxtron.data.tokenizers import Tokenizer, load_tokenizer
from jaxtron.models.families import program_of
from jaxtron.optim.batch_ramp import batch_size
from jaxtron.pictures.picture import Picture
from jaxtron.pictures.sharding import sharding
from jaxtron.run.attention import attention_lines
from jaxtron.run.configuration import Configuration
from jaxtron.run.history import write_record
from jaxtron.run.metrics import MetricsTally
from jaxtron.run.session import RunSession, make_session
from jaxtron.run.sizes import check_batch_fits, check_state_fits
from jaxtron.run.state import TrainState
from jaxtron.runtime.memory_errors import out_of_memory_as_user_error
from jaxtron.sharding.rules import Rules
from jaxtron.train.initial import begin
from jaxtron.train.run import room_advice
from jaxtron.train.setup import open_samples
from jaxtron.typing import Array, Device
from jaxtron.words import readable_count


class Session:
    """A model on a mesh of devices: its parameters' layout, its training step, its text.

    `config` is a `Configuration`, or what `load` takes. `devices` are those of the mesh (none: all of JAX's, or as many
    as a mesh without -1 needs); the first session starts JAX, as the configuration's `runtime` says. `parameters` and
    `activations` are edits of the two tables that say which flag of the mesh splits which logical axis, such as
    `parameters={"mlp": ()}`: they change where arrays lie and what travels, never what is computed. Raises `UserError`
    where the model, the batch or the edits do not fit the devices.

    Nothing needs a `with`: every method enters the mesh by itself, so that a session lives across a notebook's cells,
    and several of them side by side.
    """

    def __init__(
        self,
        config: Source | None = None,
        *,
        devices: Sequence[Device] | None = None,
        parameters: Edits | None = None,
        activations: Edits | None = None,
    ) -> None:
        config = config if isinstance(config, Configuration) else load(config)
        tables = edited(config, parameters, activations)
        start(config)
        self.run: RunSession = make_session(config, devices_for(config, devices), tables=tables)
        """The session of the house's own commands, for what is not here."""
        check_used(self.run, parameters)
        self.position = 0
        """Of the configuration's data, the number of the sample that `batches` goes on with."""
        self._origin: dict[str, Any] = {}
        self._speaker: Speaker | None = None

    @property
    def config(self) -> Configuration:
        """The settings, with all that follows from others filled in."""
        return self.run.config

    @property
    def mesh(self) -> Mesh:
        """JAX's mesh: the devices, by named axes."""
        return self.run.mesh

    @property
    def sizes(self) -> dict[str, int]:
        """Parts by flag of `mesh` (data, fsdp, tensor, pipe, context), outermost first."""
        return self.run.sizes

    @property
    def rules(self) -> Rules:
        """What splits what: `rules.parameters` and `rules.activations` are the tables, logical axis -> flags."""
        return self.run.rules

    @property
    def num_parameters(self) -> int:
        """Parameters of the model, the vocabulary's padding among them."""
        return self.run.blueprint.num_parameters

    def use(self) -> AbstractContextManager[Rules]:
        """Within it modules of `jaxtron.models` and `jaxtron.layers` are built and called; the methods need none."""
        return self.run.use()

    def layout(self, pattern: str = "*") -> LayoutTable:
        """Where parameters lie at rest: a table that prints, and shows itself in a notebook.

        `pattern` chooses by name: `*`, `?` and `[...]` as in file names, `/` or `.` between parts, and parts in front
        and behind may be left out: `"query"`, `"*/mlp/up"`, `"head.*"`. Bytes are those of one device. Raises
        `UserError` where nothing matches.
        """
        return layout_of(self.run, pattern)

    def draw(self, what: str | Sequence[str] | Array, *, title: str = "") -> Picture:
        """A picture of an array's blocks on the mesh: what has one colour is one block, and its devices are replicas.

        `what` is a parameter's name or a pattern for one, `"mlp/up/kernel"`; an array, such as `batch.tokens`; or the
        logical axes of an activation, `("batch", "seq", "embed")`, of a microbatch on all devices. It shows itself in a
        notebook, and `save` writes it. Raises `UserError` for a pattern of several parameters, axes that no activation
        has, or an array that lies elsewhere.
        """
        shape, spec, dims, name = drawn(self.run, what)
        return sharding(shape, spec, self.mesh, dims=dims, title=title or name)

    def initial_state(self) -> TrainState:
        """The state before the first step, on the devices: parameters, optimizer, step 0; drawn with `seed`.

        With `checkpoint.initialize_from` the parameters are those of that directory. The values do not depend on the
        mesh. Raises `UserError` where a device has no room for its part, or the directory is of another model.
        """
        sizes = self.config.family.sizes(self.config.model)
        check_state_fits(sizes, self.run.abstract_state(), what="training state")
        if self.config.checkpoint.initialize_from is None:
            return self.run.initial_state()
        state, self._origin = begin(self.run, self.tokenizer.fingerprint)
        return state

    def batch(
        self,
        tokens: Any,
        targets: Any = None,
        weights: Any = None,
        *,
        positions: Any = None,
        segments: Any = None,
    ) -> Any:
        """A batch of token ids, on the devices, for `step` and `loss`.

        `tokens` are whole numbers [rows, data.sequence_length + 1], as lists, NumPy or JAX: each is predicted from
        those before it. With one fewer a row its last token predicts nothing (weight 0), unless `targets` [rows,
        data.sequence_length] say what. `weights` are what each prediction counts in the loss (none: 1), `positions` the
        places of tokens in their documents (none: in the row), `segments` documents by number, which do not see each
        other (none: one). A text instead of numbers is tokenized and fills `train.global_batch` rows, begun again where
        it is short.

        Rows are a multiple of mesh.data x mesh.fsdp. In a run of several processes each gives the whole batch. Raises
        `UserError` for other shapes, types, ids that the model does not have, or a model that reads something else.
        """
        kind = program_of(self.config.model).batch
        if kind is not TokenBatch:
            raise UserError(f"models of model.family {self.config.model.family} read no tokens alone: use batches()")
        if isinstance(tokens, str):
            rows, length = self.config.train.global_batch, self.config.data.sequence_length
            tokens = fill_rows(self.tokenizer.encode(tokens), rows, length + 1)
        batch = token_batch(self.config, tokens, targets, weights, positions, segments)
        check_rows(self.run, len(batch.tokens))
        return placed_batch(self.run, batch, len(batch.tokens))

    def batches(self, steps: int | None = None) -> Iterator[Any]:
        """Batches of the configuration's own data, in the order of a training, from `position` on; so many, or endless.

        The first call reads and tokenizes the data. Raises `UserError` where there are none, or they are no text.
        """
        if steps is not None and (isinstance(steps, bool) or not isinstance(steps, int) or steps < 0):
            raise UserError(f"batches({steps!r}): give a whole number of batches, or nothing for endless ones")
        train = self.config.train
        check_batch_fits("train.global_batch", train.global_batch, self.config)
        size = functools.partial(batch_size, train.batch_ramp, train.global_batch)
        return self._batches(steps, size)

    def _batches(self, steps: int | None, size: Any) -> Iterator[Any]:
        rows = functools.cache(self.run.batches.local_rows)
        with self.data.train_loader(batch_size=size, local_rows=rows, position=self.position) as loader:
            done = 0
            while steps is None or done < steps:
                local = next(loader)
                # before it is given away: who breaks the loop has had it
                self.position, done = local.end, done + 1
                yield self.run.batches.globalize(local)

    def step(self, state: TrainState, batch: Any) -> tuple[TrainState, dict[str, Array]]:
        """One step of the optimizer: the state after it, and `loss`, `gradient_norm`, `learning_rate` and others.

        The metrics are arrays that may still be computed; `float(metrics["loss"])` waits. The state that is given is
        consumed, its memory is the new one's: `state, metrics = session.step(state, batch)`. The first call compiles.
        Raises `UserError` for a state that was consumed or is of another session, and a batch that is not this one's.
        """
        self._check_state(state)
        check_batch(self.run, batch)
        with out_of_memory_as_user_error(room_advice(self.config)):
            return self.run.step(state, batch)

    def loss(self, state: TrainState, batch: Any) -> float:
        """The mean loss of a batch, in nats a token, without dropout; the state stays. Raises as `step` does."""
        self._check_state(state)
        check_batch(self.run, batch)
        sums, counts = self.run.evaluate(state.model, batch)
        found = {name: float(value) for name, value in sums.items()}
        return float(program_of(self.config.model).loss(found, {name: float(count) for name, count in counts.items()}))

    def generate(self, state: TrainState, prompt: str | Sequence[str], **settings: Any) -> Any:
        """The text that follows a prompt, without it; of several prompts a list.

        `settings` are those of `python -m jaxtron.generate`: `max_new_tokens`, `temperature`, `top_k`, `top_p`,
        `stop`, `seed` and others (docs/generation.md). Without `seed` the configuration's is taken, so that equal calls
        give equal texts. Prompt and text together have at most data.sequence_length tokens. The first call compiles,
        later states use the same programs. Raises `UserError` for settings that do not exist, an empty prompt, one too
        long, a model that makes no text, and a state that has diverged.
        """
        self._check_state(state)
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        if not prompts or not all(isinstance(text, str) for text in prompts):
            raise UserError("generate takes a text, or a list of texts, to go on from")
        if self._speaker is None or self._speaker.engine.rows < min(len(prompts), 8):
            self._speaker = Speaker.of(self.run, state.model, self.tokenizer, len(prompts))
        else:
            self._speaker.engine.renew(state.model)
        chosen = sampling(self._speaker.model, settings)
        encoded = [self._speaker.model.encode(text) for text in prompts]
        texts = self._speaker.write(encoded, chosen, self.config.seed)
        return texts[0] if isinstance(prompt, str) else texts

    def save(self, state: TrainState, directory: str | Path) -> Path:
        """Writes a run: a checkpoint of the state at its step, `config.yaml` and `history.jsonl`; gives the directory.

        `jaxtron.open_run` and every command take it: generate, serve, evaluate, convert, and train where the data are
        those of `batches()`. Raises `UserError` where it cannot be written, or the state is not finite.
        """
        self._check_state(state)
        target = Path(directory)
        step = int(state.step)
        extra = {
            "position": self.position,
            "tally": asdict(MetricsTally()),
            "data": self.data.fingerprint if "data" in vars(self) else "",
            "tokenizer": self.tokenizer.fingerprint,
            "seed": self.config.seed,
            "settings": self.config.model_dump(mode="json"),
        }
        checkpoints = Checkpoints(target / "checkpoints", self.config.checkpoint)
        try:
            with self.run.use():
                order = self.run.layer_order
                checkpoints.save(step, order.in_model_order(state), extra, order.on_disk(state))
            checkpoints.wait()
        finally:
            checkpoints.close()
        if jax.process_index() == 0:
            notes = {"data": [], **self._origin}
            write_record(target, self.config, [], step=step, notes=notes, advice="choose another directory")
        return target

    @functools.cached_property
    def data(self) -> Data:
        """The configuration's data, read and tokenized when first asked for."""
        return open_samples(self.config)

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        """From text to token ids and back, as `data.tokenizer` names it; one of characters is made of the data."""
        settings = self.config.data
        found = load_tokenizer(settings.tokenizer, end_of_document=settings.end_of_document)
        return self.data.tokenizer if found is None else found

    @functools.cached_property
    def _expected(self) -> tuple[Any, list[tuple[tuple[int, ...], Any]]]:
        leaves, tree = jax.tree.flatten(self.run.abstract_state())
        return tree, [(leaf.shape, leaf.dtype) for leaf in leaves]

    def _check_state(self, state: Any) -> None:
        if not isinstance(state, TrainState):
            raise UserError(
                f"a state is what session.initial_state(), session.step(state, batch)[0] or jaxtron.open_run give, not "
                f"{type(state).__name__}"
            )
        leaves, tree = jax.tree.flatten(state)
        if any(isinstance(leaf, jax.Array) and leaf.is_deleted() for leaf in leaves):
            raise UserError(
                "this state was consumed by an earlier step: go on with the one that it returned, as in "
                "state, metrics = session.step(state, batch)"
            )
        wanted_tree, wanted = self._expected
        shapes = [(np.shape(leaf), getattr(leaf, "dtype", None)) for leaf in leaves]
        meshes = (getattr(getattr(leaf, "sharding", None), "mesh", self.mesh) for leaf in leaves)
        if tree != wanted_tree or shapes != wanted or any(mesh != self.mesh for mesh in meshes):
            raise UserError(
                "the state is of another session, with another model, optimizer or mesh: make it with this session's "
                "initial_state()"
            )

    @property
    def _lines(self) -> tuple[str, ...]:
        count = readable_count(self.num_parameters)
        devices = f"{self.mesh.size} {self.run.device_kind}"
        return (
            f"Session: {count} parameters on {devices}, {mesh_text(self.sizes)}",
            *attention_lines(self.run.attention),
            *self.run.choices,
        )

    def __repr__(self) -> str:
        return self._lines[0]

    def _repr_html_(self) -> str:
        return html_lines(*self._lines)
