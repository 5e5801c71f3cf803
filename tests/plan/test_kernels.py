"""What kernels of a compiled program are for, and the bytes that they touch, of programs that are counted by hand."""

import pytest

from jaxtron.kernels.weight_sums.mosaic import SUM
from jaxtron.plan.compiled import hlo
from jaxtron.plan.compiled.kernels import Kernel, Kernels

HEAD = "HloModule m, is_scheduled=true\n\n"
LAYERS, ROWS, COLUMNS = 8, 4, 16
SIZE = ROWS * COLUMNS


def kernel_of(line: str, fused: str = "", operands: str = "") -> Kernel | None:
    """The kernel of one line of a program that has these operands, calling a fused computation."""
    text = f"{HEAD}{fused}\nENTRY %main () -> f32[] {{\n{operands}  ROOT %it = {line}\n}}\n"
    module = hlo.parse(text)
    (found,) = [one for one in module.computations["main"] if one.name == "it"]
    return Kernels(module).of("main", found)


def fusion(body: str, result: str, **parameters: str) -> Kernel:
    """A fusion of these lines with parameters by name and type, none of which anything else touches."""
    declared = "".join(f"  %{name} = {kind} parameter({n})\n" for n, (name, kind) in enumerate(parameters.items()))
    fused = f"%fused () -> f32[] {{\n{declared}{body}}}\n"
    operands = "".join(f"  %the_{name} = {kind} parameter({n})\n" for n, (name, kind) in enumerate(parameters.items()))
    names = ", ".join(f"%the_{name}" for name in parameters)
    found = kernel_of(f"{result} fusion({names}), kind=kLoop, calls=%fused", fused, operands)
    assert found is not None
    return found


def test_products_with_what_is_fused_into_them() -> None:
    found = fusion(
        """  %dot = bf16[4,16] dot(%x, %w), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  ROOT %sum = bf16[4,16] add(%dot, %residual)
""",
        "bf16[4,16]",
        x="bf16[4,8]",
        w="bf16[8,16]",
        residual="bf16[4,16]",
    )
    assert (found.what, found.flops, found.width) == ("products", 2 * 4 * 8 * 16, 2.0)
    assert (found.read, found.written) == (2 * (4 * 8 + 8 * 16 + SIZE), 2 * SIZE)


@pytest.mark.parametrize(("dtype", "width"), [("f32", 4.0), ("f8e4m3fn", 1.0)])
def test_products_of_other_widths(dtype: str, width: float) -> None:
    operands = f"  %x = {dtype}[4,8] parameter(0)\n  %w = {dtype}[8,16] parameter(1)\n"
    line = "f32[4,16] dot(%x, %w), lhs_contracting_dims={1}, rhs_contracting_dims={0}"
    found = kernel_of(line, operands=operands)
    assert found == Kernel("products", int(width * 160), 4 * SIZE, 1024, width, operations=frozenset({"dot"}))


def test_a_sum_of_a_weight_gradient_is_a_product_that_touches_one_of_the_sums() -> None:
    operands = "".join(
        f"  %{name} = {kind} parameter({number})\n"
        for number, (name, kind) in enumerate(
            {"slot": "s32[1]", "x": "bf16[8,4]", "dy": "bf16[8,16]", "sums": "f32[8,4,16]"}.items()
        )
    )
    line = (
        'f32[8,4,16] custom-call(%slot, %x, %dy, %sums), custom_call_target="mosaic_gpu_v2", '
        f'metadata={{op_name="jit(step)/mosaic.{SUM}.flops1024/jit(call)/by_name"}}'
    )
    found = kernel_of(line, operands=operands)
    assert found == Kernel("products", 4 + 2 * 8 * (4 + 16) + 4 * SIZE, 4 * SIZE, 1024)


