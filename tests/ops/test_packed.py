"""grouped_mlp on packed weights against the same on plain ones, in every instruction set that this machine has."""

import copy
import pickle

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import dyncore as dc
from dyncore.backends import cpu
from dyncore.ops.packed import PackedMLP, grouped_mlp_packed
from tests.support import PLAN_KINDS, assert_values, make_plan, oracle_mlp

needs_kernels = pytest.mark.skipif(not cpu.available, reason=cpu.reason)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# rows, groups, H, I: odd sizes, whole panels, halves that end inside a panel, and more than one block of depth
SIZES = [(1, 1, 1, 1), (5, 2, 3, 7), (33, 4, 31, 63), (64, 3, 100, 33), (150, 2, 64, 96), (40, 2, 2050, 35)]


def problem(size, dtype, activation, draw=torch.randn):
    num_rows, groups, h, i = size
    width = 2 * i if activation == "swiglu" else i

    def weight(*shape):
        return draw(*shape).to(dtype)

    scale = 1.0 if draw is not torch.randn else h**-0.5
    w_in, w_out = weight(groups, width, h) * scale, weight(groups, h, i) * (1.0 if scale == 1.0 else i**-0.5)
    return weight(num_rows, h), w_in, w_out, weight(groups, width), weight(groups, h), weight(num_rows, h)


def run(x, w_in, w_out, b_in, b_out, residual, plan, activation, packed=None):
    with dc.execution("sparse"), torch.no_grad():
        if packed is None:
            return dc.grouped_mlp(x, w_in, w_out, b_in, b_out, plan=plan, activation=activation, residual=residual)
        return grouped_mlp_packed(x, w_in, w_out, packed, b_in, b_out, plan=plan, residual=residual)


def used(call):
    """The names of the ops of this package that `call` runs."""
    with torch.profiler.profile() as profile:
        call()
    return {event.key for event in profile.key_averages() if event.key.startswith("dyncore::grouped")}


@needs_kernels
@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_equal_the_oracle(isa, dtype, size, activation):
    inputs = problem(size, dtype, activation)
    plan = make_plan("routed", *size[:2], None)
    packed = PackedMLP(*inputs[1:3], activation)
    got = run(*inputs, plan, activation, packed)
    *wide, residual = (t.double() for t in inputs)
    assert_values(got, oracle_mlp(*wide, plan, None, activation, residual))


@needs_kernels
@pytest.mark.parametrize("kind", PLAN_KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_kind_of_plan_with_scale(isa, dtype, kind):
    size = (70, 1 if kind == "one_group" else 4, 45, 70)
    inputs = problem(size, dtype, "swiglu")
    plan = make_plan(kind, *size[:2], torch.float32)
    got = run(*inputs, plan, "swiglu", PackedMLP(*inputs[1:3], "swiglu"))
    *wide, residual = (t.double() for t in inputs)
    assert_values(got, oracle_mlp(*wide, plan, plan.scale.detach().double(), "swiglu", residual))


@needs_kernels
@pytest.mark.parametrize("rows", [1, 4, 13, 60])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_whole_numbers_give_the_bits_of_the_plain_weights(isa, dtype, rows):
    def whole(*shape):
        return torch.randint(-1, 2, shape).float()

    size = (rows, 2, 37, 50)
    inputs = problem(size, dtype, "relu", whole)
    plan = make_plan("routed", *size[:2], None)
    assert torch.equal(run(*inputs, plan, "relu", PackedMLP(*inputs[1:3], "relu")), run(*inputs, plan, "relu"))


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strided_weights(isa, dtype):
    x, w_in, w_out, *others = problem((40, 3, 64, 70), dtype, "swiglu")
    plan = make_plan("routed", 40, 3, None)
    want = run(x, w_in, w_out, *others, plan, "swiglu", PackedMLP(w_in, w_out, "swiglu"))
    for change in (lambda w: w.mT.contiguous().mT, lambda w: w.repeat_interleave(2, dim=1)[:, ::2]):
        a, b = change(w_in), change(w_out)
        assert torch.equal(run(x, a, b, *others, plan, "swiglu", PackedMLP(a, b, "swiglu")), want)


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_thread_count_gives_the_same_bits(dtype):
    inputs = problem((200, 3, 256, 300), dtype, "swiglu")
    plan = make_plan("routed", 200, 3, None)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(run(*inputs, plan, "swiglu", PackedMLP(*inputs[1:3], "swiglu")))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(r, results[0]) for r in results)


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_panels_take_the_bytes_that_are_documented(isa, dtype):
    _, w_in, w_out, *_ = problem((1, 3, 64, 40), dtype, "swiglu")
    pairs = dtype is torch.bfloat16 and isa == "avx512_bf16"
    assert PackedMLP(w_in, w_out, "swiglu").nbytes == 3 * (2 * 64 * 64 + 64 * 40) * (2 if pairs else 4)


@needs_kernels
def test_panels_of_another_instruction_set_are_refused():
    names = cpu.native.supported_isas()
    if len(names) < 2:
        pytest.skip("needs two instruction sets")
    inputs, plan = problem((5, 2, 8, 8), torch.float32, "gelu"), make_plan("routed", 5, 2, None)
    before = cpu.isa()
    cpu.native.select_isa(names[-1])
    packed = PackedMLP(*inputs[1:3], "gelu")
    cpu.native.select_isa(names[0])
    try:
        with pytest.raises(ValueError, match=f"packed for the instruction set {names[0]}, got {names[-1]}"):
            run(*inputs, plan, "gelu", packed)
    finally:
        cpu.native.select_isa(before)


