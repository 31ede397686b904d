"""moefy and acmize: the MLPs of torch's and transformers' models as experts and learners that add up to what they were."""

import copy
import re

import pytest
import torch
from torch import nn

import dyncore as dc
from dyncore.convert.clusters import assign, balanced_clusters

H, I = 16, 32  # noqa: E741


class Block(nn.Module):
    """A residual block around an MLP."""

    def __init__(self, mlp):
        super().__init__()
        self.norm, self.mlp = nn.LayerNorm(H), mlp

    def forward(self, x):
        return x + self.mlp(self.norm(x))


class Gated(nn.Module):
    """Llama's MLP."""

    def __init__(self, bias=False):
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(H, I, bias=bias), nn.Linear(H, I, bias=bias)
        self.down_proj, self.act_fn = nn.Linear(I, H, bias=bias), nn.SiLU()

    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


def plain(act=nn.GELU, width=I, **options):
    return nn.Sequential(nn.Linear(H, width, **options), act(), nn.Linear(width, H, **options))


def model():
    return nn.Sequential(Block(plain()), Block(Gated()), Block(dc.nn.MLP(H, I, activation="relu", bias=False)))


def unchanged(convert, build, x, layers, kind):
    """The converted model computes what it did, in evaluation; its report."""
    model = build().eval()
    want = model(x)
    want = want if isinstance(want, torch.Tensor) else want[0]
    report = convert(model)
    got = model(x)
    got = got if isinstance(got, torch.Tensor) else got[0]
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    assert len(report.swapped) == sum(isinstance(m, kind) for m in model.modules()) == layers, report
    return model, report


def moefy(model, **options):
    return dc.convert.moefy(model, 4, **{"router_dim": 8, **options})


def acmize(model, **options):
    return dc.convert.acmize(model, 4, **options)


BOTH = [(moefy, dc.nn.DynamicKMoE), (acmize, dc.nn.ACM)]
SIZES = {"hidden_size": H, "intermediate_size": I, "num_hidden_layers": 2, "num_attention_heads": 2}
TEXT = {**SIZES, "vocab_size": 40}


@pytest.mark.parametrize(("convert", "kind"), BOTH)
def test_plain_and_gated_mlps_compute_what_they_did(convert, kind):
    x = torch.randn(3, 7, H)
    converted, report = unchanged(convert, model, x, 3, kind)
    assert [s.name for s in report.swapped] == ["0.mlp", "1.mlp", "2.mlp"]
    assert [s.activation for s in report.swapped] == ["gelu", "swiglu", "relu"]
    assert report.kept == ()
    assert "3 swapped, 0 kept" in repr(report)
    again = convert(converted)
    assert again.swapped == ()
    assert {(k.name, k.reason) for k in again.kept} == {
        (f"{i}.mlp", "runs a part of its neurons already") for i in range(3)
    }


@pytest.mark.parametrize(("convert", "kind"), BOTH)
def test_torch_transformer_layers(convert, kind):
    def build():
        layer = nn.TransformerEncoderLayer(H, 2, I, activation="gelu", batch_first=True)
        return nn.TransformerEncoder(layer, 2)

    converted, report = unchanged(convert, build, torch.randn(2, 5, H), 2, kind)
    assert "the dropout of 0.1 before linear2 is gone" in report.swapped[0].note
    with torch.no_grad():  # where torch would take its fused path
        x, padding = torch.randn(2, 5, H), torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
        assert converted(x, src_key_padding_mask=padding).isfinite().all()
    converted.train()(torch.randn(2, 5, H)).sum().backward()
    assert converted.layers[0].linear1.w_out.grad.abs().sum() > 0


def llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(**TEXT, num_key_value_heads=1))


def gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config(n_embd=H, n_layer=2, n_head=2, n_inner=I, vocab_size=40, n_positions=32))


def opt():
    from transformers import OPTConfig, OPTForCausalLM

    config = {**TEXT, "ffn_dim": I, "word_embed_proj_dim": H, "max_position_embeddings": 32}
    return OPTForCausalLM(OPTConfig(**config))


def bert():
    from transformers import BertConfig, BertModel

    return BertModel(BertConfig(**TEXT, max_position_embeddings=32))


def t5():
    from transformers import T5Config, T5EncoderModel

    return T5EncoderModel(T5Config(d_model=H, d_kv=8, d_ff=I, num_layers=2, num_heads=2, vocab_size=40))