def test_a_library_product_adds_to_a_row_in_place_and_its_room_is_no_result() -> None:
    found = fusion(
        """  %row = f32[1,4,16] dynamic-slice(%sums, %i, %zero, %zero), dynamic_slice_sizes={1,4,16}
  %old = f32[4,16] bitcast(%row)
  %call = (f32[4,16], s8[1000000]) custom-call(%x, %w, %old), custom_call_target="__cublas$lt$matmul", \
backend_config={"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"]}}}
  %new = f32[4,16] get-tuple-element(%call), index=0
  %as_row = f32[1,4,16] bitcast(%new)
  %room = s8[1000000] get-tuple-element(%call), index=1
  %all = f32[8,4,16] dynamic-update-slice(%sums, %as_row, %i, %zero, %zero)
  ROOT %both = (f32[8,4,16], s8[1000000]) tuple(%all, %room)
""",
        "(f32[8,4,16], s8[1000000])",
        x="bf16[4,8]",
        w="bf16[8,16]",
        sums="f32[8,4,16]",
        i="s32[]",
        zero="s32[]",
    )
    assert (found.what, found.flops, found.written) == ("products", 1024, 4 * SIZE)
    assert found.read == 2 * (4 * 8 + 8 * 16) + 4 * SIZE + 2 * 4


@pytest.mark.parametrize(
    ("name", "what", "is_fused"),
    [
        ("attention_forward", "attention", True),
        ("ssd_march", "other kernels", True),
        ("grouped_product", "other kernels", False),
    ],
)
def test_kernels_of_ours_by_name(name: str, what: str, is_fused: bool) -> None:
    operands = "  %q = bf16[4,16] parameter(0)\n"
    line = '(bf16[4,16], f32[4]) custom-call(%q), custom_call_target="mosaic_gpu_v2", metadata={op_name="NAME/by_name"}'
    found = kernel_of(line.replace("NAME", f"jit(step)/mosaic.{name}.flops900"), operands=operands)
    assert found == Kernel(what, 2 * SIZE, 2 * SIZE + 4 * 4, 900, is_fused=is_fused)
    # of blocks whose offsets only the device knows the part that attends
    found = kernel_of(line.replace("NAME", f"jit(step)/attends.0.666667/mosaic.{name}.flops900"), operands=operands)
    assert found is not None and found.flops == 600


def test_a_row_is_read_of_what_is_sliced() -> None:
    found = fusion(
        """  %row = f32[1,4,16] dynamic-slice(%weights, %i, %zero, %zero), dynamic_slice_sizes={1,4,16}
  %half = f32[1,2,16] slice(%row), slice={[0:1], [0:2], [0:16]}
  ROOT %twice = f32[1,2,16] add(%half, %half)
""",
        "f32[1,2,16]",
        weights="f32[8,4,16]",
        i="s32[]",
        zero="s32[]",
    )
    # both uses of the slice are added up, but never more than there is
    assert (found.what, found.read, found.written) == ("elementwise", 4 * 32 + 8, 4 * 32)


def test_a_row_is_written_of_what_is_updated_in_place() -> None:
    body = """  %row = f32[1,4,16] bitcast(%new)
  ROOT %all = f32[8,4,16] dynamic-update-slice(%buffer, %row, %i, %zero, %zero)
"""
    parameters = {"buffer": "f32[8,4,16]", "new": "f32[4,16]", "i": "s32[]", "zero": "s32[]"}
    found = fusion(body, "f32[8,4,16]", **parameters)
    assert (found.what, found.read, found.written) == ("buffers", 4 * SIZE + 8, 4 * SIZE)
    # adding to the row reads it too, and computes
    added = body.replace("bitcast(%new)", "dynamic-slice(%buffer, %i, %zero, %zero), dynamic_slice_sizes={1,4,16}")
    added = added.replace("  ROOT", "  %b = f32[1,4,16] bitcast(%new)\n  %sum = f32[1,4,16] add(%row, %b)\n  ROOT")
    found = fusion(added.replace("%buffer, %row, %i", "%buffer, %sum, %i"), "f32[8,4,16]", **parameters)
    assert (found.what, found.read, found.written) == ("elementwise", 2 * 4 * SIZE + 8, 4 * SIZE)
    # what is read of the updated buffer elsewhere is read whole
    whole = body.replace("ROOT %all", "%all") + "  ROOT %negative = f32[8,4,16] negate(%all)\n"
    found = fusion(whole, "f32[8,4,16]", **parameters)
    assert (found.read, found.written) == (4 * (LAYERS + 1) * SIZE + 8, 4 * LAYERS * SIZE)


def test_two_updates_of_one_buffer_and_two_results() -> None:
    found = fusion(
        """  %one = f32[8,16] dynamic-update-slice(%buffer, %a, %i, %zero)
  %two = f32[8,16] dynamic-update-slice(%one, %b, %zero, %zero)
  %minus = f32[2,16] negate(%b)
  ROOT %both = (f32[8,16], f32[2,16]) tuple(%two, %minus)
""",
        "(f32[8,16], f32[2,16])",
        buffer="f32[8,16]",
        a="f32[1,16]",
        b="f32[2,16]",
        i="s32[]",
        zero="s32[]",
    )
    assert (found.read, found.written) == (4 * (16 + 32) + 8, 4 * (16 + 32 + 32))


