"""SparseMLP and SparseLinear: the dense layers' numbers, names and habits; what from_dense takes, and what it refuses."""

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import dyncore as dc
from dyncore.nn import MLP, SparseLinear, SparseMLP

DIM, HIDDEN = 12, 40


class Gated(nn.Module):
    """T5's gated form: gate, up, and a dropout on the hidden layer."""

    def __init__(self, bias=False):
        super().__init__()
        self.wi_0, self.wi_1 = nn.Linear(DIM, HIDDEN, bias=bias), nn.Linear(DIM, HIDDEN, bias=False)
        self.wo = nn.Linear(HIDDEN, DIM, bias=bias)
        self.dropout, self.act = nn.Dropout(0.1), nn.ReLU()

    def forward(self, x):
        return self.wo(self.dropout(self.act(self.wi_0(x)) * self.wi_1(x)))


class Block(nn.Module):
    """The usual two layers, by functions, with a dropout on the output."""

    def __init__(self, dim=DIM, activation=F.relu):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(dim, HIDDEN), nn.Linear(HIDDEN, dim)
        self.activation_fn, self.drop = activation, nn.Dropout(0.2)

    def forward(self, x):
        return self.drop(self.fc2(self.activation_fn(self.fc1(x))))


class HiddenDropout(Block):
    """A dropout that no module shows."""

    def forward(self, x):
        return self.fc2(F.dropout(self.activation_fn(self.fc1(x)), 0.3, self.training))


class Scaled(Block):
    def forward(self, x):
        return 2 * super().forward(x)


def sequential(*between, out=DIM, bias=True):
    return nn.Sequential(nn.Linear(DIM, HIDDEN, bias=bias), *between, nn.Linear(HIDDEN, out, bias=bias))


DENSE = {
    "sequential": lambda: sequential(nn.ReLU()),
    "sequential_without_bias": lambda: sequential(nn.ReLU(), bias=False),
    "sequential_in_place": lambda: sequential(nn.ReLU(inplace=True), nn.Identity()),
    "sequential_with_dropout": lambda: nn.Sequential(*sequential(nn.ReLU(), nn.Dropout(0.3)), nn.Dropout(0.2)),
    "mlp_relu": lambda: MLP(DIM, HIDDEN, activation="relu"),
    "mlp_relu2": lambda: MLP(DIM, HIDDEN, activation="relu2", bias=False),
    "mlp_reglu": lambda: MLP(DIM, HIDDEN, activation="reglu"),
    "gated": lambda: Gated(),
    "gated_with_bias": lambda: Gated(bias=True),
    "block": lambda: Block(),
}


@pytest.fixture(params=DENSE)
def dense(request):
    return DENSE[request.param]()


def results(module, x, mode="sparse"):
    """The output and every gradient by name, from one seed."""
    x = x.detach().requires_grad_()
    torch.manual_seed(3)
    with dc.execution(mode):
        out = module(x)
    grads = torch.autograd.grad(out.sin().sum(), [x, *module.parameters()])
    return dict(zip(("out", "x", *dict(module.named_parameters())), (out, *grads), strict=True))


def assert_same(got, want, **tolerance):
    assert got.keys() == want.keys()
    for name in want:
        torch.testing.assert_close(got[name], want[name], **tolerance)


def last_of(layer):
    (last,) = (m for m in layer.modules() if isinstance(m, SparseLinear))
    return last


def assert_laid_out(layer):
    """The output weight neuron-major, a gate and its up side by side."""
    weight = last_of(layer).weight
    assert isinstance(weight, nn.Parameter)
    assert weight.stride() == (1, weight.shape[0])
    if hasattr(layer, "wi_1"):
        assert layer.wi_1.weight.data_ptr() == layer.wi_0.weight.data_ptr() + layer.wi_0.weight.nbytes


@pytest.mark.parametrize("mode", ["sparse", "masked", "auto"])
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_from_dense_has_the_numbers_and_gradients_of_the_layer_it_replaces(dense, training, mode):
    dense.train(training)
    x = torch.randn(3, 5, DIM)
    want = results(dense, x)
    layer = SparseMLP.from_dense(dense)
    assert layer.training is training
    assert all(m.training is training for m in layer.modules())
    assert_same(results(layer, x, mode), want)
    assert_same(results(dense, x), want)  # which still works, too


