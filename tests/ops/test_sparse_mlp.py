"""sparse_mlp against the float64 oracle: values and every gradient at any sparsity, layout, dtype, mode and save."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import dyncore as dc
from tests.ops.sparse import ACTIVATIONS, DTYPES, NAMES, check, grads, neuron_major, oracle, problem, run, wide_copy
from tests.support import assert_values

SAVE = ("compressed", "dense", "recompute")
MODES = ("sparse", "masked", "auto")


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
def test_values_and_gradients_equal_the_oracle(dtype, activation, mode):
    check(problem(activation=activation, dtype=dtype), activation, mode)


@pytest.mark.parametrize("major", [False, True], ids=["row_major", "neuron_major"])
@pytest.mark.parametrize("save", SAVE)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_whatever_is_saved_and_however_the_weight_lies(dtype, activation, save, major):
    check(problem(activation=activation, dtype=dtype, shift=1.0, biased=False, major=major), activation, save=save)
    check(problem(activation=activation, dtype=dtype, shift=1.0, major=major), activation, save=save)


@pytest.mark.parametrize("mode", ["sparse", "auto"])
@pytest.mark.parametrize("shift", [-40.0, -1.0, 0.0, 0.8, 1.3, 1.7, 2.3, 40.0])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_any_sparsity(activation, shift, mode):
    p = problem(40, 64, 200, activation, shift=shift)
    check(p, activation, mode)
    if shift == 40.0:  # nothing is on
        assert torch.equal(run(p, activation), p["b_out"].expand(40, 64))


@pytest.mark.parametrize("major", [False, True], ids=["row_major", "neuron_major"])
@pytest.mark.parametrize(
    "size",
    [(0, 3, 5), (1, 1, 1), (1, 64, 1000), (2, 3, 5), (3, 100, 63), (16, 63, 100), (130, 1, 1000), (5, 7, 0)],
    ids=str,
)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_odd_sizes(dtype, activation, size, major):
    if 0 in size:  # no number to compare but the shapes and the gradients of what has some
        p = problem(*size, activation, dtype, major=major)
        out = run(p, activation)
        found = grads(out, p, torch.ones_like(out))
        assert {n: g.shape for n, g in found.items()} == {n: p[n].shape for n in NAMES}
        assert torch.equal(out, p["b_out"].expand(out.shape))
        assert torch.equal(found["b_out"], torch.full_like(p["b_out"], size[0]))
        assert all(not found[n].any() for n in ("x", "w_in", "w_out", "b_in"))
    else:
        check(problem(*size, activation, dtype, shift=0.7, major=major), activation)


@pytest.mark.parametrize("mode", ["sparse", "auto"])
@pytest.mark.parametrize("shift", [0.0, 1.3, 2.0])
@pytest.mark.parametrize(("activation", "dtype", "major"), [
    ("relu", torch.float32, True), ("relu", torch.bfloat16, False), ("reglu", torch.float32, False),
    ("reglu", torch.float16, True), ("relu2", torch.bfloat16, True),
])  # fmt: skip
def test_more_than_one_block_of_everything(activation, dtype, major, shift, mode):
    check(problem(700, 96, 1100, activation, dtype, shift=shift, major=major), activation, mode)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("major", [False, True], ids=["row_major", "neuron_major"])
def test_dense_rows_zero_rows_hot_and_dead_neurons(activation, major):
    p = problem(70, 40, 300, activation, shift=2.0, major=major)
    with torch.no_grad():
        p["x"][3::7] = 0
        p["b_in"][:300:11] = 50.0  # on for each row
        p["b_in"][5:300:11] = -50.0  # on for none
        p["w_in"][:, 0], p["x"][:, 0] = 1, 0
        p["x"][2::7, 0] = 100  # everything is on in these rows
    check(p, activation)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_more_than_65536_neurons(activation):
    check(problem(2, 3, 70_001, activation, shift=1.0), activation)
    check(problem(2, 3, 70_001, activation, torch.bfloat16, shift=1.0, major=True), activation)


def test_leading_dimensions_are_rows():
    p = problem(24)
    x = p["x"].detach().view(2, 3, 4, 33).requires_grad_()
    out = run({**p, "x": x})
    assert out.shape == x.shape
    assert torch.equal(out.view(24, 33), run(p))
    (dx,) = torch.autograd.grad(out.sum(), x)
    assert torch.equal(dx.view(24, 33), torch.autograd.grad(run(p).sum(), p["x"])[0])


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strided_and_expanded_inputs_and_gradients(dtype, activation):
    p = problem(activation=activation, dtype=dtype, shift=0.5)
    strided = {
        "x": torch.stack([p["x"], p["x"]], 2)[..., 0],  # last stride 2
        "w_in": p["w_in"].t().contiguous().t(),
        "w_out": torch.cat([p["w_out"], p["w_out"]], 1)[:, :71],
        "b_in": p["b_in"][:1].expand(p["b_in"].shape[0]),
        "b_out": torch.stack([p["b_out"], p["b_out"]], 1)[:, 1],
    }

    def results(q):
        leaves = {n: t.detach().requires_grad_() for n, t in q.items()}
        with dc.execution("sparse"):
            out = run(leaves, activation)
        found = grads(out, leaves, torch.ones((), dtype=dtype).expand_as(out))
        transposed = grads(run(leaves, activation), leaves, torch.ones(out.shape[::-1], dtype=dtype).t())
        return [out, *found.values(), *transposed.values()]

    for got, want in zip(results(strided), results({n: t.contiguous() for n, t in strided.items()}), strict=True):
        assert_values(got, want)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_an_expanded_output_weight(activation, mode):
    p = problem(9, 12, 40, activation)
    column, rows = torch.randn(12, 1), torch.randn(1, 40)
    for w_out in (column.expand(12, 40), rows.expand(12, 40)):
        p["w_out"] = w_out.detach().requires_grad_()
        check(p, activation, mode)


@pytest.mark.parametrize("save", SAVE)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_a_width_of_nothing_has_no_gradient_of_the_hidden_bias(activation, save):
    inner, wide = 64, 128 if activation == "reglu" else 64
    b_in = torch.ones(wide, requires_grad=True)
    x, w_in, w_out = torch.empty(40, 0), torch.empty(wide, 0), torch.empty(0, inner)
    with dc.execution("sparse"):
        run(problem(40, 64, 64, activation), activation)  # memory for the next call, which is not zero
        out = dc.sparse_mlp(x, w_in, w_out, b_in, activation=activation, save=save)
    out.sum().backward()
    assert not b_in.grad.any()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("save", SAVE)
@pytest.mark.parametrize("wanted", NAMES)
def test_one_gradient_alone(wanted, save, mode):
    p = problem(activation="reglu", shift=0.5)

    def gradient(names):
        for name, t in p.items():
            t.requires_grad_(name in names)
        with dc.execution(mode):
            return torch.autograd.grad(run(p, "reglu", save=save).square().sum(), p[wanted])[0]

    alone, among_all = gradient([wanted]), gradient(NAMES)
    assert alone.abs().sum() > 0
    torch.testing.assert_close(alone, among_all, rtol=1e-6, atol=1e-6)


# Special numbers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("save", SAVE)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_a_nan_goes_on_as_through_torchs_relu(activation, save, mode):
    p = problem(8, 5, 40, activation, shift=0.5)
    with torch.no_grad():
        p["x"][3, 2] = float("nan")  # all of the row's pre-activations are NaN
    with dc.execution(mode):
        out = run(p, activation, save=save)
    q = {name: wide_copy(t) for name, t in p.items()}
    want = oracle(q, activation)
    grad = torch.randn(out.shape)
    for got, expected in [
        (out, want),
        *zip(grads(out, p, grad).values(), grads(want, q, grad.double()).values(), strict=True),
    ]:
        torch.testing.assert_close(got, expected.float(), rtol=1e-4, atol=1e-4, equal_nan=True)
    assert out[3].isnan().all()
    assert not out[[0, 1, 2, 4, 5, 6, 7]].isnan().any()


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("major", [False, True], ids=["row_major", "neuron_major"])
def test_a_nan_bias_makes_one_neuron_nan_for_each_row(dtype, major):
    p = problem(8, 5, 40, dtype=dtype, shift=1.0, major=major)
    with torch.no_grad():
        p["b_in"][7] = float("nan")
    with dc.execution("sparse"):
        assert run(p).isnan().all()


@pytest.mark.parametrize("major", [False, True], ids=["row_major", "neuron_major"])
@pytest.mark.parametrize("rows", [1, 40])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
def test_neurons_that_are_off_meet_no_weight(dtype, activation, rows, major):
    p = problem(rows, 33, 71, activation, dtype, major=major)
    with torch.no_grad():
        p["b_in"][[5, 44]] = -100.0
        p["w_out"][:, 5], p["w_out"][3, 44] = float("inf"), float("nan")
        if activation == "reglu":
            p["w_in"][71 + 5] = float("nan")
    with dc.execution("sparse"):
        out = run(p, activation)
    assert out.isfinite().all()
    assert all(g.isfinite().all() for g in grads(out, p, torch.ones_like(out)).values())
    with torch.no_grad():
        p["b_in"][5] = 100.0
    with dc.execution("sparse"):
        assert not run(p, activation).isfinite().any()  # now it is met


def test_an_infinite_gradient_meets_no_neuron_that_is_off():
    p = problem(8, 5, 40, shift=1.0)
    with dc.execution("sparse"):
        out = run(p)
    grad = torch.zeros_like(out)
    grad[2] = float("inf")
    on = torch.relu(p["x"] @ p["w_in"].t() + p["b_in"])[2] > 0
    assert 0 < on.sum() < 40
    found = grads(out, p, grad)
    assert (found["w_out"][:, on] == float("inf")).all()
    assert (found["w_out"][:, ~on] == 0).all()


@pytest.mark.parametrize("activation", ["relu", "reglu"])
def test_denormal_activations_are_no_zeros(activation):
    tiny = 1e-40
    x, w_out = torch.full((1, 1), tiny), torch.full((1, 3), 2.0**20)
    w_in = torch.tensor([[1.0], [-1.0], [0.0]])
    if activation == "reglu":
        w_in = torch.cat([w_in, torch.zeros(3, 1)])
    b_in = torch.tensor([0.0] * 3 + [1.0] * (w_in.shape[0] - 3))
    with dc.execution("sparse"):
        out = dc.sparse_mlp(x, w_in, w_out, b_in, activation=activation)
    assert out.item() == pytest.approx(tiny * 2.0**20, rel=1e-4)


def test_the_derivative_at_zero_is_zero():
    x = torch.tensor([[0.0], [-0.0], [1.0]], requires_grad=True)
    w = torch.ones(1, 1, requires_grad=True)
    with dc.execution("sparse"):
        out = dc.sparse_mlp(x, w, w)
    assert torch.autograd.grad(out.sum(), x)[0].flatten().tolist() == [0.0, 0.0, 1.0]


# What is kept, counted and repeated -----------------------------------------------------------------------------------


def saved_bytes(p, activation="relu", **options):
    """Of what is saved beside the inputs, in storages."""
    saved = {}

    def pack(t):
        saved[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        run(p, activation, **options)
    return sum(saved.values()) - sum(p[n].nbytes for n in ("x", "w_in", "w_out"))


@pytest.mark.parametrize(("sparsity", "fewer"), [(0.8, 4), (0.9, 7), (0.95, 11)])
def test_saved_activations_are_as_small_as_the_non_zeros(sparsity, fewer):
    p = problem(256, 64, 2048)
    with torch.no_grad():
        p["b_in"].copy_(-(p["x"] @ p["w_in"].t()).quantile(sparsity, dim=0))
    assert saved_bytes(p) <= 256 * 2048 * 4 / fewer
    assert saved_bytes(p, save="dense") == 256 * 2048 * 4
    assert saved_bytes(p, save="recompute") == p["b_in"].nbytes


def test_saved_activations_of_a_gated_mlp_are_two_values_a_non_zero():
    p = problem(64, 32, 512, "reglu", shift=1.5)
    on = int((p["x"] @ p["w_in"][:512].t() + p["b_in"][:512] > 0).sum())
    assert saved_bytes(p, "reglu") == 64 * 512 / 8 + 2 * on * 4 + 65 * 8
    assert saved_bytes(p, "reglu", save="dense") == 2 * 64 * 512 * 4


def total(fn):
    with FlopCounterMode(display=False) as counter:
        fn()
    return counter.get_total_flops()


@pytest.mark.parametrize("save", SAVE)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_flops_are_those_of_non_zeros(activation, save):
    p = problem(40, 16, 100, activation, shift=1.0)
    gate = p["x"] @ p["w_in"][:100].t() + p["b_in"][:100]
    dense, sparse = 2 * 40 * 100 * 16, 2 * int((gate > 0).sum()) * 16
    gated = activation == "reglu"
    hidden = dense + gated * sparse
    with dc.execution("sparse"):
        out = run(p, activation, save=save)
        assert total(lambda: run(p, activation, save=save)) == hidden + sparse
    again = hidden if save == "recompute" else 0
    grad = torch.ones_like(out)
    assert total(lambda: grads(out, p, grad)) == again + sparse * (6 if gated else 4)
    with dc.execution("masked"):
        assert total(lambda: run(p, activation)) == dense * (3 if gated else 2)


def test_flops_of_fake_tensors_are_the_dense_bound():
    with torch._subclasses.FakeTensorMode():
        p = problem(40, 16, 100, "reglu")
        with dc.execution("sparse"):
            assert total(lambda: run(p, "reglu").sum().backward()) == 9 * 2 * 40 * 100 * 16


@pytest.mark.parametrize("activation", ["relu", "reglu"])
@pytest.mark.parametrize("rows", [1, 200])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_forty_repeats_and_any_thread_count_give_the_same_bits(dtype, rows, activation):
    p = problem(rows, 96, 1001, activation, dtype, shift=1.2, major=rows == 1)

    def once():
        with dc.execution("sparse"):
            out = run(p, activation)
        return [out, *grads(out, p, torch.ones_like(out)).values()]

    threads = torch.get_num_threads()
    first = once()
    try:
        for i in range(40 if rows == 1 else 12):
            torch.set_num_threads((1, 2, 3)[i % 3])
            assert all(torch.equal(a, b) for a, b in zip(once(), first, strict=True))
    finally:
        torch.set_num_threads(threads)


def test_both_layouts_of_a_weight_and_all_ways_to_save_give_the_same_values():
    p = problem(50, 64, 300, shift=1.3)
    q = {**p, "w_out": neuron_major(p["w_out"])}
    with dc.execution("sparse"):
        want = run(p)
        assert all(torch.equal(run(p, save=save), want) for save in SAVE)
        with torch.no_grad():
            torch.testing.assert_close(run(q), want, rtol=1e-5, atol=1e-5)


BAD_CALLS = {
    "x: expected a Tensor, got int": (TypeError, {"x": 3}),
    "x: expected a floating dtype of 16, 32 or 64 bits, got torch.int64": (TypeError, {"x": torch.zeros(37, 33).long()}),
    "x: expected a strided tensor, got torch.sparse_coo": (TypeError, {"x": torch.zeros(37, 33).to_sparse()}),
    "x: expected at least 2 dimensions [..., D], got shape [33]": (ValueError, {"x": torch.zeros(33)}),
    "w_in: expected a Tensor, got NoneType": (TypeError, {"w_in": None}),
    "w_in: expected the dtype of x, torch.float32, got torch.float64": (TypeError, {"w_in": torch.zeros(71, 33).double()}),
    "w_in: expected shape [I=71, H=33], got [70, 33]": (ValueError, {"w_in": torch.zeros(70, 33)}),
    "w_in: expected shape [2I=142, H=33], got [71, 33]": (ValueError, {"activation": "reglu"}),
    "w_in: expected a tensor on cpu, got one on meta": (ValueError, {"w_in": torch.zeros(71, 33, device="meta")}),
    "w_out: expected shape [H=33, I], got [71, 33]": (ValueError, {"w_out": torch.zeros(71, 33)}),
    "b_in: expected shape [I=71], got [1, 71]": (ValueError, {"b_in": torch.zeros(1, 71)}),
    "b_out: expected shape [H=33], got [34]": (ValueError, {"b_out": torch.zeros(34)}),
    "activation: expected one of relu, relu2, reglu, got 'gelu'": (ValueError, {"activation": "gelu"}),
    "save: expected one of compressed, dense, recompute, got 'none'": (ValueError, {"save": "none"}),
}  # fmt: skip


@pytest.mark.parametrize("message", BAD_CALLS)
@pytest.mark.parametrize("mode", MODES)
def test_bad_calls_name_the_argument(message, mode):
    kind, change = BAD_CALLS[message]
    call = {**problem(), "activation": "relu", "save": "compressed", **change}
    with pytest.raises(kind) as error, dc.execution(mode):
        dc.sparse_mlp(*(call[n] for n in NAMES), activation=call["activation"], save=call["save"])
    assert message in str(error.value)