def test_rows_that_are_added_to_a_table_by_number() -> None:
    found = fusion(
        """  ROOT %sum = f32[50304,16] scatter(%table, %rows, %gradients), update_window_dims={1}, to_apply=%add
""",
        "f32[50304,16]",
        table="f32[50304,16]",
        rows="s32[4,1]",
        gradients="f32[4,16]",
    )
    # gradients, what was there, and the numbers
    assert (found.what, found.read, found.written) == ("elementwise", 2 * 4 * SIZE + 4 * 4, 4 * SIZE)


@pytest.mark.parametrize(
    ("body", "what", "read"),
    [
        ("  ROOT %y = f32[16,4] transpose(%x), dimensions={1,0}\n", "copies", 4 * SIZE),
        ("  ROOT %y = bf16[4,16] convert(%x)\n", "copies", 4 * SIZE),
        ("  ROOT %y = f32[8,16] concatenate(%x, %x), dimensions={0}\n", "copies", 4 * SIZE),
        ("  ROOT %y = f32[4,16] exponential(%x)\n", "elementwise", 4 * SIZE),
        ("  %s = f32[4,16] multiply(%x, %x)\n  ROOT %y = f32[] reduce(%s, %n), dimensions={0,1}\n", "reductions", 260),
        ("  ROOT %y = f32[4,16] broadcast(%n), dimensions={}\n", "fills", 4),
        ("  %c = f32[] constant(0)\n  ROOT %y = f32[8,4,16] broadcast(%c), dimensions={}\n", "fills", 0),
        ("  ROOT %y = f32[] add(%n, %n)\n", "elementwise", 4),
    ],
)
def test_passes_over_memory(body: str, what: str, read: int) -> None:
    result = body.rsplit("ROOT %y = ", 1)[1].split(" ", 1)[0]
    found = fusion(body, result, x="f32[4,16]", n="f32[]")
    assert (found.what, found.read, found.flops) == (what, read, 0)
    assert found.written == hlo.parse(f"{HEAD}ENTRY %m () -> f32[] {{\n{body}}}\n").computations["m"][-1].bytes


def test_instructions_that_are_no_fusions() -> None:
    operands = "  %x = f32[8,16] parameter(0)\n  %i = s32[] parameter(1)\n  %u = f32[1,16] parameter(2)\n"
    row = 4 * COLUMNS
    for line, what, read, written in (
        ("f32[1,16] dynamic-slice(%x, %i, %i), dynamic_slice_sizes={1,16}", "buffers", row, row),
        ("f32[8,16] dynamic-update-slice(%x, %u, %i, %i)", "buffers", row, row),
        ("f32[8,16] copy(%x)", "copies", 8 * row, 8 * row),
        ("(f32[8,16], f32[8,16], u32[]) copy-start(%x)", "copies", 8 * row, 8 * row),
        ("f32[8,16] broadcast(%i), dimensions={}", "fills", 4, 8 * row),
    ):
        found = kernel_of(line, operands=operands)
        assert found is not None and (found.what, found.read, found.written) == (what, read, written), line
    for line in ("f32[128] bitcast(%x)", "(f32[8,16]) tuple(%x)", "f32[16,16] all-gather(%x), dimensions={0}"):
        assert kernel_of(line, operands=operands) is None
    allocation = '(f32[8,16]) custom-call(), custom_call_target="AllocateBuffer"'
    assert kernel_of(allocation, operands=operands) is None


def test_a_copy_whose_place_is_lost_has_that_of_what_it_reads() -> None:
    text = f"""{HEAD}ENTRY %main () -> f32[4] {{
  %x = f32[4] parameter(0), metadata={{source_file="model.py" source_line=7}}
  %y = f32[4] bitcast(%x)
  ROOT %z = f32[4] copy(%y)
}}
"""
    module = hlo.parse(text)
    kernels, (x, y, z) = Kernels(module), module.computations["main"]
    assert kernels.location("main", z) == kernels.location("main", x) == "model.py:7"
    assert hlo.location(module, y) == ""
