"""Numbers and choices as people read them."""

from collections.abc import Sequence

# of a text that is none
NO_TEXT = "has half a character, such as bytes of another encoding or \\ud800 leave; give it as UTF-8"
BYTES = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")
FLOPS = ("FLOPs", "kFLOPs", "MFLOPs", "GFLOPs", "TFLOPs", "PFLOPs", "EFLOPs")


def plural(count: int, noun: str, several: str | None = None) -> str:
    """`1 node`, `2 nodes`, `1,024 batches`; `several` is the noun's plural where that does not end in s or es."""
    ending = "es" if noun.endswith(("ch", "sh", "s", "x")) else "s"
    return f"{count:,} {noun if count == 1 else several or noun + ending}"


def is_whole_text(text: str) -> bool:
    """Whether no character of a text is half a one (a surrogate), as bytes of another encoding and JSON leave."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def printable(text: str) -> str:
    """The text with what could steer a terminal, such as escape, shown as a replacement character."""
    return "".join(letter if letter.isprintable() or letter in "\n\t" else "\ufffd" for letter in text)


def either(choices: Sequence[str]) -> str:
    """`a`, `a or b`, `a, b, or c`."""
    if len(choices) < 3:
        return " or ".join(choices)
    return f"{', '.join(choices[:-1])}, or {choices[-1]}"


def readable_bytes(num_bytes: float) -> str:
    """Bytes with the unit that keeps them short, such as `1.5 GiB`."""
    return _scaled(num_bytes, 1024, BYTES)


def readable_flops(num_flops: float) -> str:
    """Floating-point operations with the unit that keeps them short, such as `738.2 TFLOPs`."""
    return _scaled(num_flops, 1000, FLOPS)


def readable_count(number: float) -> str:
    """A number of parameters or tokens: `1,008.04 billion`, `22.4 million`, `1,024`."""
    if number >= 1e9:
        return f"{number / 1e9:,.2f} billion"
    return f"{number / 1e6:,.1f} million" if number >= 1e6 else f"{number:,.0f}"


def readable_seconds(seconds: float) -> str:
    """Seconds with the unit that keeps them short, such as `12.3 ms`."""
    for unit, scale in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if abs(seconds) >= scale:
            return f"{seconds / scale:.3g} {unit}"
    return f"{seconds / 1e-6:.3g} us"


def readable_time(seconds: float) -> str:
    """A long time in minutes, hours or days, such as `32.4 days`."""
    for unit, scale in (("days", 86_400), ("hours", 3_600), ("minutes", 60)):
        if seconds >= 2 * scale:
            return f"{seconds / scale:,.1f} {unit}"
    return readable_seconds(seconds)


def _scaled(number: float, step: int, units: tuple[str, ...]) -> str:
    for unit in units[:-1]:
        # what rounds to a whole step has the next unit
        if float(f"{abs(number):.4g}") < step:
            return f"{number:.4g} {unit}"
        number /= step
    return f"{number:,.0f} {units[-1]}" if abs(number) >= step else f"{number:.4g} {units[-1]}"
