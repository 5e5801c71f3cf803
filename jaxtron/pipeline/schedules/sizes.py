"""The sizes a schedule is asked for, against those it runs."""

from jaxtron.config import UserError


def check_sizes(
    name: str,
    num_stages: int,
    num_microbatches: int,
    num_chunks: int,
    *,
    least_chunks: int = 1,
    most_chunks: int | None = 1,
    least_stages: int = 1,
    least_microbatches: int = 1,
) -> None:
    """Raises `UserError`, with the fix, unless the schedule `name` runs these; `most_chunks` None is without limit."""
    if num_stages < least_stages:
        raise UserError(f"{name} needs at least {least_stages} pipeline stages, not {num_stages}")
    if num_microbatches < 1:
        raise UserError(f"a step needs at least one microbatch, not {num_microbatches}")
    if num_microbatches < least_microbatches:
        raise UserError(
            f"{name} on {num_stages} stages needs at least {least_microbatches} microbatches, not {num_microbatches}"
        )
    if num_chunks < least_chunks or (most_chunks is not None and num_chunks > most_chunks):
        if most_chunks is None:
            raise UserError(f"{name} needs at least {least_chunks} chunks a stage, not {num_chunks}")
        plural = "chunk" if most_chunks == 1 else "chunks"
        hint = "; for more chunks use interleaved" if num_chunks > 1 and most_chunks == 1 else ""
        raise UserError(f"{name} has {most_chunks} {plural} a stage, not {num_chunks}{hint}")
