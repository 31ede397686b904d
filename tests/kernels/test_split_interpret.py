"""Products whose tiles are made in pieces of their depth, in Triton's interpreter, against the reference in float64."""

import os

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("runs under TRITON_INTERPRET=1, in a process of its own", allow_module_level=True)

import dyncore as dc
from dyncore.backends import reference
from dyncore.backends import triton as backend
from dyncore.kernels.common import product
from dyncore.kernels.common.configs import Target
from tests.support import assert_gradients, assert_values

FORMS = [(True, True), (True, False), (False, True), (False, False)]
FORM_NAMES = ["rows-rows", "rows-slots", "slots-rows", "slots-slots"]

pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")


@pytest.fixture
def counts(monkeypatch):
    """Of pieces, launch by launch."""
    found, finish = [], product.finish_pieces

    def counting(pieces, *others):
        found.append(pieces.shape[0])
        pieces_before = pieces.clone()
        finish(pieces, *others)
        assert torch.equal(torch.nan_to_num(pieces), torch.nan_to_num(pieces_before))

    monkeypatch.setattr(product, "finish_pieces", counting)
    monkeypatch.setattr(backend, "_target", lambda x: Target(80, 4, False))
    return found


def few_rows(dtype, groups=1):
    """A plan of 7 live slots of 11 rows, with scales; 5 slots of padding."""
    rows, scale = torch.tensor([0, 2, 3, 5, 7, 8, 10] + [0] * 5), torch.rand(12).to(dtype)
    offsets = torch.tensor([0, 7]) if groups == 1 else torch.tensor([0, 0, 7])
    counts = torch.zeros(12, dtype=torch.int32).index_fill_(0, rows[:7] + 1, 1)
    inverse = [counts.cumsum(0).int(), torch.arange(12, dtype=torch.int32)]
    return dc.Plan(rows.int(), offsets.int(), scale, 11, *inverse, False)


def tensors(plan):
    return plan.rows, plan.offsets, plan.scale, plan.row_offsets, plan.row_slots


def random(dtype, *shape):
    return (torch.randn(shape) / shape[-1] ** 0.5).to(dtype)


def linear(plan, dtype, k, n, gather, scatter, activation):
    g = plan.num_groups
    x = random(dtype, 11 if gather else 12, k) * k**0.5
    if not gather:
        x[7:] = float("nan")  # padding is never read
    x, weight, bias = x.to(dtype), random(dtype, g, n, k), random(dtype, g, n)
    form = (activation, gather, scatter, True)
    out, pre = backend.grouped_linear(x, weight, bias, *tensors(plan), *form)
    want, want_pre = reference.grouped_linear(x.double(), weight.double(), bias.double(), *tensors(plan), *form)
    assert_values(out, want)
    assert_values(pre[:7], want_pre[:7], what="pre")
    assert (out[1 if scatter else slice(7, None)] == 0).all()


@pytest.mark.parametrize(("gather", "scatter"), FORMS, ids=FORM_NAMES)
def test_every_form(counts, gather, scatter):
    linear(few_rows(torch.float32), torch.float32, 517, 60, gather, scatter, "gelu")
    assert counts == [2]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_rows_of_whole_16_bytes(counts, dtype):
    linear(few_rows(dtype), dtype, 2048, 64, True, True, "none")
    assert counts == [8 if dtype == torch.float32 else 2]


def test_an_empty_group_beside(counts):
    linear(few_rows(torch.float32, groups=2), torch.float32, 1024, 33, True, False, "relu2")
    assert counts == [4]


def test_pieces_behind_the_depth_are_empty(counts, monkeypatch):
    """129 steps in 16 pieces of 9: the last would begin behind the end."""
    monkeypatch.setattr(backend, "_target", lambda x: Target(80, 16, False))
    linear(few_rows(torch.float32), torch.float32, 129 * 32, 64, True, True, "none")
    assert counts == [16]


@pytest.mark.parametrize("activation", ["swiglu", "gelu"])
def test_an_mlp_forward_and_the_gradient_of_its_input(counts, activation):
    plan, wide = few_rows(torch.float32), 2 if activation == "swiglu" else 1
    x, w_in, w_out = (random(torch.float32, *s) for s in ((11, 768), (1, wide * 40, 768), (1, 50, 40)))
    p = [x * 768**0.5, w_in, w_out, random(torch.float32, 1, wide * 40), random(torch.float32, 1, 50), None]
    got = backend.grouped_mlp(*p, *tensors(plan), activation, True)
    want = reference.grouped_mlp(*[t if t is None else t.double() for t in p], *tensors(plan), activation, True)
    assert counts == [3]
    assert_values(got[0], want[0])
    assert_values(got[1][:7], want[1][:7], what="pre")


def test_the_gradient_through_transposed_weights(counts):
    plan = few_rows(torch.float32)
    grad, x, weight = random(torch.float32, 11, 1024), random(torch.float32, 11, 48), random(torch.float32, 1, 1024, 48)
    p, form = (
        [grad, x, weight, None, random(torch.float32, 12, 1024)],
        ("silu", True, True, [True, False, False, False]),
    )
    got = backend.grouped_linear_backward(*p, *tensors(plan), *form)[0]
    want = reference.grouped_linear_backward(*[None if t is None else t.double() for t in p], *tensors(plan), *form)[0]
    assert counts == [4]
    assert_gradients(got, want, torch.float32, "x")
