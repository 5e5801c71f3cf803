"""FLOPs of compiled products: none is missed, whatever computation or asynchronous pair it lies in."""

import pytest

from jaxtron.models.decoder.cost import model_flops_per_token
from jaxtron.plan.compiled import hlo
from jaxtron.plan.compiled.flops import work
from jaxtron.plan.compiled.overlap import products_beside
from jaxtron.plan.compiled.rehearsal import Rehearsal, rehearse
from jaxtron.run.configuration import Configuration

# [8, 4] times [4, 16]
PRODUCT = 2 * 8 * 4 * 16
LEFT, RIGHT, OUT, SPACE = "bf16[8,4]{1,0}", "bf16[4,16]{1,0}", "bf16[8,16]{1,0}", "s8[1024]{0}"
DIMS = "lhs_contracting_dims={1}, rhs_contracting_dims={0}"
LIBRARY = 'custom_call_target="__cublas$lt$matmul", backend_config={"gemm_backend_config":{"dot_dimension_numbers":'
LIBRARY += '{"lhs_contracting_dimensions":["1"],"rhs_contracting_dimensions":["0"]}}}'
KERNEL = f'custom_call_target="mosaic_gpu", metadata={{op_name="jit(step)/mosaic.attention.flops{PRODUCT}"}}'
DOT = f"""%product (a: bf16[8,4], b: bf16[4,16]) -> bf16[8,16] {{
  %a = {LEFT} parameter(0)
  %b = {RIGHT} parameter(1)
  ROOT %dot = {OUT} dot(%a, %b), {DIMS}
}}
"""
STARTED = f"(({LEFT}, {RIGHT}), {OUT}, u32[])"
# what runs one product of %x and %y: lines of the entry, and computations before it
ONE_PRODUCT = {
    "dot": (f"%out = {OUT} dot(%x, %y), {DIMS}", ""),
    "scaled dot": (f"%out = {OUT} scaled-dot(%x, %y, %x, %y), {DIMS}", ""),
    "fusion": (f"%out = {OUT} fusion(%x, %y), kind=kCustom, calls=%product", DOT),
    "call": (f"%out = {OUT} call(%x, %y), to_apply=%product", DOT),
    "fusion in a call": (
        f"%out = {OUT} call(%x, %y), to_apply=%outer",
        f"{DOT}\n%outer (c: bf16[8,4], d: bf16[4,16]) -> bf16[8,16] {{\n  %c = {LEFT} parameter(0)\n"
        f"  %d = {RIGHT} parameter(1)\n  ROOT %inner = {OUT} fusion(%c, %d), kind=kCustom, calls=%product\n}}\n",
    ),
    "library": (f"%out = ({OUT}, {SPACE}) custom-call(%x, %y), {LIBRARY}", ""),
    "kernel": (f"%out = {OUT} custom-call(%x, %y), {KERNEL}", ""),
    "library, of eight bits and their scales": (
        f"%out = ({OUT}, {SPACE}) custom-call(%x, %y, %z, %z), {LIBRARY.replace('lt$matmul', 'lt$matmul$f8')}",
        "",
    ),
    "library's start": (
        f"%s = (({LEFT}, {RIGHT}), ({OUT}, {SPACE})) custom-call-start(%x, %y), {LIBRARY}\n"
        f"  %out = ({OUT}, {SPACE}) custom-call-done(%s), {LIBRARY}",
        "",
    ),
    "library's start, adding to a third operand": (
        f"%s = (({LEFT}, {RIGHT}, {OUT}), ({OUT}, {SPACE})) custom-call-start(%x, %y, %z), {LIBRARY}\n"
        f"  %out = ({OUT}, {SPACE}) custom-call-done(%s)",
        "",
    ),
    "kernel's start": (
        f"%s = {STARTED} custom-call-start(%x, %y), {KERNEL}\n  %out = {OUT} custom-call-done(%s), {KERNEL}",
        "",
    ),
    "dot's start": (f"%s = {STARTED} dot-start(%x, %y), {DIMS}\n  %out = {OUT} dot-done(%s)", ""),
    "fusion's start": (
        f"%s = {STARTED} fusion-start(%x, %y), kind=kCustom, calls=%product\n"
        f"  %out = {OUT} fusion-done(%s), kind=kCustom, calls=%product",
        DOT,
    ),
    "call's start": (
        f"%s = {STARTED} call-start(%x, %y), to_apply=%product\n  %out = {OUT} call-done(%s), to_apply=%product",
        DOT,
    ),
    # an end, and what is between, names the computation again
    "asynchronous computation": (
        f"%s = {STARTED} async-start(%x, %y), calls=%product\n"
        f"  %u = {STARTED} async-update(%s), calls=%product\n  %out = {OUT} async-done(%u), calls=%product",
        DOT,
    ),
}


def module(lines: str, before: str = "") -> hlo.Module:
    parameters = f"%x = {LEFT} parameter(0)\n  %y = {RIGHT} parameter(1)\n  %z = {OUT} parameter(2)"
    return hlo.parse(
        f"HloModule step\n\n{before}\nENTRY %main (x: bf16[8,4]) -> bf16[8,16] {{\n  {parameters}\n  {lines}\n}}\n"
    )


@pytest.mark.parametrize("name", ONE_PRODUCT)
def test_a_product_is_counted_once_whatever_wraps_it(name: str) -> None:
    found = work(module(*ONE_PRODUCT[name]))
    assert (found.flops, found.choices) == (PRODUCT, ())


