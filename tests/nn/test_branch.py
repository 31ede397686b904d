"""Branch and Hierarchy: each row through the branches its router picks, and no other."""

import copy
import pickle

import pytest
import torch
from torch import nn

import dyncore as dc
from tests.nn.oracle import D, chain, flops, run

MODES = ("sparse", "masked", "auto")
ROW = 2 * 2 * D * 24  # FLOPs of one row in one module of `chain`
G = 3


def says(decision):
    """A router that gives this, whatever it is asked."""
    return lambda x: decision


def by_hand(layer, x, mask, weight):
    """The definition, row by row."""
    out = x.clone()
    for index in mask[..., 0].nonzero().tolist() + (~mask[..., 0]).nonzero().tolist():
        i = tuple(index)
        taken = mask[i].nonzero()[:, 0].tolist()
        y = sum((weight[i][g] if weight is not None else 1) * layer.branches[g](x[i][None])[0] for g in taken)
        if layer.returns == "update":
            out[i] = x[i] + y
        elif taken or layer.exit == "zero":
            out[i] = y
    return out


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
@pytest.mark.parametrize("several", [False, True], ids=["top1", "several"])
@pytest.mark.parametrize(("returns", "exit"), [("output", "identity"), ("output", "zero"), ("update", "identity")])
def test_rows_follow_the_definition(mode, weighted, several, returns, exit):
    x = torch.randn(4, 7, D, dtype=torch.float64)
    mask = torch.rand(4, 7, G) > 0.5 if several else (torch.arange(28) % 4).view(4, 7, 1) == torch.arange(G)
    weight = torch.rand(4, 7, G, dtype=torch.float64) if weighted else None
    layer = dc.nn.Branch(chain(G), says((mask, weight)), returns=returns, exit=exit).double()
    with dc.execution(mode), torch.no_grad():
        torch.testing.assert_close(layer(x), by_hand(layer, x, mask, weight))
    torch.testing.assert_close(layer.last_cost.float(), mask.float().mean(-1))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("weight", [None, "ones"])
def test_all_rows_in_one_branch_are_exactly_that_branch_and_none_the_identity(mode, weight):
    x = torch.randn(9, D)
    index = torch.full((9,), 1)
    layer = dc.nn.Branch(chain(G), says((index, None if weight is None else torch.ones(9))))
    with dc.execution(mode), torch.no_grad():
        assert torch.equal(layer(x), layer.branches[1](x))
        layer.router = says(index - 2)
        x[3] = float("nan")
        assert torch.equal(layer(x)[:3], x[:3])
        assert layer(x)[3].isnan().all()
        layer.exit = "zero"
        assert not layer(x).any()
    assert not layer.last_cost.any()


