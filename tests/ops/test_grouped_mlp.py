"""grouped_mlp against the float64 oracle: values, every gradient, every mode, dtype and kind of plan."""

import pytest
import torch

import dyncore as dc
from tests.support import ACTIVATIONS, GATED, PLAN_KINDS, assert_gradients, assert_values, make_plan, oracle_mlp

NAMES = ("x", "w_in", "w_out", "b_in", "b_out", "residual")


def problem(num_rows=37, groups=3, width=33, inner=31, activation="gelu", dtype=torch.float32, biased=True):
    """Leaves that require grad, at unit scale (small data hide a wrong gate)."""
    wide = inner * (2 if activation in GATED else 1)
    shapes = {
        "x": (num_rows, width),
        "w_in": (groups, wide, width),
        "w_out": (groups, width, inner),
        "b_in": (groups, wide) if biased else None,
        "b_out": (groups, width) if biased else None,
        "residual": (num_rows, width) if biased else None,
    }
    scale = {"w_in": width**-0.5, "w_out": inner**-0.5}
    return {
        name: None if shape is None else (torch.randn(shape) * scale.get(name, 1.0)).to(dtype).requires_grad_()
        for name, shape in shapes.items()
    }


def wide_copy(t):
    return None if t is None else t.detach().double().requires_grad_()


def check(p, plan, activation, mode="sparse"):
    """Values and all gradients of grouped_mlp against the oracle's."""
    with dc.execution(mode):
        out = dc.grouped_mlp(
            p["x"], p["w_in"], p["w_out"], p["b_in"], p["b_out"], plan=plan, activation=activation,
            residual=p["residual"],
        )  # fmt: skip
    q = {name: wide_copy(t) for name, t in p.items()}
    scale = wide_copy(plan.scale)
    want = oracle_mlp(q["x"], q["w_in"], q["w_out"], q["b_in"], q["b_out"], plan, scale, activation, q["residual"])
    assert out.dtype == p["x"].dtype
    assert_values(out, want)
    grad = torch.randn(out.shape).to(out.dtype)
    leaves = [n for n in NAMES if p[n] is not None]
    got = torch.autograd.grad(out, [p[n] for n in leaves] + [plan.scale] * (scale is not None), grad)
    expected = torch.autograd.grad(
        want, [q[n] for n in leaves] + [scale] * (scale is not None), grad.double(), materialize_grads=True
    )
    for name, a, b in zip([*leaves, "scale"], got, expected, strict=False):
        assert_gradients(a, b, out.dtype, name)