@pytest.mark.parametrize("build", [llama, gpt2, opt, bert, t5], ids=lambda f: f.__name__)
@pytest.mark.parametrize(("convert", "kind"), BOTH)
def test_transformers_models(convert, kind, build):
    pytest.importorskip("transformers")
    unchanged(convert, build, torch.randint(0, 40, (2, 9)), 2, kind)


def test_projections_become_learners():
    pytest.importorskip("transformers")
    tokens = torch.randint(0, 40, (2, 9))
    converted, report = unchanged(
        lambda model: dc.convert.acmize(model, 4, attention=True), llama, tokens, 10, (dc.nn.ACM, dc.nn.ACMLinear)
    )
    names = {s.name.rpartition(".")[2] for s in report.swapped if s.now == "ACMLinear"}
    assert names == {"q_proj", "k_proj", "v_proj", "o_proj"}
    converted(tokens)
    costs = dc.nn.collect_costs(converted)
    assert len(costs) == 10
    assert all(cost.mean() == 1 for cost in costs.values())
    report = dc.convert.acmize(nn.TransformerEncoderLayer(H, 2, I), 4, attention=True)
    assert [k.kind for k in report.kept] == ["MultiheadAttention"]


def test_routers_learn_on_the_data_that_reaches_the_layer():
    x, start, notes = torch.randn(40, 9, H), model(), []
    for data in (x, [x[:20], (x[20:],)], {"input": x}):
        state = torch.random.get_rng_state()
        report = moefy(copy.deepcopy(start), data=data, steps=2)
        notes.append([s.note for s in report.swapped])
        torch.random.set_rng_state(state)
    assert notes[0] == notes[1] == notes[2]
    net = start.train()
    report = moefy(net, data=x, steps=120)
    assert all(float(s.note.rpartition("router error ")[2].partition(",")[0]) < 0.4 for s in report.swapped), report
    assert net.training
    x = x[:, 0]
    for layer in net.modules():
        if isinstance(layer, dc.nn.DynamicKMoE):
            layer.tau = 0.3
    net(x)
    assert all(0.25 <= float(cost.mean()) < 1 for cost in dc.nn.collect_costs(net).values())


def test_moefy_says_what_routers_cost_and_how_far_it_is():
    done = []
    report = moefy(model(), data=torch.randn(9, H), steps=1, progress=lambda *now: done.append(now))
    assert done == [(1, 3, "0.mlp"), (2, 3, "1.mlp"), (3, 3, "2.mlp")]
    shares = [100 * 8 * (H + 4) / (H * I * matrices) for matrices in (2, 3, 2)]
    assert [s.note.rpartition(", ")[2] for s in report.swapped] == [f"{round(s)}% of its FLOPs" for s in shares]
    with pytest.warns(UserWarning, match=r"router of width 40 costs .* in 0.mlp \(78%\), 2.mlp \(78%\) of the MLP"):
        moefy(model(), router_dim=40)  # one of 4 experts and the router: more than the MLP


def test_experts_are_of_neurons_that_point_the_same_way():
    directions = torch.eye(H)[:4]
    mlp = plain(nn.ReLU)
    with torch.no_grad():
        mlp[0].weight.copy_(directions[torch.randperm(I) % 4] + 0.05 * torch.randn(I, H))
        mlp[0].bias.zero_()
    x = directions[torch.arange(40) % 4] * 3 + 0.1 * torch.randn(40, H)
    want = mlp(x)
    holder = nn.Sequential(nn.Identity(), mlp)
    moefy(holder, data=x, steps=400, router_dim=32)
    holder[1].tau = 0.5
    got = holder(x)
    assert float(holder[1].last_cost.mean()) < 0.3
    assert float((got - want).detach().norm() / want.detach().norm()) < 0.1


def test_the_first_learners_are_of_the_neurons_that_matter():
    for data in (None, torch.randn(50, H)):
        net = nn.Sequential(nn.Identity(), plain(nn.ReLU, bias=False))
        with torch.no_grad():
            net[1][2].weight *= torch.linspace(0, 1, I)  # the last neurons matter
        want = net[1][2].weight.detach().norm(dim=0).topk(8).values.min()
        acmize(net, data=data)
        first = net[1].w_out[:, :8].detach().norm(dim=0)
        assert float(first.mean()) > 0.7 * float(want)


