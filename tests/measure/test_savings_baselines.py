"""The rivals of a dynamic module: its dense twin, plain PyTorch in the place of the ops, a smaller network; and layers
that execute a given share."""

import sys

import pytest
import torch
from torch import nn

import dyncore as dc
from dyncore.measure import baselines, flops
from dyncore.measure.calls import Call, difference
from dyncore.measure.forcing import NotForced, force_keep, forced
from dyncore.measure.naive import PlainOps
from dyncore.nn import exits, policies

D = 16


def quarter(x):
    return torch.arange(x.shape[0]) % 4 == 0


def tokens(x):
    return (torch.arange(x.shape[0] * x.shape[1]) % 4 == 0).view(x.shape[:2])


def early_exit():
    stages, heads = [nn.Linear(D, D) for _ in range(4)], [nn.Linear(D, 3) for _ in range(4)]
    return dc.nn.EarlyExit(stages, heads, exits.MaxProbability(0.45))


def sequences():
    return torch.randn(4, 8, D)


def rows():
    return torch.randn(40, D)


LAYERS = {
    "Skip": (lambda: dc.nn.Skip(nn.Linear(D, D), quarter), rows),
    "TopK": (lambda: dc.nn.Skip(nn.Linear(D, D), dc.nn.TopKGate(D, 0.25)), sequences),
    "TokenSkip": (lambda: dc.nn.TokenSkip(dc.nn.TransformerBlock(D, 2), tokens), sequences),
    "MixtureOfDepths": (lambda: dc.nn.MixtureOfDepths(dc.nn.TransformerBlock(D, 2), 0.25), sequences),
    "MoE": (lambda: dc.nn.MoE(D, 24, 8, shared_experts=1), rows),
    "TreeMLP": (lambda: dc.nn.TreeMLP(D, 3, 8), rows),
    "ACM": (lambda: dc.nn.ACM(D, 4, 8), rows),
    "ACMLinear": (lambda: dc.nn.ACMLinear(D, 24, 4), rows),
    "DynamicWidthMLP": (lambda: dc.nn.DynamicWidthMLP(D, 32, 4), rows),
    "DynamicKMoE": (lambda: dc.nn.DynamicKMoE(D, 8, 8), rows),
    "EarlyExit": (early_exit, rows),
    "Cascade": (lambda: dc.nn.Cascade([nn.Linear(D, 3), nn.Sequential(nn.Linear(D, D), nn.Linear(D, 3))]), rows),
    "AdaptiveDepth": (lambda: dc.nn.AdaptiveDepth([nn.Linear(D, D) for _ in range(4)], D), rows),
    "PolicySkip": (
        lambda: dc.nn.PolicySkip([nn.Linear(D, D) for _ in range(4)], policies.BernoulliPolicy(D, 4)),
        rows,
    ),
    "Branch": (lambda: dc.nn.Branch([nn.Linear(D, D) for _ in range(4)], dc.nn.ChoiceGate(D, 4)), rows),
    "Hierarchy": (
        lambda: dc.nn.Hierarchy(
            nn.Linear(D, 4), [nn.Linear(D, 2) for _ in range(4)], [[2 * g, 2 * g + 1] for g in range(4)]
        ),
        rows,
    ),
    "TokenDrop": (lambda: dc.nn.TokenDrop(0.5, D, keep_first=0), sequences),
    "TokenMerge": (lambda: dc.nn.TokenMerge(0.25, keep_first=0), sequences),
}


def made(name):
    torch.manual_seed(0)
    make, inputs = LAYERS[name]
    return make().eval(), inputs()


def call_of(module, *inputs, backward=False):
    return Call(module, inputs, {}, "sparse", backward)


DENSE = {
    "Skip": 40 * 2 * D * D,
    "MoE": 40 * 3 * 2 * D * 24 * 9,
    "TreeMLP": 40 * 2 * 2 * D * 8 * 8,
    "ACM": 40 * 2 * 2 * D * 32,
    "ACMLinear": 40 * 2 * D * 24,
    "DynamicKMoE": 40 * 2 * 2 * D * 64,
    "EarlyExit": 40 * (4 * 2 * D * D + 2 * D * 3),
    "Cascade": 40 * (2 * D * D + 2 * D * 3),
    "AdaptiveDepth": 40 * 4 * 2 * D * D,
    "PolicySkip": 40 * 4 * 2 * D * D,
    "TokenDrop": 0,
}


@pytest.mark.parametrize("name", DENSE)
def test_a_dense_twin_has_the_flops_of_the_whole_layer_and_none_of_its_decision(name):
    layer, x = made(name)
    twin, how = baselines.dense(call_of(layer, x))
    assert flops(twin) == DENSE[name]
    assert how == f"{type(layer).__name__} replaced by dense modules"