def test_the_state_dict_is_that_of_the_layer_replaced(dense):
    before = {name: t.clone() for name, t in dense.state_dict().items()}
    parameters = dict(dense.named_parameters())
    layer = SparseMLP.from_dense(dense)
    after = layer.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[n], before[n]) for n in before)
    assert all(p is parameters[n] for n, p in layer.named_parameters())  # the optimizer's own
    assert_laid_out(layer)
    other = {name: (0.1 * torch.randn_like(t)).contiguous() for name, t in before.items()}
    layer.load_state_dict(other, strict=True)
    assert_laid_out(layer)
    fresh = copy.deepcopy(dense)
    fresh.load_state_dict(layer.state_dict(), strict=True)
    assert_same(results(layer.eval(), torch.ones(4, DIM)), results(fresh.eval(), torch.ones(4, DIM)))
    layer.load_state_dict({n: t.clone() for n, t in before.items()}, strict=True, assign=True)
    assert_laid_out(layer)
    dense.load_state_dict(before)
    assert_same(results(layer, torch.ones(4, DIM)), results(dense.eval(), torch.ones(4, DIM)))


def saved_and_loaded(layer):
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize(
    "copied",
    [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), saved_and_loaded, lambda m: m.double().float()],
    ids=["deepcopy", "pickle", "torch_save", "to"],
)
def test_copies_keep_the_layout_and_the_numbers(dense, copied):
    layer, x = SparseMLP.from_dense(dense.eval()), torch.randn(4, DIM)
    want = results(layer, x)
    other = copied(layer)
    assert_laid_out(other)
    assert_same(results(other, x), want)
    with torch.no_grad():
        torch.testing.assert_close(other(x), want["out"])