@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
@pytest.mark.parametrize("returns", ["output", "update"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_where_all_rows_take_all_branches_none_are_moved(dtype, returns, weighted, monkeypatch):
    x, mask = torch.randn(4, 7, D, dtype=dtype), torch.ones(4, 7, G, dtype=torch.bool)
    weight = torch.rand(4, 7, G, dtype=dtype) if weighted else None
    layer = dc.nn.Branch(chain(G), says((mask, weight)), returns=returns).to(dtype)
    masked = run(layer, x, "masked")
    monkeypatch.setattr("dyncore.nn.branch.gather_rows", None)
    auto = run(layer, x, "auto")
    torch.testing.assert_close(auto.out, masked.out)
    for name, grad in masked.grads.items():
        torch.testing.assert_close(auto.grads[name], grad, msg=name)


def test_flops_are_those_of_the_slots():
    x, index = torch.randn(20, D), torch.arange(20) % 4 - 1
    layer = dc.nn.Branch(chain(G), says(index))
    assert flops(lambda: layer(x)) == 15 * ROW
    assert flops(lambda: layer(x), "masked") == G * 20 * ROW
    x.requires_grad_()
    assert flops(lambda: layer(x).sum().backward()) == 3 * 15 * ROW


@pytest.mark.parametrize("mode", MODES)
def test_rows_of_a_branch_not_taken_may_hold_nan(mode):
    x, index = torch.randn(12, D), torch.arange(12) % 4 - 1
    weight = torch.rand(12)
    clean = run(dc.nn.Branch(branches := chain(G), says((index, weight))), x, mode)
    out = index < 0
    dirty_weight = torch.where(out, float("nan"), weight)
    dirty = run(dc.nn.Branch(branches, says((index, dirty_weight))), torch.where(out[:, None], float("nan"), x), mode)
    assert dirty.out[out].isnan().all()
    torch.testing.assert_close(dirty.out[~out], clean.out[~out])
    for name, grad in dirty.grads.items():
        torch.testing.assert_close(grad, clean.grads[name], msg=name)


def test_a_branch_that_nobody_takes_is_not_called_but_gets_a_gradient():
    layer = dc.nn.Branch(chain(G), says(torch.tensor([0, 0, 2])))
    layer.branches[1].forward = None
    grads = run(layer, torch.randn(3, D)).grads
    assert not grads["branches.1.0.weight"].any()
    assert grads["branches.2.0.weight"].any()


@pytest.mark.parametrize("mode", MODES)
def test_rows_may_be_samples_of_any_shape(mode):
    x, index = torch.randn(6, 3, 5, 4), torch.tensor([1, 0, -1, 1, 1, 0])
    branches = [nn.Conv2d(3, 3, 3, padding=1) for _ in range(2)]
    layer = dc.nn.Branch(branches, says(index))
    with dc.execution(mode), torch.no_grad():
        got = layer(x)
    for i, g in enumerate(index.tolist()):
        torch.testing.assert_close(got[i], x[i] if g < 0 else branches[g](x[i]).detach())


def test_weights_that_are_exactly_zero_are_not_computed():
    x, weight = torch.randn(8, D), torch.zeros(8, G)
    weight[2, 0], weight[5] = 0.5, torch.tensor([0.0, -1.0, 2.0])
    layer = dc.nn.Branch(chain(G), says(weight), returns="update")
    with torch.no_grad():
        torch.testing.assert_close(layer(x), by_hand(layer, x, weight != 0, weight))
    assert flops(lambda: layer(x)) == 3 * ROW


@pytest.mark.parametrize("gate", ["choice", "rectified"])
@pytest.mark.parametrize("returns", ["output", "update"])
def test_the_gradient_of_a_router_is_that_of_the_weighted_sum(gate, returns):
    make = {"choice": dc.nn.ChoiceGate, "rectified": dc.nn.RectifiedGate}[gate]
    layer = dc.nn.Branch(chain(G), make(D, G).eval(), returns=returns).double()
    x = torch.randn(11, D, dtype=torch.float64)
    grads = run(layer, x).grads
    weights = torch.randn(x.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    logits = layer.router.score(x)
    if gate == "choice":
        p = logits.softmax(-1) * nn.functional.one_hot(logits.argmax(-1), G)
    else:
        p = logits.tanh().relu()
    y = sum(p[:, g, None] * layer.branches[g](x).detach() for g in range(G))
    (want,) = torch.autograd.grad((y * weights).sum(), layer.router.score.weight)
    torch.testing.assert_close(grads["router.score.weight"], want)


def test_a_compute_target_teaches_a_router_to_close():
    x, layer = torch.randn(64, D), dc.nn.Branch(chain(G), dc.nn.RectifiedGate(D, G))
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.05)
    for _ in range(60):
        layer(x)
        optimizer.zero_grad()
        dc.nn.losses.compute_target(layer.last_cost, 0.1).backward()
        optimizer.step()
    layer(x)
    assert float(layer.last_cost.detach().mean()) < 0.25


def test_costs_weigh_the_branches():
    layer = dc.nn.Branch(chain(G), says(torch.tensor([0, 1, 2, -1])), costs=[1, 2, 5])
    layer(torch.randn(4, D))
    torch.testing.assert_close(layer.last_cost, torch.tensor([0.125, 0.25, 0.625, 0.0]))


@pytest.mark.parametrize(
    ("decision", "error", "message"),
    [
        (None, TypeError, "router: expected a bool mask, an integer index or float weights, or a pair, got NoneType"),
        ((torch.zeros(4).long(), 0.5), TypeError, "router: expected .* or a pair, got Tensor, float"),
        (
            (torch.rand(4, G), torch.rand(4, G)),
            TypeError,
            "router: .* integer index beside a weight, got torch.float32",
        ),
        ((torch.zeros(4).long(), torch.zeros(4).long()), TypeError, "weight of a floating dtype, got torch.int64"),
        (
            torch.zeros(4, G + 1, dtype=torch.bool),
            ValueError,
            r"expected shape \[\.\.\., 3\] .* \[4, 16\], got \[4, 4\]",
        ),
        (torch.zeros(5).long(), ValueError, r"expected shape \[\.\.\.\] with leading .* \[4, 16\], got \[5\]"),
        (torch.zeros(4, D).long(), ValueError, r"expected shape \[\.\.\.\] with leading .* \[4, 16\], got \[4, 16\]"),
        ((torch.zeros(4).long(), torch.rand(4, 1)), ValueError, r"a weight of shape \[4\], got \[4, 1\]"),
        (torch.tensor([0, 1, 2, 3]), IndexError, r"indices below 3 \(the number of modules\), got 3"),
    ],
)
def test_a_decision_that_does_not_fit_is_refused(decision, error, message):
    with pytest.raises(error, match=message):
        dc.nn.Branch(chain(G), says(decision))(torch.randn(4, D))


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: dc.nn.Branch([], says(0)), ValueError, "branches: expected at least one module, got none"),
        (lambda: dc.nn.Branch([None], says(0)), TypeError, r"branches\[0\]: expected a callable, got NoneType"),
        (lambda: dc.nn.Branch(chain(2), 1), TypeError, "router: expected a callable, got int"),
        (
            lambda: dc.nn.Branch(chain(2), says(0), exit="x"),
            ValueError,
            "exit: expected one of identity, zero, got 'x'",
        ),
        (
            lambda: dc.nn.Branch(chain(2), says(0), costs=[0, 0]),
            ValueError,
            "costs: expected numbers >= 0 with a positive",
        ),
        (
            lambda: dc.nn.Branch([nn.Linear(D, 3)], says(torch.zeros(4).long()))(torch.randn(4, D)),
            ValueError,
            r"branches\[0\]: expected an output of the shape of its input, \[4, 16\], got \[4, 3\]",
        ),
        (lambda: hierarchy(classes=[[0, 1], [1]]), ValueError, "classes: expected groups that hold 0..C-1, each once"),
        (
            lambda: hierarchy(classes=[[0], []]),
            ValueError,
            "classes: expected groups that hold 0..C-1, each once and none",
        ),
        (lambda: hierarchy(classes=[[0, 1, 2]]), ValueError, "fine: expected 1 modules, one a group, got 3"),
        (
            lambda: hierarchy(coarse=nn.Linear(D, 2))(torch.randn(4, D)),
            ValueError,
            r"coarse: expected logits \[4, 3\], got",
        ),
        (
            lambda: hierarchy(classes=[[0, 1, 2], [3, 4], [5]])(torch.randn(4, D), torch.zeros(4).long()),
            ValueError,
            r"fine\[0\]: expected logits \[4, 3\], got \[4, 2\]",
        ),
        (lambda: hierarchy()(torch.randn(4, D), torch.full((4,), 3)), IndexError, "group: expected indices below 3"),
    ],
)
def test_bad_arguments_are_named(make, error, message):
    with pytest.raises(error, match=message):
        make()


