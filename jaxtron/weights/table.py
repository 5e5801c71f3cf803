"""A family's table: the tensors of its Hugging Face files, and the parameters that they are here, in both directions.

Dimensions are letters, so that a row of the table says how both lie: `E H D` here and `HD E` there is a transpose and
a split of the rows into heads.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

from jaxtron.models.decoder.config import ModelConfig
from jaxtron.models.decoder.pattern import layer_kinds
from jaxtron.models.families import family_of
from jaxtron.models.family import FamilyConfig

# rows of a table of tokens, of which files have no padding
VOCABULARY = "V"
# the number of an expert in a tensor's name
EXPERT = "{}"
STACKED, LEADING, BY_KIND = "stack.periods.layers.", "stack.leading.", "stack.layers."


@dataclass(frozen=True)
class Rows:
    """Where the rows of a parameter are in a tensor that has those of others too, or has them in another order."""

    places: Sequence[int]
    """By the parameter's rows."""
    total: int
    """The tensor's."""
    dim: int = 0
    """The dimension of the tensor that they are along."""


@dataclass(frozen=True)
class Tensor:
    """A row of a table: a parameter and a tensor of a file that hold the same numbers, or one and several.

    A letter of `dims` that `stored` lacks counts tensors: gate and up, which are one parameter; of names with {} each
    expert has its own, and its number comes first. One of `stored` that `dims` lacks counts parameters: queries, keys
    and values in one tensor. Letters side by side are one dimension, the first of them outermost.
    """

    ours: str | tuple[str, ...]
    """The parameter's name in its layer, or outside of layers its whole name."""
    dims: str
    """Its dimensions, a letter each."""
    theirs: str | tuple[str, ...]
    """The tensor's name, in its layer too."""
    stored: str
    """Its dimensions, a word each."""
    rows: Callable[[Any, str], Rows] | None = None
    """Where they lie otherwise than letters can say: of one parameter in one tensor, by the model and the parameter's
    name. `stored` then is what the tensor would be if the parameter's rows were all, in their order."""
    is_wide: bool = False
    """Whether files have it in float32 also where all else has 16 bits."""
    when: Callable[[Any], bool] | None = None
    """Of which models the row is, where the parameter has another name in the files of others (none: of all)."""

    @property
    def parameters(self) -> tuple[str, ...]:
        """The parameters."""
        return (self.ours,) if isinstance(self.ours, str) else self.ours

    @property
    def tensors(self) -> tuple[str, ...]:
        """The tensors."""
        return (self.theirs,) if isinstance(self.theirs, str) else self.theirs

    def stored_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """That of each tensor, of a parameter of this shape."""
        sizes = self.sizes(shape)
        return tuple(prod(sizes[letter] for letter in word) for word in self.stored.split())

    @property
    def letters(self) -> str:
        """Those of `stored`, in one word."""
        return self.stored.replace(" ", "")

    @property
    def counted(self) -> str:
        """The letters along which tensors are stacked, the first of them outermost, or nothing."""
        return "".join(letter for letter in self.dims.split() if letter not in self.letters)

    @property
    def shared(self) -> str:
        """The letter along which parameters are, or nothing."""
        return "".join(letter for letter in self.letters if letter not in self.dims)

    def sizes(self, shape: Sequence[int]) -> dict[str, int]:
        """By letter, of a parameter of this shape."""
        sizes = dict(zip(self.dims.split(), shape, strict=True))
        assert not self.counted or prod(sizes[letter] for letter in self.counted) % len(self.tensors) == 0, (
            self,
            shape,
        )
        return sizes | ({self.shared: len(self.parameters)} if self.shared else {})


@dataclass(frozen=True)
class Place:
    """Where the numbers of a parameter are, or of its row of one layer: a row of the table, and tensors by name."""

    tensor: Tensor
    name: str
    """The parameter's among those of the row."""
    tensors: tuple[str, ...]
    rows: Rows | None = None
    """Those of the tensor that are the parameter's (none: as the row's letters say)."""

    def stored_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """That of each tensor, of a parameter of this shape."""
        found = list(self.tensor.stored_shape(shape))
        if self.rows is not None:
            found[self.rows.dim] = self.rows.total
        return tuple(found)


