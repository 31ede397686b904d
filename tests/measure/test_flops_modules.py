"""Flops: by module, forward and backward, and the ops that nothing counts."""

import copy
import json
import pickle

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import dyncore as dc

ROWS, D = 5, 3
LINEAR = 2 * ROWS * D * D


class Net(nn.Module):
    """Calls a module, another through a checkpoint if told, and one in a container that is never called."""

    def __init__(self, reentrant=None):
        super().__init__()
        self.first = nn.Linear(D, D)
        self.middle = nn.Sequential(nn.Linear(D, D), nn.ReLU(), nn.Linear(D, D))
        self.blocks = nn.ModuleList([nn.Linear(D, D), nn.Linear(D, D)])
        self.reentrant = reentrant

    def forward(self, x):
        x = self.first(x)
        if self.reentrant is None:
            x = self.middle(x)
        else:
            x = checkpoint(self.middle, x, use_reentrant=self.reentrant)
        return self.blocks[0](x)

    def train_step(self, x):
        self(x).square().sum().backward()


@pytest.fixture
def x():
    return torch.randn(ROWS, D)


def test_a_module_has_what_ran_inside_it_and_one_that_did_nothing_has_0(x):
    found = dc.measure.flops(Net(), x)
    assert found == 4 * LINEAR
    assert found.by_module == {
        "": 4 * LINEAR,
        "first": LINEAR,
        "middle": 2 * LINEAR,
        "middle.0": LINEAR,
        "middle.1": 0,
        "middle.2": LINEAR,
        "blocks": LINEAR,
        "blocks.0": LINEAR,
        "blocks.1": 0,
    }
    assert found.backward == 0
    assert found.uncounted == {}


def test_a_module_s_method_is_counted_by_module_and_any_other_callable_as_a_whole(x):
    net = Net()
    assert dc.measure.flops(net.train_step, x).by_module["middle.2"] == 3 * LINEAR
    assert dc.measure.flops(lambda: net(x)).by_module == {"": 4 * LINEAR}


@pytest.mark.parametrize(
    ("reentrant", "again"), [(None, {}), (True, {"middle.0": 1, "middle.2": 1}), (False, {"middle.0": 1})]
)
def test_backward_passes_belong_to_the_modules_of_their_forward(x, reentrant, again):
    """What a checkpoint runs again, without reentrance only until it has what it needs, is its module's, too."""
    found = dc.measure.flops(Net(reentrant).train_step, x)
    want = {"first": 2, "middle.0": 3, "middle.2": 3, "blocks.0": 3}  # x wants no gradient
    want = {name: count + again.get(name, 0) for name, count in want.items()}
    want["middle"] = want["middle.0"] + want["middle.2"]
    want["blocks"] = want["blocks.0"]
    want[""] = 5 + want["middle"]
    assert {name: count / LINEAR for name, count in found.by_module.items() if count} == want
    assert found.backward == found - 4 * LINEAR


def test_branches_do_not_mix_their_backward_passes(x):
    class Branches(nn.Module):
        def __init__(self):
            super().__init__()
            self.wide, self.thin = nn.Linear(D, 100), nn.Linear(D, 1)

        def forward(self, x):
            (self.wide(x).sum() + self.thin(x).sum()).backward()

    found = dc.measure.flops(Branches(), x.requires_grad_())
    assert found.by_module == {"": 3 * 2 * ROWS * D * 101, "wide": 3 * 2 * ROWS * D * 100, "thin": 3 * 2 * ROWS * D}


def test_a_forward_that_fails_leaves_no_hook_and_no_module_behind(x):
    class Fails(nn.Module):
        def forward(self, x):
            raise RuntimeError("no")

    class Goes(Net):
        def __init__(self):
            super().__init__()
            self.fails = Fails()

        def forward(self, x):
            with pytest.raises(RuntimeError, match="no"):
                self.fails(x)
            return super().forward(x)

    found = dc.measure.flops(Goes(), x)
    assert found.by_module["fails"] == 0
    assert found.by_module["first"] == LINEAR
    with pytest.raises(RuntimeError, match="no"):
        dc.measure.flops(Fails(), x)
    assert not nn.modules.module._global_forward_hooks
    assert not nn.modules.module._global_forward_pre_hooks