@pytest.mark.parametrize("activation", ["relu", "relu2", "reglu"])
@pytest.mark.parametrize("bias", [False, True])
def test_a_layer_of_its_own_is_the_dense_mlp_in_names_and_initialisation(activation, bias):
    torch.manual_seed(1)
    layer = SparseMLP(DIM, HIDDEN, activation=activation, bias=bias)
    torch.manual_seed(1)
    dense = MLP(DIM, HIDDEN, activation=activation, bias=bias)
    assert_laid_out(layer)
    x = torch.randn(2, 3, DIM)
    assert_same(results(layer, x), results(dense, x))
    dense.load_state_dict(layer.state_dict(), strict=True)
    torch.testing.assert_close(layer(x[0, 0]), dense(x[0, 0]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_narrow_dtypes(dtype):
    layer = SparseMLP.from_dense(Gated().to(dtype))
    x = torch.randn(9, DIM).to(dtype)
    assert_laid_out(layer)
    with torch.no_grad(), dc.execution("sparse"):
        wide = copy.deepcopy(layer).float().eval()
        torch.testing.assert_close(layer.eval()(x).float(), wide(x.float()), rtol=2e-2, atol=1e-2)


def test_an_output_layer_kept_in_float32_as_t5_does():
    dense = Gated().half().eval()
    dense.wo.float()
    dense.forward = lambda x: dense.wo(dense.dropout(dense.act(dense.wi_0(x)) * dense.wi_1(x)).float())
    x = torch.randn(5, DIM).half()
    want = dense(x)
    del dense.forward
    layer = SparseMLP(DIM, HIDDEN)
    layer = layer._take(dense, layer._parts._replace(first="wi_0", up="wi_1", last="wo", activation="reglu"))
    out = layer(x)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, want, rtol=2e-3, atol=2e-3)


def total_flops(fn):
    with FlopCounterMode(display=False) as counter:
        fn()
    return counter.get_total_flops()


def test_an_active_dropout_computes_the_hidden_layer_and_skips_below_it():
    layer = SparseMLP.from_dense(DENSE["sequential_with_dropout"]())
    x = torch.randn(50, DIM)
    with dc.execution("sparse"):
        on = int((layer.get_submodule("0")(x) > 0).sum())
        assert total_flops(lambda: layer.eval()(x)) == 2 * DIM * (50 * HIDDEN + on)
        dropped = total_flops(lambda: layer.train()(x))
        assert 2 * DIM * 50 * HIDDEN < dropped < 2 * DIM * (50 * HIDDEN + 0.85 * on)  # 30% of the rest is dropped


@pytest.mark.parametrize("save", ["compressed", "dense", "recompute"])
def test_what_is_saved_for_the_backward_is_what_was_asked_for(save):
    layer = SparseMLP(DIM, 1024, save=save)
    with torch.no_grad():
        layer.w_in.bias.fill_(-1.2)  # some 3% are on
    sizes = {}

    def pack(t):
        sizes[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t), dc.execution("sparse"):
        layer(torch.randn(64, DIM))
    hidden = 64 * 1024 * 4
    low, high = {"compressed": (hidden / 32, hidden / 8), "dense": (hidden, hidden), "recompute": (4096, 4096)}[save]
    inputs = 64 * DIM * 4 + layer.w_in.weight.nbytes + layer.w_out.weight.nbytes
    assert low <= sum(sizes.values()) - inputs <= high


@pytest.mark.parametrize("name", DENSE)
def test_hidden_and_project_are_the_mlp_in_two_steps(name):
    layer, x = SparseMLP.from_dense(DENSE[name]().eval()), torch.randn(6, DIM)
    with dc.execution("sparse"):
        h = layer.hidden(x)
        assert h.shape == (6, HIDDEN)
        torch.testing.assert_close(layer.project(h), layer(x))


def test_hooks_and_adapters_on_the_layers_inside_are_obeyed():
    layer = SparseMLP.from_dense(sequential(nn.ReLU()))
    x, seen = torch.randn(6, DIM), []
    want = layer(x)
    handle = layer.get_submodule("2").register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    torch.testing.assert_close(layer(x), want)
    assert (seen[0] == 0).any()
    handle.remove()
    layer(x)
    assert len(seen) == 1

    class Adapter(nn.Module):
        def __init__(self, base):
            super().__init__()
            self.base = base
            self.weight = base.weight

        def forward(self, t):
            return self.base(t) + 1

    layer.add_module("0", Adapter(layer.get_submodule("0")))
    torch.testing.assert_close(
        layer(x), layer.get_submodule("2")(torch.relu(layer.get_submodule("0")(x))), rtol=1e-5, atol=1e-5
    )
    assert not torch.allclose(layer(x), want)


@pytest.mark.parametrize("name", ["sequential", "gated", "mlp_relu2"])
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_as_one_graph(name, dynamic):
    torch._dynamo.reset()
    layer = SparseMLP.from_dense(DENSE[name]().eval())
    compiled = torch.compile(layer, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    x = torch.randn(4, DIM)
    assert_same(
        results(compiled, x), {k if k in ("out", "x") else f"_orig_mod.{k}": v for k, v in results(layer, x).items()}
    )
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), layer(x))


def test_exports():
    layer = SparseMLP.from_dense(Gated().eval())
    batch = torch.export.Dim("batch", min=2, max=64)
    exported = torch.export.export(layer, (torch.randn(4, DIM),), dynamic_shapes={"x": {0: batch}})
    x = torch.randn(7, DIM)
    torch.testing.assert_close(exported.module()(x), layer(x))


