"""Texts that were split at spaces for old benchmarks, as people write them."""

import re
from collections.abc import Callable

# what stands between opening and closing loses the spaces at its ends
PAIRS = ("()", "[]", "{}", '""', "''")


def wikitext(text: str) -> str:
    """WikiText (Merity et al., 1609.07843) without the spaces around its marks.

    The rules are those of Megatron's `tasks/zeroshot_gpt/detokenizer.py` in their order, so that perplexities compare;
    its rule for years (`' 90s`), which matches nothing but slashes, is left out.
    """
    text = text.replace("s '", "s'")
    # numbers and hyphens are written `1 @,@ 000`
    for mark in "-,.":
        text = text.replace(f" @{mark}@ ", mark)
    for mark in ":;.!?,":
        text = text.replace(f" {mark} ", f"{mark} ")
    for opening, closing in PAIRS:
        first, last = re.escape(opening), re.escape(closing)
        text = re.sub(rf"{first}\s*([^{last}]*?)\s*{last}", rf"{opening}\1{closing}", text)
    # headings are written `= = Title = =`
    for depth in (4, 3, 2):
        text = text.replace(" ".join("=" * depth), "=" * depth)
    for old, new in ((" ° ", "°"), (" \n", "\n"), ("\n ", "\n"), (" N ", " 1 "), (" 's", "'s")):
        text = text.replace(old, new)
    return text


DETOKENIZERS: dict[str, Callable[[str], str]] = {"none": lambda text: text, "wikitext": wikitext}
