"""sparse_linear against the float64 oracle: values and every gradient at any sparsity, layout, dtype and mode."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

import dyncore as dc
from tests.ops.sparse import DTYPES, neuron_major
from tests.support import assert_gradients, assert_values

MODES = ("sparse", "masked", "auto")
NAMES = ("h", "weight", "bias")


def problem(rows=37, inner=71, width=33, density=0.3, dtype=torch.float32, biased=True, major=False):
    """Leaves that require grad; h of any sign, of which the share `density` is not 0."""
    h = torch.where(torch.rand(rows, inner) < density, torch.randn(rows, inner), 0).to(dtype)
    weight = (torch.randn(width, inner) * max(inner * density, 1) ** -0.5).to(dtype)
    bias = torch.randn(width).to(dtype) if biased else None
    if major:
        weight = neuron_major(weight)
    return {n: None if t is None else t.requires_grad_() for n, t in zip(NAMES, (h, weight, bias), strict=True)}


def run(p, mode="sparse"):
    with dc.execution(mode):
        return dc.sparse_linear(p["h"], p["weight"], p["bias"])


def check(p, mode="sparse"):
    out = run(p, mode)
    q = {n: None if t is None else t.detach().double().requires_grad_() for n, t in p.items()}
    want = F.linear(q["h"], q["weight"], q["bias"])
    assert out.dtype == p["h"].dtype
    assert_values(out, want)
    grad = torch.randn(out.shape).to(out.dtype)
    leaves = [n for n in NAMES if p[n] is not None]
    got = torch.autograd.grad(out, [p[n] for n in leaves], grad)
    expected = torch.autograd.grad(want, [q[n] for n in leaves], grad.double())
    for name, a, b in zip(leaves, got, expected, strict=True):
        assert a.dtype == out.dtype
        assert_gradients(a, b, out.dtype, name)
        if name == "weight" and mode == "sparse":
            assert a.stride() == torch.empty_like(p["weight"]).stride()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("major", [False, True], ids=["row_major", "neuron_major"])
@pytest.mark.parametrize("density", [0.0, 0.01, 0.05, 0.1, 0.2, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
def test_values_and_gradients_equal_the_oracle_at_any_sparsity(dtype, density, major, mode):
    check(problem(density=density, dtype=dtype, major=major), mode)


@pytest.mark.parametrize("major", [False, True], ids=["row_major", "neuron_major"])
@pytest.mark.parametrize(
    "size", [(1, 1, 1), (1, 1000, 64), (2, 5, 3), (3, 63, 100), (16, 100, 63), (130, 1000, 1)], ids=str
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_odd_sizes(dtype, size, major):
    check(problem(*size, dtype=dtype, major=major))
    check(problem(*size, dtype=dtype, major=major, biased=False))


@pytest.mark.parametrize("size", [(0, 5, 3), (4, 0, 3), (4, 5, 0)], ids=str)
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
def test_nothing_to_compute(dtype, size):
    p = problem(*size, dtype=dtype)
    out = run(p)
    assert torch.equal(out, p["bias"].expand(size[0], size[2]))
    found = torch.autograd.grad(out, list(p.values()), torch.ones_like(out))
    assert [g.shape for g in found] == [t.shape for t in p.values()]
    assert not found[0].any()
    assert not found[1].any()
    assert torch.equal(found[2], torch.full_like(p["bias"], size[0]))


def test_more_rows_of_nothing_than_a_block_has():
    with dc.execution("sparse"):
        out = dc.sparse_linear(torch.empty(2**24 + 100, 0), torch.empty(1, 0), torch.ones(1))
    assert bool((out == 1).all())


@pytest.mark.parametrize("mode", ["sparse", "auto"])
@pytest.mark.parametrize("density", [0.05, 0.2, 0.6])
@pytest.mark.parametrize(
    ("dtype", "major"), [(torch.float32, True), (torch.float32, False), (torch.bfloat16, True), (torch.float16, False)]
)
def test_more_than_one_block_of_everything(dtype, major, density, mode):
    check(problem(700, 1100, 130, density, dtype, major=major), mode)


def test_dense_rows_zero_rows_hot_and_dead_neurons():
    p = problem(70, 300, 40, 0.1)
    with torch.no_grad():
        p["h"][3::7] = 0
        p["h"][2::7] = torch.randn(10, 300)
        p["h"][:, 1::11], p["h"][:, 5::11] = 1.5, 0
    check(p)
    check(p, "auto")


def test_more_than_65536_neurons():
    check(problem(2, 70_001, 3))
    check(problem(2, 70_001, 3, dtype=torch.bfloat16, major=True))


def test_leading_dimensions_are_rows():
    p = problem(24)
    h = p["h"].detach().view(2, 3, 4, 71).requires_grad_()
    out = run({**p, "h": h})
    assert out.shape == (2, 3, 4, 33)
    assert torch.equal(out.view(24, 33), run(p))
    (dh,) = torch.autograd.grad(out.sum(), h)
    assert torch.equal(dh.view(24, 71), torch.autograd.grad(run(p).sum(), p["h"])[0])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strided_and_expanded_inputs_and_gradients(dtype):
    p = problem(dtype=dtype)
    strided = {
        "h": torch.stack([p["h"], p["h"]], 2)[..., 0],
        "weight": torch.cat([p["weight"], p["weight"]], 1)[:, :71],
        "bias": p["bias"][:1].expand(33),
    }
    other = {**strided, "h": p["h"][:1].expand(37, 71), "weight": torch.stack([p["weight"]] * 2, 2)[..., 1]}

    def results(q):
        leaves = {n: t.detach().requires_grad_() for n, t in q.items()}
        out = run(leaves)
        expanded = torch.ones((), dtype=dtype).expand_as(out)
        return [out, *torch.autograd.grad(out, list(leaves.values()), expanded)]

    for case in (strided, other):
        for got, want in zip(results(case), results({n: t.contiguous() for n, t in case.items()}), strict=True):
            assert_values(got, want)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("wanted", NAMES)
def test_one_gradient_alone(wanted, mode):
    p = problem()

    def gradient(names):
        for name, t in p.items():
            t.requires_grad_(name in names)
        return torch.autograd.grad(run(p, mode).square().sum(), p[wanted])[0]

    alone, among_all = gradient([wanted]), gradient(NAMES)
    assert alone.abs().sum() > 0
    torch.testing.assert_close(alone, among_all, rtol=1e-6, atol=1e-6)


def test_the_gradient_of_h_is_not_zero_where_h_is():
    p = problem(density=0.1)
    (dh,) = torch.autograd.grad(run(p).sum(), p["h"])
    assert (dh != 0).all()


@pytest.mark.parametrize("major", [False, True], ids=["row_major", "neuron_major"])
@pytest.mark.parametrize("rows", [1, 40])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
def test_zeros_meet_no_weight(dtype, rows, major):
    p = problem(rows, dtype=dtype, major=major)
    with torch.no_grad():
        p["h"][:, [5, 44]] = torch.tensor([0.0, -0.0]).to(dtype)
        p["weight"][:, 5], p["weight"][3, 44] = float("inf"), float("nan")
    assert run(p).isfinite().all()
    with torch.no_grad():
        p["h"][-1, 5] = -1
    out = run(p)
    assert out[:-1].isfinite().all()
    assert (out[-1] == -float("inf")).all()


def test_an_infinite_gradient_meets_no_zero():
    p = problem(8)
    with torch.no_grad():
        p["h"][2, :4] = torch.tensor([0.0, -0.0, 1.0, -1.0])
    grad = torch.zeros(8, 33)
    grad[2] = float("inf")
    (dweight,) = torch.autograd.grad(run(p), p["weight"], grad)
    inf = float("inf")
    assert dweight[:, :4].unique(dim=0).tolist() == [[0.0, 0.0, inf, -inf]]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("special", [float("nan"), float("inf")])
@pytest.mark.parametrize("major", [False, True], ids=["row_major", "neuron_major"])
def test_nan_and_infinity_in_h_are_no_zeros(major, special, mode):
    p = problem(major=major)
    with torch.no_grad():
        p["h"][3, 2] = special
    out = run(p, mode)
    torch.testing.assert_close(out, F.linear(p["h"], p["weight"], p["bias"]), equal_nan=True)
    assert not out[3].isfinite().any()
    assert out[4:].isfinite().all()
    dweight = torch.autograd.grad(out, p["weight"], torch.ones_like(out))[0]
    assert not dweight[:, 2].isfinite().any()
    assert dweight[:, 3:].isfinite().all()


def test_denormals_are_no_zeros():
    h, weight = torch.tensor([[0.0, 1e-40, -1e-40, 0.0]]), torch.full((1, 4), 2.0**20)
    weight[0, 2] = 2.0**19
    assert run({"h": h, "weight": weight, "bias": None}).item() == pytest.approx(1e-40 * 2**19, rel=1e-4)


@pytest.mark.parametrize("rows", [1, 200])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_forty_repeats_and_any_thread_count_give_the_same_bits(dtype, rows):
    p = problem(rows, 1001, 96, 0.1, dtype, major=rows == 1)

    def once():
        out = run(p)
        return [out, *torch.autograd.grad(out, list(p.values()), torch.ones_like(out))]

    threads = torch.get_num_threads()
    first = once()
    try:
        for i in range(40):
            torch.set_num_threads((1, 2, 3)[i % 3])
            assert all(torch.equal(a, b) for a, b in zip(once(), first, strict=True))
    finally:
        torch.set_num_threads(threads)


def test_flops_are_those_of_non_zeros():
    p = problem()
    products = 2 * int((p["h"] != 0).sum()) * 33
    with FlopCounterMode(display=False) as forward:
        out = run(p)
    assert forward.get_total_flops() == products
    with FlopCounterMode(display=False) as backward:
        out.sum().backward()
    assert backward.get_total_flops() == products + 2 * 37 * 71 * 33
    with FlopCounterMode(display=False) as masked:
        run(p, "masked")
    assert masked.get_total_flops() == 2 * 37 * 71 * 33


BAD_CALLS = {
    "h: expected a Tensor, got NoneType": (TypeError, {"h": None}),
    "h: expected a floating dtype of 16, 32 or 64 bits, got torch.bool": (TypeError, {"h": torch.zeros(37, 71).bool()}),
    "h: expected at least 2 dimensions [..., D], got shape [71]": (ValueError, {"h": torch.zeros(71)}),
    "weight: expected a Tensor, got list": (TypeError, {"weight": [1.0]}),
    "weight: expected the dtype of h, torch.float32, got torch.float16": (
        TypeError,
        {"weight": torch.zeros(33, 71).half()},
    ),
    "weight: expected shape [N, I=71], got [71, 33]; stored transposed? weight.mT is": (
        ValueError,
        {"weight": torch.zeros(71, 33)},
    ),
    "weight: expected a tensor on cpu, got one on meta": (ValueError, {"weight": torch.zeros(33, 71, device="meta")}),
    "bias: expected shape [N=33], got [71]": (ValueError, {"bias": torch.zeros(71)}),
    "bias: expected the dtype of h, torch.float32, got torch.float64": (TypeError, {"bias": torch.zeros(33).double()}),
}


@pytest.mark.parametrize("message", BAD_CALLS)
@pytest.mark.parametrize("mode", MODES)
def test_bad_calls_name_the_argument(message, mode):
    kind, change = BAD_CALLS[message]
    with pytest.raises(kind) as error:
        run({**problem(), **change}, mode)
    assert message in str(error.value)
