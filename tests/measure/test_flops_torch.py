"""FLOPs of PyTorch's own ops that its counter has no formula for, or a wrong one, against counts made by hand."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention.flex_attention import flex_attention
from torch.utils.flop_counter import flop_registry

import dyncore as dc

B, S, D, HIDDEN = 4, 10, 32, 64
flops = dc.measure.flops


def encoder_layer(tokens, pairs):
    return 2 * tokens * (4 * D * D + 2 * D * HIDDEN) + 2 * 2 * pairs * D


@pytest.fixture
def layer():
    return nn.TransformerEncoderLayer(D, 4, HIDDEN, batch_first=True).eval()


def test_the_fused_encoder_layer_counts_what_its_parts_do(layer):
    x = torch.randn(B, S, D)
    want = encoder_layer(B * S, B * S * S)
    assert flops(layer, x) == want  # gradients are wanted: not fused
    with torch.no_grad():
        assert flops(layer, x) == want


def test_the_fused_encoder_on_padded_sequences_counts_the_tokens_there_are(layer):
    lengths = torch.tensor([10, 7, 3, 10])
    padding = torch.arange(S) >= lengths[:, None]
    with torch.no_grad(), pytest.warns(UserWarning, match="nested tensors"):
        found = flops(nn.TransformerEncoder(layer, 2), torch.randn(B, S, D), src_key_padding_mask=padding)
    assert found == 2 * encoder_layer(30, B * S * S)  # torch pads queries and keys again
    assert found.by_module["layers.1"] == found // 2


def test_fused_attention_counts_projections_and_pairs():
    x = torch.randn(B, S, D)
    attention = nn.MultiheadAttention(D, 4, batch_first=True).eval()
    with torch.no_grad():
        assert flops(attention, x, x, x) == 2 * B * S * 4 * D * D + 2 * 2 * B * S * S * D


def test_attention_of_a_cpu_counts_forward_and_backward():
    q, k, v = (torch.randn(2, 4, n, 8, requires_grad=True) for n in (6, 10, 10))
    pairs = 2 * 4 * 6 * 10
    found = flops(lambda: F.scaled_dot_product_attention(q, k, v).sum().backward())
    assert (found - found.backward, found.backward) == (2 * 2 * pairs * 8, 5 * 2 * pairs * 8)  # scores computed again


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_attention_counts_pairs_where_torch_does():
    q = torch.randn(1, 2, 16, 8)
    found = flops(flex_attention, q, q, q)
    if torch.ops.higher_order.flex_attention in flop_registry:
        assert (found, found.uncounted) == (2 * 2 * 2 * 16 * 16 * 8, {})
    else:  # torch 2.11 has no formula
        assert found.uncounted == {"higher_order::flex_attention": 1}


@pytest.mark.parametrize(("kind", "gates"), [(nn.LSTM, 4), (nn.GRU, 3), (nn.RNN, 1)])
def test_recurrent_layers_count_every_step(kind, gates):
    x = torch.randn(7, 3, 8)
    first, second = gates * 16 * (8 + 16), gates * 16 * (32 + 16)
    with torch.no_grad():
        assert flops(kind(8, 16, 2, bidirectional=True), x) == 2 * 7 * 3 * 2 * (first + second)


def test_fused_lstm_backward_counts_twice_its_forward():
    lstm = nn.LSTM(8, 16)
    x = torch.randn(7, 3, 8, requires_grad=True)
    found = flops(lambda: lstm(x)[0].sum().backward())
    assert (found, found.backward) == (3 * 2 * 21 * 64 * 24, 2 * 2 * 21 * 64 * 24)


def test_bilinear_counts_its_first_product_and_the_second():
    bilinear = nn.Bilinear(3, 4, 6)
    a, b = torch.randn(5, 3), torch.randn(5, 4)
    found = flops(lambda: bilinear(a, b).sum().backward())
    assert found - found.backward == 2 * 5 * 6 * (3 * 4 + 4)
    assert found.backward == 2 * 5 * 6 * (3 + 3 * 4)  # of the weight alone: x1 with the gradient, that with x2


@pytest.mark.parametrize("rows", [4, 40])  # element by element, and as a matrix product
def test_distances_count_alike_however_they_are_computed(rows):
    assert flops(torch.cdist, torch.randn(2, rows, 3), torch.randn(2, 30, 3)) == 2 * 2 * rows * 30 * 3


@pytest.mark.parametrize("groups", [1, 2, 8])
@pytest.mark.parametrize("transposed", [False, True])
def test_convolutions_count_their_groups_forward_and_backward(groups, transposed):
    kind = nn.ConvTranspose2d if transposed else nn.Conv2d
    conv = kind(8, 16, 3, groups=groups, stride=2)
    x = torch.randn(2, 8, 7, 7, requires_grad=True)
    positions = 7 * 7 if transposed else 3 * 3
    want = 2 * 2 * positions * 9 * 8 * 16 // groups
    found = flops(lambda: conv(x).sum().backward())
    assert (found, found.backward) == (3 * want, 2 * want)
    assert flops(lambda: conv(x.detach()).sum().backward()) == 2 * want


def test_convolution_over_time_first_counts():
    assert flops(torch.conv_tbc, torch.randn(9, 2, 4), torch.randn(3, 4, 5), torch.zeros(5)) == 2 * 7 * 2 * 3 * 4 * 5


@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csr])
@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
def test_sparse_matrices_count_what_they_store(layout):
    a = (torch.eye(8) + torch.eye(8).roll(1, 0)).to_sparse(layout=layout)  # 16 elements
    x = torch.randn(8, 5)
    assert flops(lambda: a @ x) == 2 * 16 * 5
    assert flops(lambda: torch.addmm(x, a, x)) == 2 * 16 * 5
    assert flops(lambda: F.linear(x.t(), a)) == 2 * 16 * 5
    assert flops(lambda: a @ x[:, 0]) == 2 * 16
    if layout is torch.sparse_csr:
        assert flops(torch.sparse.sampled_addmm, a, torch.randn(8, 3), torch.randn(3, 8)) == 2 * 16 * 3


M, K, N = 3, 4, 5
PRODUCTS = {
    "mv": lambda: torch.mv(torch.ones(M, K), torch.ones(K)),
    "addmv": lambda: torch.addmv(torch.ones(M), torch.ones(M, K), torch.ones(K)),
    "addmv_": lambda: torch.ones(M).addmv_(torch.ones(M, K), torch.ones(K)),
    "dot": lambda: torch.dot(torch.ones(M * K), torch.ones(M * K)),
    "vdot": lambda: torch.vdot(torch.ones(M * K), torch.ones(M * K)),
    "mm": lambda: torch.mm(torch.ones(M, K), torch.ones(K, 1)),
    "mm_out": lambda: torch.mm(torch.ones(M, K), torch.ones(K, 1), out=torch.empty(M, 1)),
    "addmm_": lambda: torch.ones(M, 1).addmm_(torch.ones(M, K), torch.ones(K, 1)),
    "int_mm": lambda: torch._int_mm(torch.ones(M, K, dtype=torch.int8), torch.ones(K, 1, dtype=torch.int8)),
    "bmm": lambda: torch.bmm(torch.ones(M, 2, K // 2), torch.ones(M, K // 2, 1)),
    "baddbmm_": lambda: torch.ones(M, 2, 1).baddbmm_(torch.ones(M, 2, K // 2), torch.ones(M, K // 2, 1)),
    "addbmm": lambda: torch.addbmm(torch.ones(2, 1), torch.ones(M, 2, K // 2), torch.ones(M, K // 2, 1)),
    "addbmm_": lambda: torch.ones(2, 1).addbmm_(torch.ones(M, 2, K // 2), torch.ones(M, K // 2, 1)),
    "einsum": lambda: torch.einsum("mk,kn->mn", torch.ones(M, K), torch.ones(K, 1)),
    "in inference mode": torch.inference_mode()(lambda: F.linear(torch.ones(M, K), torch.ones(1, K))),
}


@pytest.mark.parametrize("run", PRODUCTS.values(), ids=PRODUCTS)
def test_every_way_to_write_a_product_counts_it(run):
    found = flops(run)
    assert (found, found.uncounted) == (2 * M * K, {})


def test_a_condition_counts_the_branch_that_ran():
    x = torch.ones(4, 4)
    once, twice = (lambda x: x @ x), (lambda x: x @ x @ x)
    for predicate, products in ((True, 1), (False, 2)):
        assert flops(torch.cond, torch.tensor(predicate), once, twice, (x,)) == products * 2 * 4**3


def test_a_subclass_counts_the_ops_that_it_is_made_of():
    ragged = torch.nested.nested_tensor([torch.randn(3, D), torch.randn(5, D)], layout=torch.jagged)
    assert flops(F.linear, ragged, torch.randn(6, D)) == 2 * 8 * D * 6


def test_strided_nested_tensors_are_uncounted():
    ragged = torch.nested.nested_tensor([torch.randn(3, D), torch.randn(5, D)])
    assert flops(F.linear, ragged, torch.randn(6, D)).uncounted == {"aten::linear": 1}


def test_fake_tensors_count_as_real_ones():
    with torch._subclasses.fake_tensor.FakeTensorMode():
        assert flops(nn.Linear(3, 4), torch.ones(2, 3)) == 2 * 2 * 3 * 4


def test_function_transforms_count():
    w = torch.randn(3, 3)
    run = torch.func.vmap(torch.func.grad(lambda x: (w @ x).sum()))
    found = flops(run, torch.randn(5, 3))
    assert (found, found.backward) == (2 * 2 * 5 * 9, 2 * 5 * 9)