@needs_kernels
@pytest.mark.parametrize("wrong", ["in_panels", "out_panels"])
def test_panels_of_another_weight_are_refused(wrong):
    inputs, plan = problem((5, 2, 8, 40), torch.float32, "gelu"), make_plan("routed", 5, 2, None)
    packed = PackedMLP(*inputs[1:3], "gelu")
    setattr(packed, wrong, getattr(packed, wrong)[:, :, :, :-1])
    with pytest.raises(ValueError, match=rf"{wrong}: expected shape \[2, 1, "):
        run(*inputs, plan, "gelu", packed)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_opcheck(dtype):
    x, w_in, w_out, *others = problem((9, 3, 10, 12), dtype, "swiglu")
    plan = make_plan("routed", 9, 3, None)
    packed = PackedMLP(w_in, w_out, "swiglu")
    tensors = (plan.rows, plan.offsets, plan.scale, plan.row_offsets, plan.row_slots)
    panels = (packed.in_panels, packed.out_panels, packed.isa)
    torch.library.opcheck(torch.ops.dyncore.pack_weight, (w_in, 2))
    torch.library.opcheck(torch.ops.dyncore.grouped_mlp_packed, (x, w_in, w_out, *others, *tensors, "swiglu", *panels))


def layer_and_rows(dtype=torch.float32, **options):
    return dc.nn.MoE(24, 40, 4, 2, **options).to(dtype), torch.randn(3, 11, 24).to(dtype)


@needs_kernels
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_packed_layer_gives_what_it_gave_and_counts_the_same_flops(dtype):
    layer, x = layer_and_rows(dtype, bias=True, shared_experts=1)
    with torch.no_grad(), dc.execution("sparse"):
        with FlopCounterMode(display=False) as plain:
            want = layer(x)
        assert layer.pack() > 0
        assert used(lambda: layer(x)) == {"dyncore::grouped_mlp_packed"}
        with FlopCounterMode(display=False) as packed:
            got = layer(x)
    assert_values(got, want.double())
    assert packed.get_total_flops() == plain.get_total_flops()
    layer.unpack()
    with torch.no_grad(), dc.execution("sparse"):
        assert torch.equal(layer(x), want)


@needs_kernels
def test_inference_mode_uses_panels_and_grad_uses_the_parameters():
    layer, x = layer_and_rows()
    layer.pack()
    with dc.execution("sparse"):
        with torch.inference_mode():
            assert used(lambda: layer(x)) == {"dyncore::grouped_mlp_packed"}
        assert used(lambda: layer(x)) == {"dyncore::grouped_mlp"}
        layer(x).square().sum().backward()
        assert layer.w_in.grad is not None
        with torch.no_grad():
            layer.w_in.mul_(2)
        layer(x)  # of the parameters as they are now
    with dc.execution("masked"), torch.no_grad():
        layer(x)


def step(layer):
    torch.optim.SGD(layer.parameters(), lr=0.1).step()


def replace(layer):
    layer.w_in = torch.nn.Parameter(layer.w_in.detach().clone())


@needs_kernels
@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda layer: layer.load_state_dict(layer.state_dict()), id="load_state_dict"),
        pytest.param(lambda layer: layer.load_state_dict(copy.deepcopy(layer.state_dict()), assign=True), id="assign"),
        pytest.param(step, id="step"),
        pytest.param(lambda layer: layer.to(torch.float16), id="to"),
        pytest.param(replace, id="replaced"),
    ],
)
def test_changed_weights_are_refused_until_packed_again(change):
    layer, x = layer_and_rows()
    layer(x).square().sum().backward()
    layer.pack()
    change(layer)
    x = x.to(layer.w_in.dtype)
    with dc.execution("sparse"), torch.no_grad():
        with pytest.raises(RuntimeError, match=r"pack\(\) again, or unpack\(\)"):
            layer(x)
        layer.pack()
        got = layer(x)
        layer.unpack()
        assert_values(got, layer(x).double())


@needs_kernels
def test_panels_are_neither_saved_nor_copied():
    layer, x = layer_and_rows()
    names, size = list(layer.state_dict()), len(pickle.dumps(layer))
    layer.pack()
    assert list(layer.state_dict()) == names
    assert len(pickle.dumps(layer)) == size
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        with torch.no_grad(), dc.execution("sparse"):
            assert used(lambda other=other: other(x)) == {"dyncore::grouped_mlp"}


def test_where_there_are_no_panels_the_layer_computes_as_before():
    layer, x = layer_and_rows(torch.float64)
    want = layer(x)
    assert layer.pack() == 0
    assert torch.equal(layer(x), want)


@needs_kernels
def test_autocast_and_compile_use_the_parameters():
    layer, x = layer_and_rows()
    with torch.no_grad(), dc.execution("sparse"):
        with torch.autocast("cpu", torch.bfloat16):
            want = layer(x)
        layer.pack()
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(layer(x), want)
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        assert_values(compiled(x), layer(x).double())