def test_gates_of_learners_learn_to_take_fewer():
    net = model()
    acmize(net)
    x, dense = torch.randn(200, H), copy.deepcopy(net)
    want = dense.eval()(x).detach()
    optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
    for _ in range(60):
        y = net.train()(x)
        costs = dc.nn.collect_costs(net).values()
        loss = (y - want).square().mean() + dc.nn.losses.compute_target(costs, 0.5)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    net.eval()(x)
    cost = torch.stack([c.mean() for c in dc.nn.collect_costs(net).values()]).mean()
    assert 0.3 < float(cost.detach()) < 0.7


def test_dtype_gradients_and_mode_stay():
    net = nn.ModuleList([plain()]).bfloat16().eval()
    net[0][0].weight.requires_grad_(False)
    moefy(net)
    layer = net[0]
    assert layer.w_in.dtype == layer.b_out.dtype == torch.bfloat16
    assert not layer.w_in.requires_grad
    assert layer.w_out.requires_grad
    assert not layer.training
    assert next(layer.router.parameters()).dtype == torch.float32
    assert layer(torch.randn(3, H).bfloat16()).dtype == torch.bfloat16


def hooked():
    mlp = plain()
    mlp.register_forward_hook(lambda *args: None)
    return mlp


def tied():
    mlp = plain()
    mlp[2].weight = nn.Parameter(mlp[0].weight.t())
    holder = nn.ModuleList([mlp, nn.Linear(H, I)])
    holder[1].weight = mlp[0].weight
    return holder


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (hooked, "expected nothing that hangs on it, got hooks"),
        (tied, "expected Parameters of its own, got tied ones"),
        (lambda: plain(nn.Tanh), "expected one of the activations"),
        (lambda: plain(width=30), "expected a width that 4 .* can share, got 30"),
    ],
)
@pytest.mark.parametrize(("convert", "kind"), BOTH)
def test_what_cannot_be_split_is_kept_and_said_why(convert, kind, build, reason):
    net = nn.ModuleList([build()])
    before = list(net.modules())
    report = convert(net)
    assert report.swapped == ()
    assert len(report.kept) == 1
    assert re.search(reason, report.kept[0].reason), report.kept[0].reason
    assert all(a is b for a, b in zip(before, net.modules(), strict=True))


def test_a_model_that_is_an_mlp_and_one_that_has_none():
    assert "cannot be replaced in place" in moefy(plain()).kept[0].reason
    assert "no dense MLP was recognised" in repr(moefy(nn.Linear(H, H)))


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: moefy(3), TypeError, "model: expected a module, got int"),
        (lambda: dc.convert.moefy(model(), 0), ValueError, "num_experts: expected an int >= 1, got 0"),
        (lambda: dc.convert.acmize(model(), 1.5), TypeError, "num_learners: expected an int >= 1, got float"),
        (
            lambda: moefy(model(), tau=0.5),
            ValueError,
            "tau: expected 1 without data, for routers that have learnt nothing",
        ),
        (lambda: moefy(model(), progress=3), TypeError, "progress: expected a callable, got int"),
        (lambda: moefy(model(), data=[]), ValueError, "data: expected batches that go through every MLP"),
        (lambda: balanced_clusters(torch.randn(7, 2), 3), ValueError, "count: expected a divisor of 7 points, got 3"),
    ],
)
def test_what_does_not_fit_is_refused(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_clusters_are_of_one_size_and_stable():
    costs = torch.rand(40, 5)
    cluster = assign(costs, 8)
    assert torch.equal(torch.bincount(cluster), torch.full((5,), 8))
    own = costs.gather(1, cluster[:, None])
    for k in range(5):
        dearest = costs[cluster == k, k].max()
        assert not ((costs[:, k : k + 1] < own) & (costs[:, k : k + 1] < dearest)).any()


def test_clusters_find_what_lies_together():
    centres = torch.randn(6, 4) * 10
    label = torch.randperm(60) % 6
    order = balanced_clusters(centres[label] + 0.1 * torch.randn(60, 4), 6)
    assert sorted(order.tolist()) == [*range(60)]
    assert all(len(set(label[part].tolist())) == 1 for part in order.split(10))


@pytest.mark.parametrize(("convert", "kind"), BOTH, ids=["moefy", "acmize"])
def test_a_second_conversion_says_that_there_was_a_first(convert, kind):
    net = nn.ModuleList([model(), nn.TransformerEncoderLayer(H, 2, I)]).eval()
    names = [s.name for s in convert(net).swapped]
    assert len(names) == 4
    assert not any(m.training for m in net.modules())
    again = convert(net)
    assert again.swapped == ()
    assert len(again.kept) == 4
    assert {(k.kind, k.reason) for k in again.kept} == {(kind.__name__, "runs a part of its neurons already")}