@pytest.mark.parametrize("mode", ["sparse", "masked", "auto"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_values_and_gradients_equal_the_oracle(dtype, activation, mode):
    check(problem(activation=activation, dtype=dtype), make_plan("routed", 37, 3, torch.float32), activation, mode)


@pytest.mark.parametrize("mode", ["sparse", "masked"])
@pytest.mark.parametrize("kind", PLAN_KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_every_kind_of_plan(dtype, kind, mode):
    plan = make_plan(kind, 37, 3, torch.float32)
    check(problem(groups=plan.num_groups, dtype=dtype), plan, "gelu", mode)


@pytest.mark.parametrize("size", [(1, 1, 1), (2, 3, 5), (63, 64, 100), (100, 96, 63), (130, 1, 1000)], ids=str)
@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_odd_sizes(dtype, activation, size):
    rows, width, inner = size
    p = problem(rows, 4, width, inner, activation, dtype)
    check(p, make_plan("routed", rows, 4, torch.float32), activation)


@pytest.mark.parametrize("scale_dtype", [None, torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_scale_of_any_float_dtype_and_no_biases(dtype, scale_dtype):
    check(problem(dtype=dtype, biased=False), make_plan("routed", 37, 3, scale_dtype), "silu")


@pytest.mark.parametrize("mode", ["sparse", "masked"])
@pytest.mark.parametrize("wanted", [*NAMES, "scale"])
def test_one_gradient_alone(wanted, mode):
    p = problem()
    plan = make_plan("routed", 37, 3, torch.float32)
    everything = {**p, "scale": plan.scale}

    def run(names):
        for name, t in everything.items():
            t.requires_grad_(name in names)
        with dc.execution(mode):
            out = dc.grouped_mlp(
                p["x"], p["w_in"], p["w_out"], p["b_in"], p["b_out"], plan=plan, residual=p["residual"]
            )
        return torch.autograd.grad(out.square().sum(), [everything[wanted]])[0]

    alone, among_all = run([wanted]), run(list(everything))
    assert alone.abs().sum() > 0
    torch.testing.assert_close(alone, among_all, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("mode", ["sparse", "masked"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_unselected_rows_may_hold_nan(dtype, mode):
    p = problem(dtype=dtype, groups=1)
    mask = torch.arange(37) % 3 == 0
    with torch.no_grad():
        p["x"][~mask] = float("nan")
    plan = dc.select(mask, torch.rand(37))
    with dc.execution(mode):
        out = dc.grouped_mlp(p["x"], p["w_in"], p["w_out"], plan=plan)
    grads = torch.autograd.grad(out, [p["x"], p["w_in"], p["w_out"]], torch.ones_like(out))
    assert torch.isfinite(out).all()
    assert all(torch.isfinite(g).all() for g in grads)
    assert (out[~mask] == 0).all()
    assert (grads[0][~mask] == 0).all()
    assert (out[mask] != 0).any(1).all()


@pytest.mark.parametrize("mode", ["sparse", "masked"])
def test_a_row_without_a_slot_gives_exactly_its_residual(mode):
    p = problem(groups=1)
    mask = torch.arange(37) % 2 == 0
    with torch.no_grad():
        p["residual"][1] = float("nan")
    with dc.execution(mode):
        out = dc.grouped_mlp(p["x"], p["w_in"], p["w_out"], plan=dc.select(mask), residual=p["residual"])
    assert torch.equal(out[~mask][1:], p["residual"][~mask][1:])
    assert out[1].isnan().all()
    assert torch.isfinite(out[mask]).all()


def test_leading_dimensions_are_rows():
    p = problem(num_rows=12, groups=1)
    mask = torch.rand(3, 4) < 0.5
    x, residual = p["x"].detach().view(3, 4, -1), p["residual"].detach().view(3, 4, -1)
    out = dc.grouped_mlp(x, p["w_in"], p["w_out"], plan=dc.select(mask), residual=residual)
    flat = dc.grouped_mlp(p["x"], p["w_in"], p["w_out"], plan=dc.select(mask), residual=p["residual"])
    assert out.shape == (3, 4, 33)
    assert torch.equal(out.reshape(12, -1), flat)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_strided_and_expanded_inputs_and_gradients(dtype):
    p = problem(dtype=dtype)
    plan = make_plan("routed", 37, 3, torch.float32)
    strided = {
        "x": torch.stack([p["x"], p["x"]], 2)[..., 0],  # last stride 2
        "w_in": p["w_in"].transpose(1, 2).contiguous().transpose(1, 2),
        "w_out": torch.cat([p["w_out"], p["w_out"]], 2)[..., :31],
        "b_in": p["b_in"][:1].expand(3, -1),
        "b_out": p["b_out"].t().contiguous().t(),
        "residual": p["residual"][:1].expand(37, -1),
    }

    def run(q):
        leaves = {n: t.detach().requires_grad_() for n, t in q.items()}
        out = dc.grouped_mlp(
            leaves["x"], leaves["w_in"], leaves["w_out"], leaves["b_in"], leaves["b_out"], plan=plan,
            residual=leaves["residual"],
        )  # fmt: skip
        expanded = torch.ones((), dtype=dtype).expand_as(out)
        return [out, *torch.autograd.grad(out, [*leaves.values(), plan.scale], expanded)]

    # Not bit for bit: a kernel may sum in another order where a weight lies the other way.
    for got, want in zip(run(strided), run({n: t.contiguous() for n, t in strided.items()}), strict=True):
        assert_values(got, want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("rows", [0, 5])
def test_no_rows_or_no_slots(rows, dtype):
    p = problem(num_rows=rows, dtype=dtype)
    plan = dc.route(torch.full((rows, 2), -1), torch.rand(rows, 2), num_groups=3)
    out = dc.grouped_mlp(p["x"], p["w_in"], p["w_out"], p["b_in"], p["b_out"], plan=plan)
    assert out.shape == (rows, 33)
    assert not out.any()
    for g in torch.autograd.grad(out, [p["x"], p["w_in"], p["w_out"], p["b_in"], p["b_out"]], torch.ones_like(out)):
        assert not g.any()


@pytest.mark.parametrize("kind", ["one_group", "duplicates", "padded"])
@pytest.mark.parametrize("activation", ["gelu", "relu2", "reglu", "swiglu"])
def test_gradcheck_in_float64(activation, kind):
    p = problem(5, 2, 3, 4, activation, torch.float64)
    with torch.no_grad():
        p["b_in"].add_(0.05)  # no pre-activation at relu's corner
    plan = make_plan(kind, 5, 2, torch.float64)
    if kind == "one_group":
        p = {n: t if n in ("x", "residual") else t[:1].detach().requires_grad_() for n, t in p.items()}

    def run(x, w_in, w_out, b_in, b_out, residual, scale):
        scaled = dc.Plan(plan.rows, plan.offsets, scale, 5, plan.row_offsets, plan.row_slots)
        with dc.execution("sparse"):
            return dc.grouped_mlp(x, w_in, w_out, b_in, b_out, plan=scaled, activation=activation, residual=residual)

    assert torch.autograd.gradcheck(run, (*p.values(), plan.scale))


@pytest.mark.parametrize("kind", ["duplicates", "all_rows"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_forty_repeats_and_any_thread_count_give_the_same_bits(dtype, kind):
    p = problem(200, 4 if kind == "duplicates" else 1, 96, 1001, "swiglu", dtype)
    plan = make_plan(kind, 200, p["w_in"].shape[0], torch.float32)

    def run():
        out = dc.grouped_mlp(
            p["x"], p["w_in"], p["w_out"], p["b_in"], p["b_out"], plan=plan, activation="swiglu",
            residual=p["residual"],
        )  # fmt: skip
        return [out, *torch.autograd.grad(out.float().square().sum(), [*p.values(), plan.scale])]

    threads = torch.get_num_threads()
    first = run()
    try:
        for i in range(40):
            torch.set_num_threads((1, 2, 4)[i % 3])
            assert all(torch.equal(a, b) for a, b in zip(run(), first, strict=True))
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("groups", [1, 2])
def test_saved_for_backward_are_the_inputs_the_plan_and_the_pre_activation(groups):
    p = problem(64, groups, 32, 48, "swiglu")
    plan = dc.route(torch.randint(0, groups, (64, 1)), torch.rand(64, 1), num_groups=groups)
    saved = {}

    def pack(t):
        saved[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        dc.grouped_mlp(
            p["x"], p["w_in"], p["w_out"], p["b_in"], p["b_out"], plan=plan, activation="swiglu", residual=p["residual"]
        )
    inputs = sum(p[n].nbytes for n in ("x", "w_in", "w_out", "b_in", "b_out"))
    plan_bytes = sum(t.nbytes for t in (plan.rows, plan.offsets, plan.scale, plan.row_offsets, plan.row_slots))
    assert sum(saved.values()) == inputs + plan_bytes + 64 * 2 * 48 * 4


@pytest.mark.parametrize("scaled", [True, False])
def test_rows_in_ranges_give_the_bits_of_the_whole(scaled):
    """Without gradients slots are combined range by range where there are many; with them, all at once."""
    p = problem(num_rows=40000, groups=4, width=31, inner=3)
    mask = torch.rand(40000, 4) < 0.9  # 115000 slots, 256 bytes each: two ranges
    mask[::5] = False
    p["x"].data[::5] = float("nan")
    scale = torch.rand(40000, 4) if scaled else None
    plan = dc.route_mask(mask, scale)
    inputs = [p[name] for name in NAMES[:5]]
    with dc.execution("sparse"):
        whole = dc.grouped_mlp(*inputs, plan=plan, residual=p["residual"])
        with torch.no_grad():
            assert torch.equal(dc.grouped_mlp(*inputs, plan=plan, residual=p["residual"]), whole)
            row = p["residual"][:1].expand(40000, 31)
            assert torch.equal(
                dc.grouped_mlp(*inputs, plan=plan, residual=row), dc.grouped_mlp(*inputs, plan=plan) + row
            )


def test_flops_are_those_of_live_slots():
    from torch.utils.flop_counter import FlopCounterMode

    p = problem(40, 3, 16, 24, "geglu")
    plan = make_plan("padded", 40, 3, torch.float32)
    slots = int(plan.offsets[-1])
    with FlopCounterMode(display=False) as forward:
        out = dc.grouped_mlp(p["x"], p["w_in"], p["w_out"], plan=plan, activation="geglu")
    assert forward.get_total_flops() == 2 * slots * (16 * 48 + 24 * 16)
    with FlopCounterMode(display=False) as backward:
        out.sum().backward()
    assert backward.get_total_flops() == 2 * forward.get_total_flops()
    with FlopCounterMode(display=False) as masked, dc.execution("masked"):
        dc.grouped_mlp(p["x"], p["w_in"], p["w_out"], plan=plan, activation="geglu")
    assert masked.get_total_flops() == 2 * 40 * 3 * (16 * 48 + 24 * 16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("save", [False, True])
def test_opcheck(save, dtype):
    p = {n: t.detach() for n, t in problem(9, 2, 6, 5, "swiglu", dtype).items()}
    plan = make_plan("duplicates", 9, 2, torch.float32)
    tensors = (plan.rows, plan.offsets, plan.scale.detach(), plan.row_offsets, plan.row_slots)
    args = (p["x"], p["w_in"], p["w_out"], p["b_in"], p["b_out"], p["residual"], *tensors, "swiglu")
    torch.library.opcheck(torch.ops.dyncore.grouped_mlp.default, (*args, save))
    _, pre = torch.ops.dyncore.grouped_mlp(*args, True)
    grads = (p["x"], p["x"], p["w_in"], p["w_out"], p["b_in"], p["b_out"], pre, *tensors, "swiglu")
    for needs in ([True] * 6, [save, True, False, not save, False, save]):
        torch.library.opcheck(torch.ops.dyncore.grouped_mlp_backward.default, (*grads, needs))


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("mode", ["sparse", "masked", "auto"])
def test_compiles_with_its_plan_as_one_graph(mode, dynamic):
    p = problem(20, 3, 8, 12)

    def step(x, expert, weight):
        plan = dc.route(expert, weight, num_groups=3)
        with dc.execution(mode):
            return dc.grouped_mlp(x, p["w_in"], p["w_out"], p["b_in"], p["b_out"], plan=plan, residual=x)

    compiled = torch.compile(step, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for _ in range(2):  # another routing, the same graph
        expert, weight = torch.randint(-1, 3, (20, 2)), torch.rand(20, 2, requires_grad=True)
        got, want = compiled(p["x"], expert, weight), step(p["x"], expert, weight)
        torch.testing.assert_close(got, want)
        leaves = [p["x"], p["w_in"], p["w_out"], weight]
        for a, b in zip(
            torch.autograd.grad(got.sin().sum(), leaves), torch.autograd.grad(want.sin().sum(), leaves), strict=True
        ):
            torch.testing.assert_close(a, b)


def test_autocast_computes_in_its_dtype_as_linear_does():
    p = problem()
    plan = make_plan("routed", 37, 3, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = dc.grouped_mlp(p["x"], p["w_in"], p["w_out"], p["b_in"], p["b_out"], plan=plan)
    want = dc.grouped_mlp(*(p[n].bfloat16() for n in ("x", "w_in", "w_out", "b_in", "b_out")), plan=plan)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, want)
    grads = torch.autograd.grad(out.float().sum(), [p["x"], p["w_in"]])
    assert all(g.dtype == torch.float32 and g.abs().sum() > 0 for g in grads)


def test_autocast_leaves_the_residual_as_it_is():
    p = problem(groups=1)
    mask = torch.arange(37) % 2 == 0
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = dc.grouped_mlp(p["x"], p["w_in"], p["w_out"], plan=dc.select(mask), residual=p["residual"])
        alone = dc.grouped_mlp(p["x"], p["w_in"], p["w_out"], plan=dc.select(mask))
    assert out.dtype == torch.float32
    assert torch.equal(out[~mask], p["residual"][~mask])
    assert torch.equal(out[mask], (p["residual"] + alone)[mask])
    assert torch.equal(torch.autograd.grad(out.sum(), p["residual"])[0], torch.ones_like(p["residual"]))


@pytest.mark.parametrize("mode", ["sparse", "masked"])
def test_nan_in_the_weights_of_a_group_without_rows_reaches_nothing(mode):
    p = problem()
    plan = dc.route(torch.randint(1, 3, (37, 2)), num_groups=3)
    with torch.no_grad():
        for name in ("w_in", "w_out", "b_in", "b_out"):
            p[name][0] = float("nan")
    with dc.execution(mode):
        out = dc.grouped_mlp(p["x"], p["w_in"], p["w_out"], p["b_in"], p["b_out"], plan=plan)
    assert torch.isfinite(out).all()
    for g in torch.autograd.grad(out, [p[n] for n in ("x", "w_in", "w_out", "b_in", "b_out")], torch.ones_like(out)):
        assert torch.isfinite(g).all()


BAD_CALLS = {
    "plan: expected a dyncore.Plan, got NoneType": (TypeError, {"plan": None}),
    "x: expected a Tensor, got int": (TypeError, {"x": 3}),
    "x: expected a floating dtype of 16, 32 or 64 bits, got torch.float8_e5m2": (
        TypeError, {"x": torch.zeros(37, 33).to(torch.float8_e5m2)}),
    "x: expected a strided tensor, got torch.sparse_coo": (TypeError, {"x": torch.zeros(37, 33).to_sparse()}),
    "residual: expected a Tensor, got float": (TypeError, {"residual": 1.0}),
    "x: expected a floating dtype of 16, 32 or 64 bits, got torch.int64": (TypeError, {"x": torch.zeros(37, 33, dtype=torch.int64)}),
    "x: expected at least 2 dimensions": (ValueError, {"x": torch.zeros(37), "residual": None}),
    "x: expected 37 rows": (ValueError, {"x": torch.zeros(36, 33), "residual": None}),
    "w_in: expected shape [G=3, I=31, H=33], got [3, 30, 33]": (ValueError, {"w_in": torch.zeros(3, 30, 33)}),
    "w_in: expected shape [G=3, 2I=62, H=33], got [3, 31, 33]": (ValueError, {"activation": "swiglu"}),
    "w_out: expected shape [G=3, H=33, I], got [2, 33, 31]": (ValueError, {"w_out": torch.zeros(2, 33, 31)}),
    "w_in: expected shape [G=3, I=31, H=33], got [3, 33, 31]; stored transposed? w_in.mT is read where it lies": (
        ValueError, {"w_in": torch.zeros(3, 33, 31)}),
    "w_out: expected shape [G=3, H=33, I], got [3, 31, 33]; stored transposed? w_out.mT is": (
        ValueError, {"w_out": torch.zeros(3, 31, 33)}),
    "w_out: expected the dtype of x, torch.float32, got torch.float64": (
        TypeError, {"w_out": torch.zeros(3, 33, 31, dtype=torch.float64)}),
    "b_in: expected shape [G=3, I=31], got [31]": (ValueError, {"b_in": torch.zeros(31)}),
    "b_out: expected shape [G=3, H=33], got [3, 1]": (ValueError, {"b_out": torch.zeros(3, 1)}),
    "residual: expected the shape of x, [37, 33], got [33]": (ValueError, {"residual": torch.zeros(33)}),
    "activation: expected one of relu, relu2": (ValueError, {"activation": "tanh"}),
    "w_in: expected a tensor on cpu, got one on meta": (ValueError, {"w_in": torch.zeros(3, 31, 33, device="meta")}),
}  # fmt: skip


@pytest.mark.parametrize("message", BAD_CALLS)
def test_bad_calls_name_the_argument(message):
    kind, change = BAD_CALLS[message]
    call = {**problem(), "plan": make_plan("routed", 37, 3, None), "activation": "gelu", **change}
    with pytest.raises(kind) as error:
        dc.grouped_mlp(
            call["x"], call["w_in"], call["w_out"], call["b_in"], call["b_out"], plan=call["plan"],
            activation=call["activation"], residual=call["residual"],
        )  # fmt: skip
    assert message in str(error.value)