@pytest.mark.parametrize("name", ["Skip", "TokenSkip", "DynamicKMoE", "EarlyExit"])
def test_a_dense_twin_gives_what_the_layer_gives_where_everything_is_open(name):
    layer, x = made(name)
    twin, _ = baselines.dense(call_of(layer, x))
    open_layer, share = forced(layer, 1.0)
    assert share == 1
    assert difference(call_of(open_layer, x)(), twin()) is None


def test_twins_share_parameters_and_leave_the_module_as_it_was():
    model = nn.Sequential(nn.Linear(D, D), made("Skip")[0], made("MoE")[0])
    before = [type(m) for m in model.modules()]
    twin, how = baselines.dense(call_of(model, rows()))
    forced(model, 0.5)
    assert [type(m) for m in model.modules()] == before
    assert model[2].top_k == 2
    assert twin.module[0].weight is model[0].weight
    assert twin.module[1] is not model[1].module
    assert twin.module[1].weight is model[1].module.weight
    assert how == "Skip, MoE replaced by dense modules"


def test_a_model_given_exits_is_compared_with_the_model_itself():
    blocks = nn.Sequential(*[nn.Sequential(nn.Linear(D, D), nn.ReLU()) for _ in range(4)], nn.Linear(D, 3)).eval()
    x = rows()
    model = dc.convert.add_early_exits(blocks, ["1"], x[:2])
    model.threshold = -1.0  # everybody leaves at the first: the model's own forward is broken off
    saved = dc.measure.savings(model.eval(), x, seconds=1e-9, min_rounds=1)
    assert saved.flops["dense"] == 40 * (4 * 2 * D * D + 2 * D * 3)
    assert saved.flops["sparse"] == 40 * (2 * 2 * D * D + 2 * D * 3)
    assert saved.errors == []
    assert "break_even" not in saved.unavailable
    assert sum(saved.stages.values()) == pytest.approx(1)


def test_layers_within_the_block_of_a_layer_are_replaced_too():
    block = dc.nn.TransformerBlock(D, 2, mlp=dc.nn.MoE(D, 24, 4))
    twin, how = baselines.dense(call_of(dc.nn.TokenSkip(block, tokens), sequences()))
    assert isinstance(twin.module, dc.nn.TransformerBlock)
    assert isinstance(twin.module.mlp, dc.nn.MLP)
    assert how == "TokenSkip, MoE replaced by dense modules"


def test_what_has_no_twin_is_computed_in_full_beside_what_has_one():
    branch, x = made("Branch")
    with pytest.raises(baselines.NoBaseline, match="no dense twin of Branch: give one as dense="):
        baselines.dense(call_of(branch, x))
    twin, how = baselines.dense(call_of(nn.Sequential(made("Skip")[0], branch), x))
    assert how == "Skip replaced by dense modules, Branch computed in full"
    assert flops(twin) == 40 * (5 * 2 * D * D + 2 * D * 4)
    with pytest.raises(baselines.NoBaseline, match=r"no layer of dyncore\.nn in it to replace"):
        baselines.dense(call_of(nn.Linear(D, D), x))


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("keep", [0.25, 0.5, 1.0])
def test_a_forced_layer_executes_the_share_it_is_told(name, keep):
    layer, x = made(name)
    x = x.repeat(6, *[1] * (x.dim() - 1))
    if name == "TreeMLP":
        with pytest.raises(NotForced, match="TreeMLP has no gate"):
            forced(layer, keep)
        return
    twin, share = forced(layer, keep)
    with dc.execution("sparse"):
        costs = [(twin(x), twin.last_cost.detach().mean())[1] for _ in range(3)]
    assert share == pytest.approx(max(keep, {"TokenMerge": 0.5, "Cascade": 0.5}.get(name, 0)), abs=0.01)
    assert float(torch.stack(costs).mean()) == pytest.approx(share, abs=0.03)


class OwnLayer(dc.nn.DynamicLayer):
    def __init__(self, gate=None):
        super().__init__()
        self.linear = nn.Linear(D, D)
        if gate is not None:
            self.gate = gate

    def forward(self, x):
        plan = dc.select(quarter(x) if not hasattr(self, "gate") else self.gate(x).mask)
        y = dc.scatter_rows(self.linear(dc.gather_rows(x, plan)), plan)
        self.record(plan, lambda: torch.ones(x.shape[0]))
        return y


