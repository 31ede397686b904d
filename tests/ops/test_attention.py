"""attention: by position, with queries and keys left out, against a softmax written out pair by pair."""

import math

import pytest
import torch

import dyncore as dc
from dyncore.backends import cpu, reference
from dyncore.ops.attention import _Attention
from tests.support import assert_gradients, assert_values

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
B, H, D = 2, 4, 16


def oracle(q, k, v, pairs, scale, sizes=None):
    """float64; pairs [B, N, M] says which keys a query attends to."""
    q, k, v = (t.double() for t in (q, k, v))
    repeats = q.shape[1] // k.shape[1]
    k, v = (t.repeat_interleave(repeats, 1) for t in (k, v))
    weight = (scale * q @ k.transpose(2, 3)).exp() * pairs[:, None]
    if sizes is not None:
        weight = weight * sizes[:, None, None].double()
    return (weight / weight.sum(-1, keepdim=True).clamp(min=1e-300)) @ v


def some(batch, count, length):
    """`count` ascending positions of `length` for each sequence."""
    return torch.stack([torch.randperm(length)[:count].sort().values for _ in range(batch)])


CASES = {
    # queries, keys, kv heads, positions of both (None: all), causal, live marks
    "all": (13, 13, H, False, True, False),
    "bidirectional": (13, 13, H, False, False, False),
    "selected": (9, 9, H, "same", True, False),
    "all_keys": (9, 31, 2, "queries", True, False),
    "all_keys_bidirectional": (9, 31, 1, "queries", False, False),
    "both": (70, 133, 2, "both", True, False),
    "live": (9, 9, H, "same", True, True),
    "live_bidirectional": (40, 33, 2, False, False, True),
    "unsorted": (30, 41, 2, "unsorted", True, True),
    "one_query": (1, 65, 2, "queries", True, False),
    "nothing_before": (20, 40, H, "late", True, False),
    "blocks": (140, 270, 2, "unsorted", True, True),
}


def problem(case, dtype=torch.float64):
    queries, keys, kv_heads, places, causal, marks = CASES[case]
    q = torch.randn(B, H, queries, D).to(dtype).requires_grad_()
    k, v = (torch.randn(B, kv_heads, keys, width).to(dtype).requires_grad_() for width in (D, D + 3))
    options = {"causal": causal}
    at, where = torch.arange(queries).expand(B, -1), torch.arange(keys).expand(B, -1)
    if places:
        length = max(150, keys)
        at = some(B, queries, keys if places == "queries" else length)
        where = at if places == "same" else where if places == "queries" else some(B, keys, length)
        if places == "late":
            where = where + 75
            at = at.clamp(max=100)
        if places == "unsorted":
            at, where = at[:, torch.randperm(queries)], where[:, torch.randperm(keys)]
        options |= {"q_positions": at.int(), "k_positions": where}
    pairs = (where[:, None] <= at[:, :, None]) | torch.tensor(not causal)
    if marks:
        q_live, k_live = torch.rand(B, queries) < 0.7, torch.rand(B, keys) < 0.7
        k_live[1] = False
        options |= {"q_live": q_live, "k_live": k_live}
        pairs = pairs & q_live[:, :, None] & k_live[:, None]
    return (q, k, v), options, pairs