CLASSES = [[4, 1], [0, 2, 5], [3]]


def hierarchy(coarse=None, classes=CLASSES, **options):
    fine = [nn.Linear(D, 2), nn.Linear(D, 3), nn.Linear(D, 1)]
    return dc.nn.Hierarchy(coarse or nn.Linear(D, 3), fine, classes, **options)


def full(layer, x):
    """The hierarchical softmax with every classifier."""
    coarse, out = layer.coarse(x).log_softmax(1), torch.empty(len(x), 6, dtype=x.dtype)
    for g, group in enumerate(CLASSES):
        out[:, group] = coarse[:, g, None] + layer.fine[g](x).log_softmax(1)
    return out


@pytest.mark.parametrize("mode", MODES)
def test_a_hierarchy_at_threshold_zero_is_the_full_softmax(mode):
    layer, x = hierarchy(threshold=0.0).double(), torch.randn(9, D, dtype=torch.float64)
    with dc.execution(mode), torch.no_grad():
        torch.testing.assert_close(layer(x), full(layer, x))
    assert bool((layer.last_cost == 1).all())


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("threshold", [0.5, 1.0, 2.0])
def test_groups_that_did_not_run_share_their_probability(mode, threshold):
    layer, x = hierarchy(threshold=threshold).double(), torch.randn(40, D, dtype=torch.float64)
    with dc.execution(mode), torch.no_grad():
        got = layer(x)
        p, every = layer.coarse(x).softmax(1), full(layer, x)
    ran = p >= threshold * p.amax(1, keepdim=True)
    want = every.clone()
    for g, group in enumerate(CLASSES):
        spread = (p[:, g, None].log() - torch.tensor(float(len(group))).log()).expand(-1, len(group))
        want[:, group] = torch.where(ran[:, g, None], every[:, group], spread)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(got.exp().sum(1), torch.ones(40).double())
    torch.testing.assert_close(layer.last_cost, ran.float().mean(1))
    assert int(ran.sum()) == {0.5: int(ran.sum()), 1.0: 40, 2.0: 0}[threshold]


