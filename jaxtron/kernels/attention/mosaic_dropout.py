"""What dropout leaves of a tile of scores in the registers of a warpgroup: `dropout.survives`, each call made once.

Written out, for the compiler does not find what a thread's numbers share: it would make each four times. The
interpreter runs none of this; `tests/kernels/test_attention_dropout.py` runs what is compiled of it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.pallas import mosaic_gpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, vector

from jaxtron.kernels.attention.dropout import MULTIPLIER, ROUNDS, WEYL, WORD, philox
from jaxtron.kernels.dropout import threshold
from jaxtron.kernels.mosaic import TILE
from jaxtron.typing import Array, Bool

# what it exports is typed too narrowly
plgpu: Any = mosaic_gpu
# columns that the registers of a tile are grouped by
GROUP = 8


@dataclass(frozen=True)
class _Word:
    """32 bits in a register."""

    value: Any

    def __xor__(self, other: "_Word") -> "_Word":
        return _Word(arith.xori(self.value, other.value))


def tile_survives(
    shape: tuple[int, ...], starts: tuple[Any, Any], seeds: tuple[Any, Any], rate: float, *, keys_are_rows: bool
) -> Bool[Array, "S T"]:
    """True where a probability stays in a `TILE` whose first query and key are at `starts`, multiples of 16.

    Its rows are queries, or keys.
    """
    # inline code takes arrays alone: each has one number everywhere
    scalars = [lax.convert_element_type(number, jnp.uint32) for number in (*starts, *seeds)]
    given = [plgpu.layout_cast(jnp.full(shape, number, jnp.uint32), TILE) for number in scalars]

    @plgpu.inline_mgpu(
        arg_types=(TILE,) * len(given), return_type=plgpu.ShapeDtypeStruct(shape, jnp.uint32, layout=TILE)
    )
    def draw(_: Any, *given: Any) -> Any:
        like = given[0]
        query, key, seed, other = (vector.extract(array.registers.flat[0], [], [0]) for array in given)
        row, column = (arith.index_cast(_integer(32), x) for x in next(iter(like.layout.thread_idxs(shape))))
        of_row, of_column = (key, query) if keys_are_rows else (query, key)
        row, column = arith.addi(row, of_row), arith.addi(column, of_column)
        first, *others = (arith.addi(seed, _constant(number * WEYL)) for number in range(ROUNDS))
        # the counter's second word is its key's with the other seed: here it costs nothing a call
        keys = [_Word(key) for key in (arith.xori(first, other), *others)]

        def call(offset: int) -> tuple[Any, Any]:
            at = arith.addi(column, _constant(offset))
            counter = (at, row) if keys_are_rows else (row, at)
            return philox((_Word(counter[0]), _Word(counter[1])), keys, _product)

        words = thread_words(shape[1], call, _upper, keys_are_rows=keys_are_rows)
        assert like.registers.squeeze().shape == (shape[1] // GROUP, 2), like.registers.shape
        kind = ir.VectorType.get((2,), _integer(32))
        registers = np.empty_like(like.registers)
        for place, pair in zip(np.ndindex(registers.shape), words, strict=True):
            registers[place] = vector.from_elements(kind, [word.value for word in pair])
        return type(like)(_registers=registers, _layout=like.layout, _is_signed=False)

    return draw(*given) >= jnp.uint32(threshold(rate) << 16)


def thread_words(
    columns: int, call: Callable[[int], tuple[Any, Any]], upper: Callable[[Any], Any], *, keys_are_rows: bool
) -> list[list[Any]]:
    """The numbers of one thread in the order of its registers, of two columns each; their upper 16 bits count.

    `call` gives the two words at the thread's first row and its first column plus so many; `upper` moves the lower 16
    bits of a word up. A thread has rows r and r + 8, and of each 8 columns the same two.
    """
    registers = []
    for first in range(0, columns, 2 * GROUP):
        calls = [call(first + column) for column in range(2)]
        for group in range(2):
            for half in range(2):
                later_query, later_key = (group, half) if keys_are_rows else (half, group)
                words = [made[later_query] for made in calls]
                registers.append(words if later_key else [upper(word) for word in words])
    return registers


def _integer(bits: int) -> Any:
    return ir.IntegerType.get_signless(bits)


def _constant(value: int, bits: int = 32) -> Any:
    value &= WORD
    # MLIR takes the numbers of a sign
    signed = value - (1 << bits) if value >> (bits - 1) else value
    return arith.constant(_integer(bits), ir.IntegerAttr.get(_integer(bits), signed))


def _product(word: _Word) -> tuple[_Word, _Word]:
    """Both words of a word times `MULTIPLIER`: one instruction, of which LLVM would make two."""
    wide = llvm.inline_asm(_integer(64), [word.value], f"mul.wide.u32 $0, $1, {MULTIPLIER};", "=l,r")
    high = arith.trunci(_integer(32), arith.shrui(wide, _constant(32, bits=64)))
    return _Word(high), _Word(arith.trunci(_integer(32), wide))


def _upper(word: _Word) -> _Word:
    return _Word(arith.shli(word.value, _constant(16)))