def test_a_layer_of_ones_own_is_forced_by_its_gate_or_by_a_way_of_its_own():
    twin, _ = forced(OwnLayer(quarter), 0.5)
    twin(rows())
    assert twin.last_plan.num_slots == 20
    with pytest.raises(NotForced, match="OwnLayer has no gate that gives way"):
        forced(OwnLayer(), 0.5)
    saved = dc.measure.savings(OwnLayer(), rows(), seconds=1e-9, min_rounds=1)
    assert saved.unavailable["break_even"] == "OwnLayer has no gate that gives way"
    assert saved.sweep is None

    class Registered(OwnLayer):
        pass

    @force_keep.register
    def _(layer: Registered, keep: float) -> float:
        layer.gate = lambda x: dc.nn.Decision(torch.arange(x.shape[0]) < keep * x.shape[0])
        return keep

    twin, _ = forced(Registered(), 0.25)
    twin(rows())
    assert twin.last_plan.num_slots == 10


NAIVE = ["Skip", "TokenSkip", "MixtureOfDepths", "MoE", "TreeMLP", "ACM", "ACMLinear", "Branch", "TokenMerge"]


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("name", NAIVE)
def test_plain_pytorch_skips_the_same_and_gives_the_same_numbers(name, backward):
    layer, x = made(name)
    call = call_of(layer, x.requires_grad_(backward), backward=backward)
    plain = PlainOps()
    naive = Call(layer, (x,), {}, "sparse", backward, plain.counting)
    assert difference(naive(), call(), loose=True) is None
    assert plain.used
    if not backward and name in ("Skip", "MoE", "ACM", "ACMLinear", "Branch"):  # attention there is of all pairs
        assert flops(Call(layer, (x,), {}, "sparse", False, plain)) == flops(call)


def test_plain_pytorch_takes_the_place_of_packed_and_sparse_products():
    moe, x = made("MoE")
    moe.pack()
    sparse = nn.Sequential(nn.Linear(D, 64), nn.ReLU(), dc.nn.SparseLinear(64, D))
    for module in (moe, sparse):
        plain = PlainOps()
        assert difference(Call(module, (x,), {}, "sparse", False, plain.counting)(), call_of(module, x)()) is None
        assert plain.used


def test_the_ops_are_back_afterwards_even_after_an_error():
    plain, before = PlainOps(), dc.grouped_mlp
    moe = sys.modules["dyncore.nn.moe"]
    for context in (plain, plain.counting):
        inside = []

        def fail(context=context, inside=inside):
            with context():
                inside += [dc.grouped_mlp, moe.grouped_mlp]
                raise KeyError

        with pytest.raises(KeyError):
            fail()
        assert before not in inside
        assert dc.grouped_mlp is before
        assert moe.grouped_mlp is before
    assert not plain.used


def twin_of(*widths):
    layers = [nn.Sequential(nn.Linear(D, w), nn.GELU(), nn.Linear(w, D)) for w in widths]
    return nn.Sequential(*layers)


@pytest.mark.parametrize("count", [1, 40])
def test_a_smaller_network_has_narrower_mlps(count):  # which read fewer weights, as fewer samples would not
    call = call_of(twin_of(64, 64), torch.randn(count, D))
    total = flops(call)
    cut, how = baselines.smaller(call, total, total * 3 // 8)
    assert how == "the dense twin with 38% of the neurons of its MLPs"
    assert flops(cut) == total * 3 // 8
    assert cut.args[0].shape == (count, D)


def test_without_mlps_to_cut_a_smaller_network_is_the_dense_one_on_fewer_samples():
    call = call_of(nn.Sequential(nn.Linear(D, 32), nn.Tanh(), nn.Linear(32, D)), rows())
    cut, how = baselines.smaller(call, 40 * 4 * D * 32, 10 * 4 * D * 32)
    assert how == "the dense twin on 10 of 40 samples, as it has no MLPs to be narrower"
    assert flops(cut) == 10 * 4 * D * 32
    alone = call_of(nn.Linear(D, D), torch.randn(1, D))
    with pytest.raises(baselines.NoBaseline, match="no MLPs to be narrower, nor can the inputs be cut"):
        baselines.smaller(alone, 100, 50)


def test_where_mlps_are_too_little_a_smaller_network_is_the_dense_one_on_shorter_sequences():
    call = call_of(dc.nn.TransformerBlock(D, 2), torch.randn(1, 64, D))
    total = flops(call)
    cut, how = baselines.smaller(call, total, total // 4)
    assert flops(cut) == pytest.approx(total / 4, rel=0.03)
    assert "of 64 positions" in how


def test_where_nothing_was_skipped_no_network_is_smaller():
    call = call_of(twin_of(32), rows())
    with pytest.raises(baselines.NoBaseline, match="nothing was skipped"):
        baselines.smaller(call, 100, 100)
    with pytest.raises(baselines.NoBaseline, match="no FLOP is left"):
        baselines.smaller(call, 100, 0)
