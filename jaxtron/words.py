"""Numbers as people read them."""


def plural(count: int, noun: str, several: str | None = None) -> str:
    """`1 node`, `2 nodes`, `1,024 nodes`; `several` is the noun's plural where that is not its singular and an s."""
    return f"{count:,} {noun if count == 1 else several or noun + 's'}"