def test_only_the_classifiers_that_run_are_computed():
    layer, x = hierarchy(), torch.randn(30, D)
    executed = flops(lambda: layer(x))
    sizes = torch.tensor([2, 3, 1])
    counts = layer.last_plan.offsets.diff()
    assert executed == 2 * D * (30 * 3 + int((counts * sizes).sum()))
    assert int(counts.sum()) == 30


@pytest.mark.parametrize("mode", MODES)
def test_the_group_of_a_label_is_what_trains_its_classifier(mode):
    layer, x, y = hierarchy().double(), torch.randn(20, D, dtype=torch.float64), torch.arange(20) % 6
    assert [layer.group_of[c].item() for g in CLASSES for c in g] == [0, 0, 1, 1, 1, 2]
    with dc.execution(mode):
        loss = nn.functional.nll_loss(layer(x, layer.group_of[y]), y)
    loss.backward()
    grads = [p.grad.clone() for p in layer.parameters()]
    layer.zero_grad()
    nn.functional.nll_loss(full(layer, x), y).backward()  # the others' classifiers do not enter the loss
    for got, p in zip(grads, layer.parameters(), strict=True):
        torch.testing.assert_close(got, p.grad)


@torch.no_grad()
def test_a_hierarchy_compiles_copies_and_moves_its_threshold():
    layer, x = hierarchy(), torch.randn(25, D)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    costs = []
    for threshold in (0.0, 0.5, 0.9, 1.0, 1.5):
        layer.threshold = threshold
        torch.testing.assert_close(compiled(x), layer(x))
        costs.append(float(layer.last_cost.mean()))
    assert costs == sorted(costs, reverse=True)
    assert (costs[0], costs[-1]) == (1.0, 0.0)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert twin.last_plan is None
        assert torch.equal(twin(x), layer(x))
    assert hierarchy().load_state_dict(layer.state_dict())
    assert layer(x[:0]).shape == (0, 6)


def test_a_hierarchy_of_halves_gives_distributions():
    net = dc.nn.Hierarchy(nn.Linear(D, 2), [nn.Linear(D, 40), nn.Linear(D, 3)], [list(range(40)), [40, 41, 42]], 0.0)
    p = net.bfloat16()(torch.randn(9, D, dtype=torch.bfloat16)).exp().sum(1)
    torch.testing.assert_close(p, torch.ones(9), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("threshold", [float("nan"), None])
def test_a_hierarchy_wants_a_threshold_that_is_a_number(threshold):
    with pytest.raises((TypeError, ValueError), match="threshold: expected a number"):
        dc.nn.Hierarchy(nn.Linear(D, 1), [nn.Linear(D, 2)], [[0, 1]], threshold)
