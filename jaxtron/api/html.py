"""Tables and lines as HTML for notebooks: with no colours of their own, so that they are light and dark."""

import html
from collections.abc import Collection, Iterable, Sequence


def html_table(
    header: Sequence[str], rows: Iterable[Sequence[object]], *, right: Collection[int] = (), title: str = ""
) -> str:
    """A table with a line above it; the columns in `right` end on the right."""

    def cells(row: Sequence[object], tag: str) -> str:
        parts = (
            f'<{tag} style="text-align:{"right" if column in right else "left"}">{html.escape(str(cell))}</{tag}>'
            for column, cell in enumerate(row)
        )
        return f"<tr>{''.join(parts)}</tr>"

    body = "".join(cells(row, "td") for row in rows)
    return f"{html_lines(title)}<table><thead>{cells(header, 'th')}</thead><tbody>{body}</tbody></table>"


def html_lines(*lines: str) -> str:
    """Lines of text, each a paragraph; empty ones are left out."""
    return "".join(f'<p style="margin:0.2em 0">{html.escape(line)}</p>' for line in lines if line)