def test_a_dynamic_layer_s_share_is_that_of_the_rows_that_ran(x):
    net = nn.Sequential(nn.Linear(D, D), dc.nn.Skip(nn.Linear(D, D), lambda x: torch.arange(ROWS) < 2))
    assert dc.measure.flops(net, x).by_module["1.module"] == 2 * 2 * D * D


@torch.library.custom_op("dyncore_test_flops::twice", mutates_args=())
def twice(x: torch.Tensor) -> torch.Tensor:
    return x @ x + x @ x


twice.register_autograd(lambda ctx, grad: grad @ grad)


def test_an_unknown_op_is_uncounted_and_not_free():
    x = torch.randn(4, 4, requires_grad=True)
    found = dc.measure.flops(lambda: (twice(x) + twice(x)).sum().backward())
    assert found.uncounted == {"dyncore_test_flops::twice": 2}
    assert found == found.backward == 2 * 2 * 4 * 4 * 4
    assert "uncounted: dyncore_test_flops::twice x2" in found.table()


def test_an_op_of_ops_that_can_be_seen_is_counted():
    with torch.library._scoped_library("dyncore_test_made_of", "DEF") as library:
        library.define("others(Tensor x) -> Tensor")
        library.impl("others", lambda x: x @ x, "CompositeImplicitAutograd")
        with torch.no_grad():
            found = dc.measure.flops(torch.ops.dyncore_test_made_of.others, torch.randn(4, 4))
    assert (found, found.uncounted) == (2 * 4**3, {})


@pytest.mark.parametrize(
    ("run", "name"),
    [
        (lambda x: torch.linalg.inv(x), "aten::linalg_inv_ex"),
        (lambda x: torch.linalg.svd(x), "aten::_linalg_svd"),
        (lambda x: torch.fft.fft(x), "aten::_fft_r2c"),
        (lambda x: torch.sparse.mm(x.to_sparse(), x.to_sparse()), "aten::_sparse_sparse_matmul"),
        (lambda x: torch.cholesky_inverse(x), "aten::cholesky_inverse"),
    ],
)
@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
def test_torch_s_own_heavy_ops_without_formula_are_uncounted(run, name):
    assert dc.measure.flops(run, torch.eye(4) + 1).uncounted == {name: 1}


def test_what_only_moves_or_transforms_elements_is_free_and_known():
    x = torch.randn(4, 4, requires_grad=True)

    def light():
        y = torch.softmax(nn.functional.layer_norm(x.relu().t().contiguous(), (4,)), 0)
        (torch.linalg.vector_norm(y) + y.cumsum(0).sort(0).values.sum()).backward()

    found = dc.measure.flops(light)
    assert (found, found.uncounted) == (0, {})


def test_a_flops_is_an_int_that_can_be_copied_and_written(x):
    found = dc.measure.flops(Net(), x)
    assert isinstance(found, int)
    assert (str(found), json.dumps(found), f"{found:,}") == ("360", "360", "360")
    for same in (copy.deepcopy(found), pickle.loads(pickle.dumps(found))):
        assert same == found
        assert same.by_module == found.by_module
    assert type(found + found) is int


def test_the_table_names_modules_that_did_something(x):
    found = dc.measure.flops(Net().train_step, x)
    lines = found.table().splitlines()
    assert lines[1].split() == ["total", "990", "100.0%"]
    assert [line.split()[0] for line in lines[2:-1]] == [
        "first",
        "middle",
        "middle.0",
        "middle.2",
        "blocks",
        "blocks.0",
    ]
    assert lines[-1] == "of these 630 in the backward pass"
    assert [line.split()[0] for line in found.table(depth=1).splitlines()[2:-1]] == ["first", "middle", "blocks"]
