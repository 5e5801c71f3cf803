"""Whether sizes of a model split over a mesh, in one line where they do not; what families check themselves."""

from collections.abc import Mapping

from jaxtron.config import UserError
from jaxtron.sharding.config import ContextConfig


def check_multiple(name: str, size: int, tensor: int) -> None:
    """`UserError` unless `size`, called `name`, splits into `mesh.tensor` parts."""
    if size % tensor:
        raise UserError(f"{name} {size} is not a multiple of mesh.tensor {tensor}; change one of them")


def check_heads(heads: Mapping[str, int], sizes: Mapping[str, int], context: ContextConfig) -> None:
    """`UserError` where numbers of heads, by their setting, do not split over a mesh of these sizes by flag; the first
    are those of queries."""
    tensor, parts = sizes["tensor"], sizes["context"]
    (name, queries), *_ = heads.items()
    check_multiple(f"model.{name}", queries, tensor)
    if parts == 1:
        return
    inner = context.groups(parts)[0]
    for name, count in heads.items():
        if count % (inner * tensor):
            raise UserError(
                f"context.method {context.method} splits heads {inner} ways beside mesh.tensor {tensor}, "
                f"and model.{name} {count} is not a multiple of {inner * tensor}; use context.method ring"
            )