@pytest.mark.parametrize("options", [{"foreach": False}, {"foreach": True}, {"fused": True}], ids=str)
def test_training_steps_and_autocast(options):
    dense = Gated()
    layer = SparseMLP.from_dense(copy.deepcopy(dense))
    x, y = torch.randn(64, DIM), torch.randn(64, DIM)
    losses = []
    for model in (layer.eval(), dense.eval()):
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, **options)
        for _ in range(20):
            loss = F.mse_loss(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        losses.append(float(loss.detach()))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert model(x).dtype == torch.bfloat16
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    assert_laid_out(layer)


def test_the_meta_device_and_from_it():
    with torch.device("meta"):
        layer = SparseMLP.from_dense(sequential(nn.ReLU()).eval())
    assert layer(torch.randn(3, DIM, device="meta")).shape == (3, DIM)
    layer = layer.to_empty(device="cpu")
    dense = sequential(nn.ReLU())
    layer.load_state_dict(dense.state_dict())
    assert_laid_out(layer)
    x = torch.randn(3, DIM)
    torch.testing.assert_close(layer(x), dense(x))


class Quantized(nn.Linear):
    pass


def tied():
    module = Gated()
    module.wi_1.weight = module.wi_0.weight
    return module


def hooked(where):
    module = sequential(nn.ReLU())
    module.get_submodule(where).register_forward_hook(lambda *args: None)
    return module


def patched():
    module = sequential(nn.ReLU())
    module.forward = lambda x: x
    return module


def part_of_a_buffer():
    module = sequential(nn.ReLU())
    flat = torch.randn(2 * HIDDEN * DIM)
    module[0].weight.data = flat[: HIDDEN * DIM].view(HIDDEN, DIM)
    return module


def parametrized():
    module = sequential(nn.ReLU())
    torch.nn.utils.parametrizations.weight_norm(module[2])
    return module


def complex_weights():
    module = sequential(nn.ReLU())
    module[0].weight = nn.Parameter(torch.randn(HIDDEN, DIM, dtype=torch.complex64))
    return module


def with_more(kind):
    module = Block()
    if kind == "buffer":
        module.register_buffer("scale", torch.ones(1))
    else:
        module.norm = nn.LayerNorm(DIM)
    return module


class Named(nn.Sequential):
    def forward(self, x):
        return super().forward(x) + 1


class Subclass(torch.Tensor):
    pass


def subclassed_weight():
    module = sequential(nn.ReLU())
    module[0].weight = nn.Parameter(torch.randn(HIDDEN, DIM).as_subclass(Subclass))
    return module


class Two(Block):
    def forward(self, x, y):
        return super().forward(x + y)


REFUSED = {
    "expected Sequential(Linear, ReLU, [Dropout,] Linear [, Dropout]), got Sequential(Linear, GELU, Linear)": lambda: sequential(nn.GELU()),
    "got Sequential(Linear, LayerNorm, ReLU, Linear)": lambda: sequential(nn.LayerNorm(HIDDEN), nn.ReLU()),
    "2: expected an nn.Dropout, got AlphaDropout": lambda: sequential(nn.ReLU(), nn.AlphaDropout()),
    "expected a ReLU, its square or a gate by it, got gelu": lambda: MLP(DIM, HIDDEN),
    "expected a ReLU, its square or a gate by it, got silu": lambda: Block(activation=F.silu),
    "expected one of the activations": lambda: Block(activation=torch.tanh),
    "module: expected weights [40, 12], [12, 40], got [40, 12], [5, 40]": lambda: sequential(nn.ReLU(), out=5),
    "module: expected Linear layers named wi_0/wi_1/wo": lambda: nn.Linear(DIM, DIM),
    "0: expected an nn.Linear, got Quantized": lambda: nn.Sequential(Quantized(DIM, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, DIM)),
    "2: expected an nn.Linear, got ParametrizedLinear": parametrized,
    "0: expected a plain Parameter as weight, got": subclassed_weight,
    "0: expected a weight with memory of its own": part_of_a_buffer,
    "0: expected a floating dtype of 16, 32 or 64 bits, got torch.complex64": lambda: complex_weights(),
    "expected Parameters of their own in wi_0, wi_1, wo, got tied ones": tied,
    "expected nothing that hangs on it, got hooks on 2": lambda: hooked("2"),
    "expected nothing that hangs on it, got hooks on 1": lambda: hooked("1"),
    "expected nothing that hangs on it, got a forward that was put over its class's": patched,
    "expected Sequential's own forward, got that of Named": lambda: Named(*sequential(nn.ReLU())),
    "expected no parameters or buffers but those of its layers, got scale": lambda: with_more("buffer"),
    "but those of its layers, got norm.weight, norm.bias": lambda: with_more("norm"),
    "got HiddenDropout whose outputs in training (with drop dropping) are": HiddenDropout,
    "got Scaled whose outputs in evaluation are": Scaled,
    "expected one that maps rows [8, 12], got TypeError": Two,
}  # fmt: skip


@pytest.mark.parametrize("message", REFUSED)
def test_what_is_no_such_mlp_is_refused_with_the_reason(message):
    module = REFUSED[message]()
    strides = [p.stride() for p in module.parameters()]
    with pytest.raises(ValueError) as error:
        SparseMLP.from_dense(module)
    assert message in str(error.value)
    assert [p.stride() for p in module.parameters()] == strides
    assert all(m.training for m in module.modules())


def test_bad_arguments_name_themselves():
    with pytest.raises(TypeError, match="module: expected a module, got int"):
        SparseMLP.from_dense(3)
    with pytest.raises(ValueError, match="save: expected one of compressed, dense, recompute, got 'all'"):
        SparseMLP.from_dense(sequential(nn.ReLU()), save="all")
    with pytest.raises(ValueError, match="activation: expected one of relu, relu2, reglu, got 'gelu'"):
        SparseMLP(DIM, HIDDEN, activation="gelu")
    with pytest.raises(ValueError, match=r"x: expected shape \[\.\.\., 12\], got \[3, 13\]"):
        SparseMLP(DIM, HIDDEN)(torch.randn(3, 13))
    with pytest.raises(TypeError, match="x: expected a Tensor, got list"):
        SparseMLP(DIM, HIDDEN)([1.0])
    with pytest.raises(TypeError, match="h: expected a Tensor, got list"):
        SparseLinear(HIDDEN, DIM)([1.0])


# SparseLinear ---------------------------------------------------------------------------------------------------------


def test_a_sparse_linear_is_a_linear_layer_for_any_input():
    torch.manual_seed(1)
    layer = SparseLinear(HIDDEN, DIM)
    torch.manual_seed(1)
    dense = nn.Linear(HIDDEN, DIM)
    assert_laid_out(layer)
    for h in (torch.relu(torch.randn(3, 4, HIDDEN)), torch.randn(5, HIDDEN)):
        h.requires_grad_()
        assert_same(results(layer, h), results(dense, h))
    torch.testing.assert_close(layer(h[0]), dense(h[0]))
    shared = SparseLinear.from_dense(dense)
    assert shared.weight is dense.weight
    assert list(shared.state_dict()) == list(dense.state_dict())
    assert repr(shared) == repr(layer)


def test_a_weight_may_be_stored_like_any_other():
    layer = SparseMLP.from_dense(Gated())
    x, weight = torch.randn(5, DIM), layer.wo.weight
    want = results(layer.eval(), x)
    layer.wo.lay_out(neuron_major=False)
    assert layer.wo.weight is weight
    for other in (layer, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert all(p.is_contiguous() for p in other.parameters())
        torch.nn.utils.parameters_to_vector(other.parameters())
        assert_same(results(other, x), want)
    layer.wo.lay_out(neuron_major=True)
    assert_laid_out(layer)


def test_bad_sizes_and_layouts_name_themselves():
    for make, name in (
        (lambda n: SparseMLP(n, 8), "dim"),
        (lambda n: SparseMLP(8, n), "hidden_dim"),
        (lambda n: SparseLinear(n, 8), "in_features"),
        (lambda n: SparseLinear(8, n), "out_features"),
    ):
        with pytest.raises(ValueError, match=f"^{name}: expected an int >= 1, got 0"):
            make(0)
        with pytest.raises(TypeError, match=f"^{name}: expected an int >= 1, got float"):
            make(8.0)
    with pytest.raises(TypeError, match="neuron_major: expected a bool, got str"):
        SparseLinear(8, 8).lay_out("yes")


def test_from_dense_says_that_a_layer_is_sparse_already_and_which_dropout_differs():
    layer = SparseMLP(8, 16)
    converted = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), SparseLinear(16, 8))
    for module in (layer, converted):
        with pytest.raises(ValueError, match=f"got {type(module).__name__}, which is already sparse"):
            SparseMLP.from_dense(module)

    class DropsItsInput(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc1, self.act, self.drop, self.fc2 = nn.Linear(8, 16), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, 8)

        def forward(self, x):
            return self.fc2(self.act(self.fc1(self.drop(x))))

    with pytest.raises(ValueError, match=r"outputs in training \(with drop dropping\) are"):
        SparseMLP.from_dense(DropsItsInput())