@pytest.mark.parametrize("mode", ["sparse", "masked"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_equals_the_softmax_of_the_pairs_that_count(case, dtype, mode):
    inputs, options, pairs = problem(case, dtype)
    with dc.execution(mode):
        out = dc.attention(*inputs, **options)
    want = oracle(*inputs, pairs, D**-0.5)
    assert_values(out, want)
    dead = ~pairs.any(2)[:, None, :, None].expand(out.shape)
    assert not out[dead].any()
    grad = torch.randn(out.shape).to(dtype)
    got = torch.autograd.grad(out, inputs, grad)
    for g, w, name in zip(got, torch.autograd.grad(want, inputs, grad.double()), "qkv", strict=True):
        assert_gradients(g, w, dtype, name)


@pytest.mark.parametrize("mode", ["sparse", "masked"])
def test_queries_and_keys_left_out_may_hold_nan(mode):
    (q, k, v), options, _ = problem("live", torch.float32)
    dirty = [
        torch.where(options[name][:, None, :, None], t, math.nan)
        for name, t in (("q_live", q), ("k_live", k), ("k_live", v))
    ]
    with dc.execution(mode):
        clean, out = dc.attention(q, k, v, **options), dc.attention(*dirty, **options)
    assert torch.equal(out, clean)
    grad = torch.randn(out.shape)
    for got, want in zip(
        torch.autograd.grad(out, (q, k, v), grad), torch.autograd.grad(clean, (q, k, v), grad), strict=True
    ):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("mode", ["sparse", "masked"])
def test_a_key_of_size_two_is_two_keys(mode):
    (q, k, v), options, pairs = problem("all_keys", torch.float32)
    sizes = torch.randint(1, 4, (B, 31)).float()
    with dc.execution(mode):
        out = dc.attention(q, k, v, k_sizes=sizes, **options)
    want = oracle(q, k, v, pairs, D**-0.5, sizes)
    assert_values(out, want)
    grad = torch.randn(out.shape)
    for got, w in zip(
        torch.autograd.grad(out, (q, k, v), grad), torch.autograd.grad(want, (q, k, v), grad.double()), strict=True
    ):
        assert_gradients(got, w, torch.float32)


@pytest.mark.parametrize("sizes", [(0, 4, 3, 5), (2, 4, 0, 5), (2, 4, 3, 0)], ids=str)
def test_nothing_to_attend_or_to_be_attended(sizes):
    batch, heads, queries, keys = sizes
    q, k, v = (torch.randn(batch, heads, n, D, requires_grad=True) for n in (queries, keys, keys))
    at = torch.arange(queries).expand(batch, -1)
    out = dc.attention(q, k, v, q_positions=at + 9, k_positions=torch.arange(keys).expand(batch, -1))
    assert out.shape == (batch, heads, queries, D)
    assert not out.any() or keys
    out.sum().backward()
    assert all(torch.isfinite(t.grad).all() for t in (q, k, v))


def test_compiles_into_one_graph():
    inputs, options, _ = problem("all_keys", torch.float32)
    want = dc.attention(*inputs, **options)
    grads = torch.autograd.grad(want.sum(), inputs)
    torch._dynamo.reset()
    got = torch.compile(dc.attention, fullgraph=True, backend="aot_eager")(*inputs, **options)
    assert_values(got, want)
    for g, w in zip(torch.autograd.grad(got.sum(), inputs), grads, strict=True):
        assert_gradients(g, w, torch.float32)


def test_positions_may_be_those_of_one_sequence_for_all():
    (q, k, v), options, _ = problem("all_keys", torch.float32)
    at = options["q_positions"][:1]
    want = dc.attention(q, k, v, q_positions=at.expand(B, -1), k_positions=torch.arange(31))
    assert torch.equal(dc.attention(q, k, v, q_positions=at[0]), want)
    assert torch.equal(dc.attention(q, k, v, q_positions=at.long()), want)


def test_a_change_to_a_later_key_changes_nothing_before():
    (q, k, v), options, _ = problem("both", torch.float32)
    at, where = options["q_positions"], options["k_positions"]
    before = dc.attention(q, k, v, **options)
    later = (where > 60)[:, None, :, None]
    after = dc.attention(q, *(torch.where(later, 3 * torch.randn_like(t), t) for t in (k, v)), **options)
    early = (at <= 60)[:, None, :, None].expand(before.shape)
    torch.testing.assert_close(after[early], before[early])
    assert not torch.equal(after, before)


def marks_of(options):
    """The op's arguments after q, k and v."""
    names = ("q_positions", "k_positions", "q_live", "k_live")
    positions = [options.get(name) for name in names]
    return *(t.int() if t is not None and t.dtype != torch.bool else t for t in positions), None, options["causal"], 0.3


@pytest.mark.parametrize("case", ["blocks", "all_keys", "live_bidirectional"])
def test_the_reference_has_the_gradients_of_its_values(case):
    inputs, options, _ = problem(case)
    few = [t.detach()[:1, :2, :6].requires_grad_() for t in inputs]
    marks = tuple(t[:1, :6].contiguous() if isinstance(t, torch.Tensor) else t for t in marks_of(options))
    assert torch.autograd.gradcheck(lambda *t: _Attention.apply(*t, *marks), few, fast_mode=True)


@pytest.mark.skipif(not cpu.available, reason="needs the C++ kernels")
@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
def test_threads_and_instruction_sets(dtype):
    inputs, options, _ = problem("blocks", dtype)
    marks, grad = marks_of(options), torch.randn(B, H, 140, D + 3).to(dtype)

    def run():
        out, logarithm = torch.ops.dyncore.attention(*(t.detach() for t in inputs), *marks)
        return out, logarithm, *torch.ops.dyncore.attention_backward(grad, *inputs, out, logarithm, *marks, [True] * 3)

    want, _ = reference.attention(*inputs, *marks)
    threads, isa = torch.get_num_threads(), cpu.isa()
    try:
        for name in cpu.native.supported_isas():
            cpu.native.select_isa(name)
            torch.set_num_threads(1)
            first = run()
            assert_values(first[0], want)
            for count in (2, 3):
                torch.set_num_threads(count)
                assert all(torch.equal(a, b) for a, b in zip(first, run(), strict=True)), f"{name}, {count} threads"
    finally:
        torch.set_num_threads(threads)
        cpu.native.select_isa(isa)


def test_any_strides_and_gradients_that_are_asked_for():
    (q, k, v), options, _ = problem("both", torch.float32)
    want = dc.attention(q, k, v, **options)
    grad = torch.randn(B, 1, 1, D + 3).expand(want.shape)
    wanted = torch.autograd.grad(want, (q, k, v), grad)
    odd = [t.detach().mT.contiguous().mT.requires_grad_() for t in (q, k, v)]
    odd[1] = torch.cat([odd[1].detach()] * 2, -1)[..., :D].requires_grad_()
    out = dc.attention(
        *odd, **{name: t.repeat_interleave(2, 1)[:, ::2] if name != "causal" else t for name, t in options.items()}
    )
    assert torch.equal(out, want)
    for leaf, w in zip(odd, wanted, strict=True):
        assert torch.equal(torch.autograd.grad(out, leaf, grad, retain_graph=True)[0], w)


def test_large_scores_and_many_equal_ones():
    q, k, v = (torch.randn(1, 2, 40, D) for _ in range(3))
    want = oracle_of_equals(100 * q, k, v)
    assert_values(dc.attention(100 * q, k, v, causal=False), want)
    many = torch.ones(1, 1, 20000, D)
    assert_values(dc.attention(q[:, :1], many, many, causal=False), torch.ones(1, 1, 40, D))


def oracle_of_equals(q, k, v):
    return (D**-0.5 * q.double() @ k.double().mT).softmax(-1) @ v.double()


def test_flops_are_those_of_the_pairs_that_count():
    for case in ("both", "blocks", "live_bidirectional", "all"):
        inputs, options, pairs = problem(case, torch.float32)
        forward = 2 * H * int(pairs.sum()) * (2 * D + 3)
        with dc.execution("sparse"):
            assert dc.measure.flops(lambda: dc.attention(*(t.detach() for t in inputs), **options)) == forward  # noqa: B023
            both = dc.measure.flops(lambda: dc.attention(*inputs, **options).sum().backward())  # noqa: B023
        assert both - forward == 2 * H * int(pairs.sum()) * (3 * D + 2 * (D + 3))


def test_the_op_is_well_registered():
    inputs, options, _ = problem("both", torch.float32)
    marks, (q, k, v) = marks_of(options), (t.detach() for t in inputs)
    torch.library.opcheck(torch.ops.dyncore.attention.default, (q, k, v, *marks))
    out, logarithm = torch.ops.dyncore.attention(q, k, v, *marks)
    for needs in ([True] * 3, [False, True, False]):
        arguments = (torch.randn_like(out), q, k, v, out, logarithm, *marks, needs)
        torch.library.opcheck(torch.ops.dyncore.attention_backward.default, arguments)


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
def test_function_transforms():
    (q, k, v), options, _ = problem("both", torch.float32)
    loss = lambda q: dc.attention(q, k, v, **options).square().sum()  # noqa: E731
    want = torch.autograd.grad(loss(q), q)[0]
    assert torch.equal(torch.func.grad(loss)(q), want)
    stacked = torch.stack([q.detach(), 2 * q.detach()])
    mapped = torch.func.vmap(lambda q: dc.attention(q, k, v, **options))(stacked)
    assert_values(mapped[1], dc.attention(2 * q, k, v, **options))


BAD_CALLS = [
    (lambda q, k, v: dc.attention([1.0], k, v), TypeError, "q: expected a Tensor, got list"),
    (lambda q, k, v: dc.attention(q[0], k, v), ValueError, "q: expected shape [B, heads, N, D], got [4, 13, 16]"),
    (lambda q, k, v: dc.attention(q, k.double(), v), TypeError, "k: expected the dtype of q, torch.float32"),
    (lambda q, k, v: dc.attention(q, k[..., :3], v), ValueError, "k: expected shape [B=2, kv_heads, M, D=16]"),
    (lambda q, k, v: dc.attention(q, k, v[:, :, :5]), ValueError, "v: expected shape [B=2, kv_heads=4, M=13, E], got"),
    (lambda q, k, v: dc.attention(q, k[:, :3], v[:, :3]), ValueError, "k: expected a number of heads that divides that of q, 4, got 3"),
    (lambda q, k, v: dc.attention(q, k, v, q_positions=[1]), TypeError, "q_positions: expected a Tensor, got list"),
    (lambda q, k, v: dc.attention(q, k, v, q_positions=torch.ones(2, 13)), TypeError, "q_positions: expected int32 or int64, got torch.float32"),
    (lambda q, k, v: dc.attention(q, k, v, k_positions=torch.ones(2, 12, dtype=torch.int)), ValueError, "k_positions: expected shape [2, 13], [1, 13] or [13], got [2, 12]"),
    (lambda q, k, v: dc.attention(q, k, v, k_positions=torch.arange(13) - 1), ValueError, "k_positions: expected positions >= 0, got -1"),
    (lambda q, k, v: dc.attention(q, k, v, q_live=torch.ones(2, 13)), TypeError, "q_live: expected bool, got torch.float32"),
    (lambda q, k, v: dc.attention(q, k, v, k_live=torch.ones(2, 12, dtype=torch.bool)), ValueError, "k_live: expected shape [B=2, M=13], got [2, 12]"),
    (lambda q, k, v: dc.attention(q, k, v, k_sizes=torch.ones(2, 13, dtype=torch.int)), TypeError, "k_sizes: expected a floating dtype, got torch.int32"),
    (lambda q, k, v: dc.attention(q, k, v, q_positions=torch.arange(13, device="meta")), ValueError, "q_positions: expected a tensor on cpu, got one on meta"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "kind", "message"), BAD_CALLS, ids=[m for _, _, m in BAD_CALLS])
def test_bad_calls_name_the_argument(call, kind, message):
    with pytest.raises(kind) as error:
        call(*(torch.randn(B, H, 13, D) for _ in range(3)))
    assert message in str(error.value)


@pytest.mark.skipif(not cpu.available, reason="needs the C++ kernels")
def test_the_bindings_refuse_what_would_lead_outside():
    (q, k, v), options, _ = problem("both", torch.float32)
    *marks, causal, scale = marks_of(options)
    at, places, *others = marks
    out, logarithm = torch.empty(B, H, 70, D + 3), torch.empty(B, H, 70)
    for bad in (
        (q, k[:, :, 1:], v, at, places),
        (q, k[..., 1:], v, at, places),
        (q, k, v, at[:, 1:], places),
        (q, k, v, at, places[0]),
        (q[:, :3], k, v, at, places),
        (q[:1], k, v, at, places),
    ):
        with pytest.raises(ValueError, match="expected"):
            cpu.native.attention(*bad, *others, causal, scale, out, logarithm, 1)
    with pytest.raises(TypeError, match="q_positions: expected"):
        cpu.native.attention(q, k, v, at.long(), places, *others, causal, scale, out, logarithm, 1)
    with pytest.raises(ValueError, match="out: expected"):
        cpu.native.attention(q, k, v, at, places, *others, causal, scale, out.mT, logarithm, 1)


@pytest.mark.parametrize("mode", ["sparse", "masked", "auto"])
def test_heads_of_no_width_give_the_mean_of_what_is_seen(mode):
    q = torch.zeros(1, 2, 3, 0)
    v = torch.randn(1, 2, 3, 4)
    with dc.execution(mode):
        y = dc.attention(q, q, v, causal=False)
    torch.testing.assert_close(y, v.mean(2, keepdim=True).expand_as(v))