def test_products_of_a_batch_are_all_counted() -> None:
    parameters = "%a = bf16[6,2,8,4]{3,2,1,0} parameter(0)\n  %b = bf16[6,2,4,16]{3,2,1,0} parameter(1)"
    dims = "lhs_batch_dims={0,1}, lhs_contracting_dims={3}, rhs_batch_dims={0,1}, rhs_contracting_dims={2}"
    product = f"%out = bf16[6,2,8,16]{{3,2,1,0}} dot(%a, %b), {dims}"
    text = f"HloModule step\n\nENTRY %main (a: bf16[6,2,8,4]) -> bf16[6,2,8,16] {{\n  {parameters}\n  {product}\n}}\n"
    assert work(hlo.parse(text)).flops == 12 * PRODUCT


def test_what_is_no_product_has_none() -> None:
    found = module(f'%s = {STARTED} custom-call-start(%x, %y), custom_call_target="__cub$DeviceRadixSort"')
    assert work(found).flops == 0


def test_a_loop_over_kinds_of_layers_has_as_many_products_as_layers() -> None:
    """Of 12 iterations 7 take a branch with one product, 4 one with two, and one takes one with three."""

    def branch(name: str, count: int, kind: str) -> str:
        source = f'metadata={{op_name="jit(step)/while/body/cond/kind={kind}/dot_general"}}'
        dots = "\n".join(f"  %{name}{number} = {OUT} dot(%x, %y), {DIMS}, {source}" for number in range(count))
        both = f"  %x = {LEFT} parameter(0)\n  %y = {RIGHT} parameter(1)\n"
        return f"%{name} (x: bf16[8,4], y: bf16[4,16]) -> bf16[8,16] {{\n{both}{dots}\n}}\n"

    def choice(others: str, first: str) -> str:
        return f"conditional(%p, %x, %x), false_computation=%{others}, true_computation=%{first}"

    before = branch("a", 1, "mamba") + branch("b", 2, "mlp") + branch("c", 3, "attention")
    inputs = f"  %x = {LEFT} parameter(0)\n  %p = pred[] parameter(1)\n"
    before += f"%rest (x: bf16[8,4]) -> bf16[8,16] {{\n{inputs}  ROOT %two = {OUT} {choice('c', 'b')}\n}}\n"
    before += f"%body (x: bf16[8,4]) -> bf16[8,16] {{\n{inputs}  ROOT %one = {OUT} {choice('rest', 'a')}\n}}\n"
    before += "%more (x: bf16[8,4]) -> pred[] {\n  ROOT %go = pred[] parameter(0)\n}\n"
    loop = 'while(%x), condition=%more, body=%body, backend_config={"known_trip_count":{"n":"12"}}'
    found = module(f"%out = {OUT} {loop}", before)
    shares = {"mamba": 7 / 12, "mlp": 4 / 12, "attention": 1 / 12}
    assert work(found, shares=shares).most == pytest.approx((7 + 4 * 2 + 3) * PRODUCT, rel=1e-3)
    # without them each iteration counts its largest branch
    assert work(found).most == 12 * 3 * PRODUCT


@pytest.mark.parametrize("name", ONE_PRODUCT)
def test_a_product_beside_a_collective_hides_it_whatever_wraps_it(name: str) -> None:
    lines, before = ONE_PRODUCT[name]
    start = f"%moved = ({LEFT}, {LEFT}) collective-permute-start(%x), source_target_pairs={{{{0,1}}}}"
    end = f"%there = {LEFT} collective-permute-done(%moved)"
    assert products_beside(module(f"{start}\n  {lines}\n  {end}", before))["moved"] == PRODUCT
    assert products_beside(module(f"{start}\n  {end}\n  {lines}", before))["moved"] == 0
    first, *rest = lines.split("\n")
    if rest:
        # under way when the collective starts, or when it ends
        last = "\n".join(rest)
        for order in (f"{first}\n  {start}\n  {end}\n{last}", f"{start}\n  {first}\n  {end}\n{last}"):
            assert products_beside(module(order, before))["moved"] == PRODUCT


def step(preset: str) -> Rehearsal:
    """A small tensor-parallel step with a loop over microbatches."""
    model = {"num_layers": 3, "hidden_size": 512, "num_heads": 8, "vocab_size": 1024, "bias": False}
    config = Configuration.model_validate(
        {
            "model": {**model, "position": "rotary"},
            "data": {"sequence_length": 256},
            "train": {"global_batch": 16, "microbatches": 8},
            "mesh": {"data": 1, "tensor": 8},
            "runtime": {"xla_preset": preset},
        }
    )
    return rehearse(config, gpu="h100", num_gpus=8)


@pytest.mark.slow
def test_products_in_parts_beside_their_communication_are_all_counted() -> None:
    cut = step("collective_matmul")
    # products of cuBLAS in streams of their own
    assert cut.hlo.count(" custom-call-start(") > 10
    assert work(cut.module).most == work(step("none").module).most
    moved = [entry for entry in cut.collectives if entry.kind == "collective_permute" and entry.asynchronous]
    assert moved and any(entry.beside for entry in moved)
    # the whole square of logits by formula, half of them in the kernel, which makes them again in its backward
    model = model_flops_per_token(cut.session.config.model, 256) * 16 * 256 / 8
    assert work(cut.module).most == pytest.approx(model, rel=0.05)
