"""`python -m jaxtron.plan CONFIG.yaml --search`: layouts for so many GPUs, those that fit ranked by predicted time."""

from collections.abc import Callable
from dataclasses import dataclass, replace

from jaxtron.config import UserError
from jaxtron.plan.formula.memory_model import Estimator
from jaxtron.plan.formula.prediction import Prediction, predict
from jaxtron.plan.machine import Machine
from jaxtron.plan.memory_use import MemoryUse
from jaxtron.plan.plan import Plan
from jaxtron.plan.search.candidates import CandidateLayout, layouts, own_layout
from jaxtron.plan.search.foldings import narrowed
from jaxtron.run.configuration import Configuration
from jaxtron.words import plural, readable_bytes

# Memory by formula may be so far off: what is this little above the GPU's is left to the compiler.
MARGIN = 0.05
# A search compiles at most so many layouts for each that it was asked for: some turn out not to fit.
MOST_COMPILED = 3


@dataclass(frozen=True)
class Candidate:
    """A layout with its memory and its step by formula, and its plan where it was compiled."""

    layout: CandidateLayout
    estimate: MemoryUse
    formula: Prediction
    plan: Plan | None = None

    @property
    def prediction(self) -> Prediction:
        """The step, with the compiled overlap where there is a plan."""
        return self.formula if self.plan is None else self.plan.prediction

    @property
    def memory(self) -> MemoryUse:
        """Bytes of a GPU, the compiler's where there is a plan."""
        return self.estimate if self.plan is None else self.plan.memory


@dataclass(frozen=True)
class SearchResult:
    """Two rankings, for what a compiled step takes says nothing beside what a formula says of another.

    `compiled` were compiled and fit, the fastest first; `unfit` were compiled and do not. `candidates` are the others
    that fit by formula, the fastest first. `own` is the configuration's own layout, whether it fits or not, and
    `own_problem` why there is none.
    """

    config: Configuration
    gpu: str
    num_gpus: int
    gpus_per_node: int
    candidates: tuple[Candidate, ...]
    num_layouts: int
    num_refused: int
    num_too_big: int
    own: Candidate | None
    own_problem: str | None
    compiled: tuple[Candidate, ...] = ()
    unfit: tuple[Candidate, ...] = ()

    @property
    def ranked(self) -> tuple[Candidate, ...]:
        """Those that are compared with each other: the compiled ones, or all by formula where none was compiled."""
        return self.compiled or self.candidates

    @property
    def best(self) -> Candidate:
        """The first."""
        return self.ranked[0]

    def rank(self, layout: CandidateLayout) -> int | None:
        """Of a layout among `ranked`, 1 for the first; None where it is not there."""
        ranks = (number for number, one in enumerate(self.ranked, 1) if one.layout == layout)
        return next(ranks, None)

    def is_own(self, candidate: Candidate) -> bool:
        """Whether it is the configuration's own layout."""
        return self.own is not None and candidate.layout == self.own.layout


def search(config: Configuration, machine: Machine, *, num_gpus: int, gpus_per_node: int) -> SearchResult:
    """The search by formula: nothing is compiled; tensor parallelism is traced on devices of this machine.

    Candidates are all layouts whose estimated bytes are at most `MARGIN` above the GPU's. Raises `UserError` where no
    layout runs, or none fits, or the GPUs do not fill nodes.
    """
    if num_gpus % min(gpus_per_node, num_gpus):
        raise UserError(f"{num_gpus:,} GPUs do not fill nodes of {gpus_per_node}: use a multiple of {gpus_per_node}")
    config, capacity = config.resolved(), machine.datasheet.memory_bytes
    own, own_problem = _own(config, num_gpus)
    found = list(dict.fromkeys((*layouts(config, num_gpus, gpus_per_node), *((own,) if own else ()))))
    if config.family.experts(config.model) is not None:
        found = narrowed(found, own, config, machine, gpus_per_node)
    # layouts of one schedule follow each other, so that its table is made once
    batch = config.train.global_batch
    found.sort(key=lambda layout: (layout.pipe, layout.microbatches(batch), repr(layout.pipeline)))
    weigh = _Weigher(config, machine, gpus_per_node)
    candidates: list[Candidate] = []
    refused: list[str] = []
    own_candidate, least = None, (float("inf"), "")
    for layout in found:
        try:
            needed, candidate = weigh(layout, limit=None if layout == own else (1 + MARGIN) * capacity)
        except UserError as error:
            refused.append(str(error))
            if layout == own:
                own_problem = str(error)
            continue
        least = min(least, (needed, layout.text(batch)))
        if layout == own:
            own_candidate = candidate
        if candidate is not None and needed <= (1 + MARGIN) * capacity:
            candidates.append(candidate)
    if not candidates:
        raise UserError(_nothing(config, machine, num_gpus, refused, *least))
    candidates.sort(key=lambda one: (one.formula.step_seconds, one.estimate.total))
    too_big = len(found) - len(refused) - len(candidates)
    return SearchResult(
        config=config,
        gpu=machine.gpu,
        num_gpus=num_gpus,
        gpus_per_node=gpus_per_node,
        candidates=tuple(candidates),
        num_layouts=len(found),
        num_refused=len(refused),
        num_too_big=too_big,
        own=own_candidate,
        own_problem=own_problem,
    )