@dataclass(frozen=True)
class TensorTable:
    """All tensors of a family. A row counts where the model has its parameter: one that has no biases has none."""

    outer: tuple[Tensor, ...]
    """Those that are in no layer, by whole names."""
    branches: Mapping[str, tuple[Tensor, ...]]
    """Those of the layers, by the symbol of `model.pattern` that they are."""
    layer: str
    """The beginning of a layer's names, with its number as {}."""
    branches_in_one: int = 2
    """Symbols of the pattern in one of the file's layers: attention and MLP, one after the other or side by side."""
    base: str = "model."
    """What begins the names of all but the head; files of the model without a head leave it out."""
    head: str = "lm_head.weight"
    """The head's name, which a tied model's file may have too."""
    embedding: str = "embedding.table"
    """The parameter that a tied model's head is."""
    ignored: tuple[str, ...] = ()
    """Ends of names that are no weights."""
    further: str = ""
    """The end of a name that only layers have which predict further tokens; all of such a layer is left out."""

    def place(self, model: FamilyConfig, name: str, row: int | None = None) -> Place:
        """Those of a parameter by its name here; of one that is stacked, of the layer in this row of those alike."""
        found = self.find(model, name, row)
        assert found is not None, f"the table has no row for {name}"
        return found

    def find(self, model: FamilyConfig, name: str, row: int | None = None) -> Place | None:
        """The same; None where the family's files have no such parameter."""
        rows, beginning, own = self.rows_of(model, name, row)
        found = next((row for row in rows if own in row.parameters and (row.when is None or row.when(model))), None)
        if found is None:
            return None
        rows_there = None if found.rows is None else found.rows(model, own)
        experts = range(1)
        if EXPERT in found.tensors[0]:
            assert isinstance(model, ModelConfig)
            experts = range(model.moe.num_experts)
        names = [beginning + theirs.replace(EXPERT, str(number)) for number in experts for theirs in found.tensors]
        return Place(found, own, tuple(names), rows_there)

    def rows_of(self, model: FamilyConfig, name: str, row: int | None) -> tuple[Sequence[Tensor], str, str]:
        """Rows among which a parameter's is, what begins the names of its tensors, and its own name among them."""
        assert isinstance(model, ModelConfig)
        place, own = _layer_of(model, name, row)
        if place is None:
            return self.outer, "", own
        number = sum(map(len, model.layout.layers[:place])) // self.branches_in_one
        rows = [tensor for symbol in model.layout.layers[place] for tensor in self.branches.get(symbol, ())]
        return rows, self.layer.format(number), own


@dataclass(frozen=True)
class StackTable(TensorTable):
    """A table of a family whose stacks have layers that are alike.

    Of `branches` the keys are the stacks' paths with dots, and `layers` has what begins the names of a stack's layers.
    """

    layers: Mapping[str, str] = field(default_factory=dict)
    """By the stack's path with dots, with the layer's number as {}."""

    def rows_of(self, model: FamilyConfig, name: str, row: int | None) -> tuple[Sequence[Tensor], str, str]:
        """As a decoder's."""
        path = next((path for path in self.branches if name.startswith(f"{path}.")), None)
        if path is None:
            return self.outer, "", name
        assert row is not None
        return self.branches[path], self.layers[path].format(row), name.removeprefix(f"{path}.")


def own_shape(tensor: Tensor, model: FamilyConfig, shape: Sequence[int]) -> tuple[int, ...]:
    """The shape of a parameter without the padding of the vocabulary, which no file has."""
    letters, known = tensor.dims.split(), family_of(model).vocabulary
    assert known is not None or VOCABULARY not in letters
    return tuple(
        getattr(model, known) if known is not None and letter == VOCABULARY else size
        for letter, size in zip(letters, shape, strict=True)
    )


def _layer_of(model: ModelConfig, name: str, row: int | None) -> tuple[int | None, str]:
    """The place of a parameter's layer among all of the model, and its name there; None outside of layers."""
    size, leading = len(model.layout.period), len(model.layout.leading)
    if name.startswith(STACKED):
        assert row is not None
        place, _, own = name.removeprefix(STACKED).partition(".")
        return (leading + row) * size + int(place), own
    if name.startswith(BY_KIND):
        kind, _, own = name.removeprefix(BY_KIND).partition(".")
        places = [place for place, other in enumerate(layer_kinds(model.layout)) if other == kind]
        assert row is not None
        return places[row], own
    if name.startswith(LEADING):
        number, _, rest = name.removeprefix(LEADING).partition(".layers.")
        place, _, own = rest.partition(".")
        return int(number) * size + int(place), own
    return None, name
