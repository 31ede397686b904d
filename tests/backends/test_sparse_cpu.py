"""The C++ kernels of the sparse ops in every instruction set: against the reference in float64, and bit by bit against
themselves, however many threads there are, whatever is saved and however rows lie."""

import math

import pytest
import torch

from dyncore.backends import cpu, cpu_sparse, reference
from tests.backends.test_cpu import wide
from tests.ops.sparse import ACTIVATIONS, DTYPES, neuron_major, problem
from tests.support import assert_gradients, assert_values

pytestmark = pytest.mark.skipif(not cpu.available, reason=cpu.reason)

INF = math.inf
ALL = [True] * 5
GRADIENTS = ("dx", "dw_in", "dw_out", "db_in", "db_out")
DENSE_FROM = (INF, 0.25, 0.0)


@pytest.fixture(params=DTYPES, ids=["fp32", "bf16", "fp16"])
def dtype(request):
    return request.param


@pytest.fixture
def threads():
    """Whatever a test sets is undone."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def same(first, second):
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def sparse(rows, width, density, dtype):
    """Some rows of any density but the first 0, each tenth dense."""
    h = torch.where(torch.rand(rows, width) < density, torch.randn(rows, width), 0)
    h[9::10] = torch.randn(len(range(9, rows, 10)), width)
    return h.to(dtype)


def mlp(rows, width, inner, activation, dtype, shift=0.0, major=False):
    """Arguments of sparse_mlp up to b_out; each tenth row has most neurons on."""
    p = problem(rows, width, inner, activation, dtype, shift=shift, major=major)
    p = {name: t.detach() for name, t in p.items()}
    p["x"][9::10, 0], p["w_in"][:, 0] = max(shift + 1.5, 0), 1.0
    return tuple(p[name] for name in ("x", "w_in", "w_out", "b_in", "b_out"))


def forward(args, activation, dense_from=INF, save="compressed"):
    return cpu_sparse.sparse_mlp(*args, activation, dense_from, save, -1)


def backward(grad, args, saved, activation, dense_from=INF, needs=ALL):
    """`saved`: mask, values, row_offsets, pre."""
    return cpu_sparse.sparse_mlp_backward(grad, *args[:3], *saved, activation, dense_from, needs)


def assert_rows(got, want, dtype):
    """Each row against its own size: dense rows are larger than others."""
    size = want.square().mean(1, keepdim=True).sqrt()
    assert_values(got.double() / size, want / size, dtype)


def check_mlp(args, activation, dense_from):
    dtype = args[0].dtype
    out, *saved = forward(args, activation, dense_from)
    kept = reference.sparse_mlp(*args, activation, INF, "compressed", -1)[1:]
    assert same(saved[::2], kept[::2])  # mask, row_offsets
    assert_values(saved[1], kept[1], what="values saved")
    assert out.dtype == dtype
    assert_rows(out, reference.sparse_mlp(*wide(args), activation, INF, "none", -1)[0], dtype)
    grad = torch.randn(out.shape).to(dtype)
    got = backward(grad, args, saved, activation, dense_from)
    expected = reference.sparse_mlp_backward(*wide((grad, *args[:3], *saved)), activation, INF, ALL)
    for name, g, w in zip(GRADIENTS, got, expected, strict=True):
        assert g.dtype == dtype
        assert_gradients(g, w, dtype, name)
    assert got[2].stride() == args[2].stride()
    return grad, out, saved, got


SIZES = [(1, 63, 100), (1, 300, 1100), (3, 100, 520), (5, 260, 33), (97, 40, 300), (130, 33, 140)]


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_mlp_at_any_size_and_density(isa, dtype, activation):
    turn = 0
    for rows, width, inner in SIZES:
        for shift in (-4.0, 1.3) if turn % 4 else (0.0, 8.0):
            args = mlp(rows, width, inner, activation, dtype, shift, major=turn % 2 == 1)
            check_mlp(args, activation, DENSE_FROM[turn % 3])
            turn += 1


@pytest.mark.parametrize("major", [False, True], ids=["row_major", "neuron_major"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_all_ways_to_save_give_the_same_bits(isa, dtype, activation, major):
    for rows in (1, 4, 110):
        for dense_from in (INF, 0.25):
            args = mlp(rows, 48, 260, activation, dtype, 1.2, major)
            grad, out, saved, gradients = check_mlp(args, activation, dense_from)
            assert same(forward(args, activation, dense_from, "none")[:1], [out])
            dense_out, mask, values, offsets, pre = forward(args, activation, dense_from, "dense")
            assert mask.numel() == values.numel() == offsets.numel() == 0
            assert torch.equal(dense_out, out)
            assert same(backward(grad, args, (mask, values, offsets, pre), activation, dense_from), gradients)
            hidden = cpu_sparse.sparse_hidden(args[0], args[1], args[3], activation, dense_from, -1)
            assert same(hidden, saved[:3])
            bounded = cpu_sparse.sparse_hidden(args[0], args[1], args[3], activation, dense_from, rows * 260)
            assert bounded[1].shape[-1] == rows * 260
            assert same(backward(grad, args, (*bounded, args[0].new_empty(0)), activation, dense_from), gradients)


@pytest.mark.parametrize("activation", ["relu", "reglu"])
def test_the_bits_of_an_mlp_do_not_depend_on_the_thread_count(isa, threads, dtype, activation):
    sizes = (1, 1030, 1030, True), (3, 300, 1030, False), (70, 60, 1030, True), (200, 70, 520, True)
    for rows, width, inner, major in sizes:
        args = mlp(rows, width, inner, activation, dtype, 1.0, major)
        grad, results = torch.randn(rows, width).to(dtype), []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            out, *saved = forward(args, activation, 0.3)
            results.append([out, *saved, *backward(grad, args, saved, activation)])
        assert all(same(other, results[0]) for other in results[1:])


LINEAR_SIZES = [(1, 100, 63), (1, 3000, 600), (3, 1050, 300), (97, 300, 257), (130, 600, 40), (520, 130, 33)]


def linear_problem(rows, inner, width, density, dtype, major):
    h, weight = sparse(rows, inner, density, dtype), torch.randn(width, inner) * (inner * density + 1) ** -0.5
    weight = weight.to(dtype)
    return h, neuron_major(weight) if major else weight, torch.randn(width).to(dtype)


def test_linear_at_any_size_and_density(isa, dtype):
    turn = 0
    for rows, inner, width in LINEAR_SIZES:
        for density in (0, 0.02, 0.3, 1):
            major, dense_from = turn % 2 == 1, DENSE_FROM[turn % 3]
            h, weight, bias = linear_problem(rows, inner, width, density, dtype, major)
            turn += 1
            out = cpu_sparse.sparse_linear(h, weight, bias, dense_from)
            assert_rows(out, reference.sparse_linear(*wide((h, weight, bias)), INF), dtype)
            grad = torch.randn(out.shape).to(dtype)
            got = cpu_sparse.sparse_linear_backward(grad, h, weight, dense_from, [True] * 3)
            want = reference.sparse_linear_backward(*wide((grad, h, weight)), INF, [True] * 3)
            for name, g, w in zip(("dh", "dweight", "dbias"), got, want, strict=True):
                assert_gradients(g, w, dtype, name)
            assert got[1].stride() == weight.stride()


def test_the_bits_of_a_linear_do_not_depend_on_the_thread_count(isa, threads, dtype):
    sizes = (1, 4000, 1030, True), (3, 1050, 700, False), (70, 3000, 300, True), (200, 520, 300, True)
    for rows, inner, width, major in sizes:
        h, weight, bias = linear_problem(rows, inner, width, 0.1, dtype, major)
        grad, results = torch.randn(rows, width).to(dtype), []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            out = cpu_sparse.sparse_linear(h, weight, bias, 0.3)
            results.append([out, *cpu_sparse.sparse_linear_backward(grad, h, weight, INF, [True] * 3)])
        assert all(same(other, results[0]) for other in results[1:])


def test_forty_repeats_give_the_same_bits(threads, dtype):
    torch.set_num_threads(3)
    args = mlp(150, 130, 700, "reglu", dtype, 1.0, major=True)
    grad = torch.randn(150, 130).to(dtype)

    def once():
        out, *saved = forward(args, "reglu", 0.3)
        return [out, *saved, *backward(grad, args, saved, "reglu")]

    first = once()
    assert all(same(once(), first) for _ in range(40))


def test_gradients_of_more_than_one_block(threads):
    """A block has at most 8M non-zeros, or one row."""
    args = mlp(20, 1, 450_000, "relu", torch.float32, -4.0)
    grad, results = torch.randn(20, 1), []
    saved = forward(args, "relu")[1:]
    assert int(saved[2][-1]) > 8 << 20
    for count in (1, 3):
        torch.set_num_threads(count)
        results.append(backward(grad, args, saved, "relu"))
    assert same(*results)
    want = reference.sparse_mlp_backward(*wide((grad, *args[:3], *saved)), "relu", INF, ALL)
    for name, g, w in zip(GRADIENTS, results[0], want, strict=True):
        assert_gradients(g, w, torch.float32, name)


def test_no_width_leaves_the_gradients_of_biases(isa, dtype):
    """Dot products of no columns are 0."""
    x = torch.empty(3, 0, dtype=dtype)
    for activation, wide_by in (("relu", 1), ("reglu", 2)):
        w_in, w_out = torch.empty(7 * wide_by, 0, dtype=dtype), torch.empty(0, 7, dtype=dtype)
        b_in = torch.ones(7 * wide_by, dtype=dtype)
        _, *saved = forward((x, w_in, w_out, b_in, None), activation)
        assert (saved[1] == 1).all()
        db_in = backward(x, (x, w_in, w_out), saved, activation)[3]
        assert torch.equal(db_in, torch.zeros_like(b_in))


# How rows lie ---------------------------------------------------------------------------------------------------------


def apart(t):
    """The same rows, 32 elements further apart."""
    padded = torch.full((t.shape[0], t.shape[1] + 32), float("nan"), dtype=t.dtype)
    padded[:, : t.shape[1]] = t
    return padded[:, : t.shape[1]]


@pytest.mark.parametrize("dense_from", [INF, 0.25], ids=str)
@pytest.mark.parametrize(("dtype", "width"), [(torch.float32, 1024), (torch.bfloat16, 2048)], ids=str)
def test_rows_4096_bytes_apart(isa, threads, dtype, width, dense_from):
    torch.set_num_threads(3)
    args = mlp(70, width, 1056, "reglu", dtype, 1.2)
    weight = args[1][:width]
    grad, h = torch.randn(70, width).to(dtype), sparse(70, width, 0.1, dtype)
    results = []
    for x, g, rows in ((args[0], grad, h), (apart(args[0]), apart(grad), apart(h))):
        out, *saved = forward((x, *args[1:]), "reglu", dense_from)
        results.append([out, *saved, *backward(g, (x, *args[1:3]), saved, "reglu", dense_from)])
        results[-1].append(cpu_sparse.sparse_linear(rows, weight, None, dense_from))
        results[-1] += cpu_sparse.sparse_linear_backward(x, rows, weight, dense_from, [True] * 3)
    assert same(*results)
    assert all(t.isfinite().all() for t in results[0])


@pytest.mark.parametrize("dense_from", [INF, 0.0], ids=str)
def test_expanded_rows_and_gradients(isa, dtype, dense_from):
    rows, width, inner = 37, 40, 100
    args = mlp(rows, width, inner, "reglu", dtype, 1.0)
    one, h = torch.randn(1, width).to(dtype), sparse(1, inner, 0.3, dtype)
    for expand in (lambda t: t.expand(rows, t.shape[1]), lambda t: t[:, :1].expand(rows, t.shape[1])):
        results = []
        for made in (expand, lambda t, expand=expand: expand(t).contiguous()):
            x = made(one)
            out, *saved = forward((x, *args[1:]), "reglu", dense_from)
            results.append([out, *saved, *backward(made(one), (x, *args[1:3]), saved, "reglu", dense_from)])
            results[-1].append(cpu_sparse.sparse_linear(made(h), args[2], None, dense_from))
            results[-1] += cpu_sparse.sparse_linear_backward(made(one), made(h), args[2], dense_from, [True] * 3)
        assert same(*results)


# Numbers of unusual size ----------------------------------------------------------------------------------------------


def agree(got, want, dtype):
    assert torch.equal(got.isnan(), want.isnan())
    for infinity in (INF, -INF):
        assert torch.equal(got == infinity, want == infinity)
    assert_gradients(got.nan_to_num(0.0, 0.0, 0.0), want.nan_to_num(0.0, 0.0, 0.0), dtype)


SPECIAL = [INF, -INF, float("nan")]


@pytest.mark.parametrize("where", ["x", "w_in", "w_out", "grad"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_nan_and_infinity_reach_what_an_mlp_has_on(isa, dtype, activation, where):
    for special in SPECIAL:
        for rows in (1, 5, 110):
            args = mlp(rows, 33, 71, activation, dtype, 0.5, major=rows == 5)
            grad = torch.randn(rows, 33).to(dtype)
            target = {"x": args[0], "w_in": args[1], "w_out": args[2], "grad": grad}[where]
            target[target.shape[0] // 2, 3] = target[0, 7] = special
            out, *saved = forward(args, activation)
            want, *kept = reference.sparse_mlp(*wide(args), activation, INF, "compressed", -1)
            assert same(saved[::2], kept[::2])
            agree(out, want, dtype)
            agree(saved[1], kept[1], dtype)
            got = backward(grad, args, saved, activation)
            expected = reference.sparse_mlp_backward(*wide((grad, *args[:3], *saved)), activation, INF, ALL)
            for g, w in zip(got, expected, strict=True):
                agree(g, w, dtype)


@pytest.mark.parametrize("where", ["h", "weight", "grad"])
def test_nan_and_infinity_reach_what_is_not_zero_in_a_linear(isa, dtype, where):
    for special in SPECIAL:
        for rows, major in ((1, True), (5, True), (110, False)):
            h, weight, bias = linear_problem(rows, 71, 33, 0.3, dtype, major)
            grad = torch.randn(rows, 33).to(dtype)
            target = {"h": h, "weight": weight, "grad": grad}[where]
            target[target.shape[0] // 2, 3] = target[0, 7] = special
            agree(
                cpu_sparse.sparse_linear(h, weight, bias, INF),
                reference.sparse_linear(*wide((h, weight, bias)), INF),
                dtype,
            )
            got = cpu_sparse.sparse_linear_backward(grad, h, weight, INF, [False, True, False])
            want = reference.sparse_linear_backward(*wide((grad, h, weight)), INF, [False, True, False])
            agree(got[1], want[1], dtype)


LONG = 65536
# every term equal: each rounding errs to the same side, as long as the sum stays between two powers of two
TERMS = {"constant": lambda *shape: torch.full(shape, 0.1), "random": torch.rand}


@pytest.fixture(params=TERMS)
def terms(request):
    return TERMS[request.param]


@pytest.mark.parametrize("major", [False, True], ids=["row_major", "neuron_major"])
def test_long_sums_over_neurons(isa, terms, major):
    for rows in (1, 3, 97):
        h, weight = terms(rows, LONG), torch.ones(40, LONG)
        weight = neuron_major(weight) if major else weight
        got = cpu_sparse.sparse_linear(h, weight, None, INF)
        assert_values(got, reference.sparse_linear(*wide((h, weight, None)), INF))


def test_long_sums_over_neurons_and_width_in_gradients(isa, terms):
    """dx over the neurons that are on; dw_in by way of a sum over the width, the widest that models have."""
    for width, inner in ((8, LONG), (LONG // 4, 8)):
        x, w_in, w_out = torch.full((2, width), 1 / width), torch.ones(inner, width), terms(width, inner)
        saved = forward((x, w_in, w_out, None, None), "relu")[1:]
        grad = torch.ones(2, width)
        got = backward(grad, (x, w_in, w_out), saved, "relu")
        want = reference.sparse_mlp_backward(*wide((grad, x, w_in, w_out, *saved)), "relu", INF, ALL)
        for name, g, w in zip(GRADIENTS, got, want, strict=True):
            assert_values(g, w, what=name)


def test_long_sums_over_rows(isa, terms):
    x, w_in, w_out, grad = torch.ones(LONG, 8), torch.ones(16, 8), torch.ones(8, 8), terms(LONG, 8)
    saved = forward((x, w_in, w_out, torch.zeros(16), None), "reglu")[1:]
    got = backward(grad, (x, w_in, w_out), saved, "reglu")
    want = reference.sparse_mlp_backward(*wide((grad, x, w_in, w_out, *saved)), "reglu", INF, ALL)
    for name, g, w in zip(GRADIENTS, got, want, strict=True):
        assert_values(g, w, what=name)
    got = cpu_sparse.sparse_linear_backward(grad, x, w_out, INF, [True] * 3)
    for g, w in zip(got, reference.sparse_linear_backward(*wide((grad, x, w_out)), INF, [True] * 3), strict=True):
        assert_values(g, w)