class _Weigher:
    """Bytes and seconds of layouts by formula."""

    def __init__(self, config: Configuration, machine: Machine, gpus_per_node: int) -> None:
        self.config, self.machine, self.gpus_per_node = config, machine, gpus_per_node
        self.estimator = Estimator(config)

    def __call__(self, layout: CandidateLayout, limit: float | None) -> tuple[int, Candidate | None]:
        """Bytes a GPU needs, or already more than `limit`; and the candidate unless they are more."""
        config, gpu = layout.config(self.config), self.machine.datasheet
        # of most layouts the state alone is too much, which is quickly told
        state = self.estimator.state(config, layout.sizes).total
        if limit is not None and state > limit:
            return state, None
        memory = self.estimator.memory(config, layout.sizes, gpu)
        if limit is not None and memory.total > limit:
            return memory.total, None
        prediction = predict(config, layout.sizes, self.machine, gpus_per_node=self.gpus_per_node)
        return memory.total, Candidate(layout, memory, prediction)


def compile_best(found: SearchResult, top: int, compile_layout: Callable[[Configuration], Plan]) -> SearchResult:
    """The search with the own layout and the best `top` candidates compiled, one of each mesh, ranked by their plans.

    What does not fit when compiled is dropped, and the next taken: of the same mesh, one that fits if its estimate is
    as wrong. The own layout is compiled whatever its formula says, so that what is gained over it is known. Raises
    `UserError` where none of the compiled ones fits.
    """
    compiled: list[Candidate] = []
    unfit: list[Candidate] = []

    def compile_one(candidate: Candidate) -> Candidate:
        candidate = replace(candidate, plan=compile_layout(candidate.layout.config(found.config)))
        (compiled if candidate.memory.fits else unfit).append(candidate)
        return candidate

    for candidate in found.candidates:
        if len(compiled) == top or len(compiled) + len(unfit) == MOST_COMPILED * top:
            break
        mesh = candidate.layout.mesh_text
        if any(one.layout.mesh_text == mesh for one in compiled):
            continue
        if any(one.layout.mesh_text == mesh and not _corrected(candidate, one) for one in unfit):
            continue
        compile_one(candidate)
    own = found.own
    if own is not None:
        done = (one for one in (*compiled, *unfit) if one.layout == own.layout)
        own = next(done, None) or compile_one(own)
    if not compiled:
        raise UserError(
            f"none of the {plural(len(unfit), 'best layout')} fits when compiled: they need "
            f"{readable_bytes(min(one.memory.total for one in unfit))} and more a GPU; use a larger --top, or more GPUs"
        )
    # of two that take the same time the own comes first: then there is nothing to change
    compiled.sort(key=lambda one: (one.prediction.step_seconds, not found.is_own(one)))
    seen = {one.layout for one in (*compiled, *unfit)}
    rest = tuple(one for one in found.candidates if one.layout not in seen)
    return replace(found, candidates=rest, compiled=tuple(compiled), unfit=tuple(unfit), own=own)


def _corrected(candidate: Candidate, wrong: Candidate) -> bool:
    """Whether a candidate fits if its estimate is as far off as that of another."""
    more = wrong.memory.total - wrong.estimate.total
    return candidate.estimate.total + more <= candidate.estimate.capacity


def _own(config: Configuration, num_gpus: int) -> tuple[CandidateLayout | None, str | None]:
    try:
        return own_layout(config, num_gpus), None
    except UserError as error:
        return None, str(error)


def _nothing(
    config: Configuration, machine: Machine, num_gpus: int, refused: list[str], needed: float, layout: str
) -> str:
    """Why there is no candidate, in a line."""
    gpu, stacks = machine.datasheet, config.family.stacks(config.model)
    layers = min(stacks.values())
    if layout:
        return (
            f"no layout of {num_gpus:,} {gpu.name} fits: the smallest, {layout}, needs {readable_bytes(needed)} or "
            f"more of {readable_bytes(gpu.memory_bytes)} a GPU; use more GPUs or larger ones"
        )
    if refused:
        return f"no layout of {plural(num_gpus, 'GPU')} runs: {refused[0]}"
    return (
        f"no layout of {plural(num_gpus, 'GPU')} runs: train.global_batch {config.train.global_batch} must be a "
        f"multiple of data x fsdp, tensor must split the model ({config.family.sizes(config.model)}), and pipe is at "
        f"most the {plural(layers, 'layer')} of its {'only' if len(stacks) == 1 else 'shortest'} stack; "
        "change --gpus or --train.global_batch"
    )
