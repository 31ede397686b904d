"""measure.activation_sparsity against brute force on masks that are known, and on models as people have them."""

import gc
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import dyncore as dc
from dyncore import masks
from dyncore.convert import relu_sparse
from dyncore.measure import activation_sparsity
from dyncore.measure.sparsity_verdict import Products, judge


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


class Given(nn.Module):
    """Hands what it is called with to a linear layer: the layer's zeros are the caller's."""

    def __init__(self, neurons, outputs=3):
        super().__init__()
        self.down = nn.Linear(neurons, outputs)

    def forward(self, h, attention_mask=None):
        return self.down(h)


def report_of(batches, neurons, **options):
    return activation_sparsity(Given(neurons), batches, layers=["down"], **options).layers["down"]


def skewed(rows, neurons, seed=0):
    mask = masks.beta(rows, neurons, a=0.4, b=2.0, dead=0.1, correlation=0.7, token_scale=0.5, generator=seeded(seed))
    return masks.activations(mask, generator=seeded(seed))


@pytest.fixture(scope="module")
def sequences():
    """Three batches [B, S, I] of 2, 3 and 1 sequences of 37 tokens."""
    return [h.unflatten(0, (-1, 37)) for h in skewed(6 * 37, 50).split([2 * 37, 3 * 37, 37])]


def test_counts_are_those_of_all_activations_together(sequences):
    layer = report_of(sequences, 50, hot_rate=0.4)
    fired = torch.cat([h.flatten(0, 1) for h in sequences]) != 0
    assert (layer.rows, layer.neurons) == fired.shape == (222, 50)
    assert layer.zero_fraction == pytest.approx(1 - fired.double().mean().item())
    assert torch.equal(layer.rates, fired.double().mean(0))
    assert layer.dead == (~fired.any(0)).double().mean().item() >= 0.1
    assert layer.hot == (fired.double().mean(0) >= 0.4).double().mean().item() > 0
    by_token = 1 - fired.double().mean(1)
    for q in (0, 0.05, 0.5, 0.95, 1):
        assert layer.token_quantile(q) == pytest.approx(by_token.quantile(q, interpolation="higher").item(), abs=0.021)
    assert layer.token_quantile(0) == pytest.approx(by_token.min().item())
    assert layer.token_quantile(1) == pytest.approx(by_token.max().item())


def test_gini_is_the_mean_difference_of_rates(sequences):
    layer = report_of(sequences, 50)
    rates = layer.rates
    assert layer.gini == pytest.approx(float((rates[:, None] - rates).abs().mean() / (2 * rates.mean())))
    one_of_ten = torch.zeros(20, 10)
    one_of_ten[:, 3] = 1
    assert report_of([one_of_ten], 10).gini == pytest.approx(0.9)
    assert report_of([torch.ones(5, 10)], 10).gini == pytest.approx(0.0)
    assert report_of([torch.zeros(5, 10)], 10).gini == 0


def jaccard(a, b):
    shared, both = int((a & b).sum()), int((a | b).sum())
    return shared / both if both else None


def test_jaccard_is_of_neighbours_within_a_sequence(sequences):
    layer = report_of(sequences, 50)
    pairs = [jaccard(s[i] != 0, s[i + 1] != 0) for h in sequences for s in h for i in range(36)]
    pairs = [p for p in pairs if p is not None]
    assert layer.jaccard_neighbours == pytest.approx(sum(pairs) / len(pairs))
    assert 0 < layer.jaccard_random < layer.jaccard_neighbours


def test_random_pairs_look_like_all_pairs():
    h = skewed(400, 60)
    fired = (h != 0).double()
    shared = fired @ fired.t()
    both = fired.sum(1)[:, None] + fired.sum(1) - shared
    a, b = torch.triu_indices(400, 400, 1)
    every = (shared / both)[a, b].nanmean().item()
    assert report_of([h], 60).jaccard_random == pytest.approx(every, abs=0.02)


def test_pairs_without_an_active_neuron_have_no_similarity():
    layer = report_of([torch.zeros(6, 4)], 4)
    assert (layer.jaccard_neighbours, layer.jaccard_random) == (None, None)


@pytest.mark.parametrize("cuts", [[222], [1] * 222, [5, 100, 3, 14, 64, 36], [127, 1, 94]])
def test_union_over_tiles_runs_on_across_batches(sequences, cuts):
    rows = torch.cat([h.flatten(0, 1) for h in sequences])
    layer = report_of(rows.split(cuts), 50, tiles=(1, 8, 32, 128, 500))
    for size in (1, 8, 32, 128):
        whole = (rows[: 222 // size * size] != 0).unflatten(0, (-1, size))
        assert layer.union[size] == pytest.approx(whole.any(1).double().mean().item())
    assert layer.union[500] is None
    assert layer.union[1] == pytest.approx(layer.density), (
        "a tile of one row needs the neurons that fire, as often as they fire"
    )


def test_independent_union_is_that_of_shuffled_tokens():
    h = skewed(4000, 60)[torch.randperm(4000, generator=seeded(5))]
    layer = report_of([h], 60, tiles=(8,))
    assert layer.independent_union(8) == pytest.approx(layer.union[8], abs=0.01)
    assert layer.independent_union(1) == pytest.approx(layer.density)


def test_nan_and_negative_values_are_not_zero_but_minus_zero_is():
    layer = report_of([torch.tensor([[math.nan, -1.0, -0.0, 0.0, math.inf]])], 5)
    assert layer.fired.tolist() == [1, 1, 0, 0, 1]


@pytest.mark.parametrize("flattened", [False, True])
def test_masked_rows_count_nowhere(sequences, flattened):
    keep = [torch.rand(h.shape[:2], generator=seeded(i)) < 0.7 for i, h in enumerate(sequences)]
    batches = [
        {"h": h.masked_fill(~k[..., None], math.nan).flatten(0, 1 if flattened else 0), "attention_mask": k.long()}
        for h, k in zip(sequences, keep, strict=True)
    ]
    layer = report_of(batches, 50, rows="attention_mask", tiles=(4,))
    rows = torch.cat([h[k] for h, k in zip(sequences, keep, strict=True)]) != 0
    assert layer.rows == len(rows)
    assert torch.equal(layer.fired, rows.sum(0))
    assert layer.union[4] == pytest.approx(rows[: len(rows) // 4 * 4].unflatten(0, (-1, 4)).any(1).double().mean())
    pairs = [
        jaccard(h[b, i] != 0, h[b, i + 1] != 0)
        for h, k in zip(sequences, keep, strict=True)
        for b, i in itertools.product(range(len(h)), range(36))
        if k[b, i] and k[b, i + 1]
    ]
    pairs = [p for p in pairs if p is not None]
    assert layer.jaccard_neighbours == pytest.approx(sum(pairs) / len(pairs))


def test_rows_may_be_chosen_by_a_callable(sequences):
    first = lambda batch, name: torch.arange(37).expand(len(batch), 37) < 5 if name == "down" else None  # noqa: E731
    layer = report_of(sequences, 50, rows=first)
    assert torch.equal(layer.fired, sum((h[:, :5] != 0).sum((0, 1)) for h in sequences))


def test_recorded_masks_are_those_of_the_first_rows(sequences, tmp_path):
    report = activation_sparsity(Given(50), sequences, layers=["down"], record_masks=100)
    rows = torch.cat([h.flatten(0, 1) for h in sequences]) != 0
    assert torch.equal(report.masks["down"], rows[:100])
    masks.save(tmp_path / "masks", report.masks, source="a test")
    assert torch.equal(masks.load(tmp_path / "masks").layers["down"], rows[:100])
    assert activation_sparsity(Given(50), sequences, layers=["down"]).masks == {}


# What is watched ------------------------------------------------------------------------------------------------------


class Block(nn.Module):
    """fc1, a functional ReLU, dropout, fc2, as OPT and many others have it; a GELU MLP; a gated one."""

    def __init__(self):
        super().__init__()
        self.alone = nn.Linear(8, 8)
        self.fc1, self.fc2 = nn.Linear(8, 30), nn.Linear(30, 8)
        self.smooth = nn.Sequential(nn.Linear(8, 20), nn.GELU(), nn.Linear(20, 8))
        self.rectified = nn.Sequential(nn.Linear(8, 40), nn.ReLU(), nn.Dropout(0.5), nn.Linear(40, 8))
        self.gated = nn.ModuleDict({name: nn.Linear(8, 24) for name in ("gate", "up")} | {"down": nn.Linear(24, 8)})
        self.mlp = dc.nn.MLP(8, 16, activation="reglu")
        self.unused = nn.Linear(8, 8)

    def forward(self, x):
        x = x + self.fc2(F.dropout(F.relu(self.fc1(x)), 0.9, self.training))
        x = x + self.rectified(self.smooth(x))
        x = x + self.gated["down"](F.relu(self.gated["gate"](x)) * self.gated["up"](x))
        return self.alone(F.relu(x + self.mlp(x)))


def test_inputs_of_linear_layers_behind_a_relu_are_found_with_the_products_around_them():
    report = activation_sparsity(Block(), [torch.randn(4, 9, 8) for _ in range(2)])
    kinds = {name: layer.products for name, layer in report.layers.items()}
    assert {name: p.kind for name, p in kinds.items()} == {
        "fc2": "mlp",
        "rectified.3": "mlp",
        "gated.down": "gated",
        "mlp.w_out": "gated",
        "alone": "linear",
    }
    assert (kinds["fc2"].inputs, kinds["fc2"].neurons, kinds["fc2"].outputs) == (8, 30, 8)
    assert report.unwatched["unused"] == "never called"
    assert report.unwatched["smooth.2"] == "0.0% zeros at its first call, watched from 10.0%"
    assert all(0.2 < layer.zero_fraction < 0.8 for layer in report.layers.values())  # dropout's zeros are not counted


def test_layers_are_chosen_by_name_or_by_predicate():
    model, batches = Block(), [torch.randn(4, 9, 8)]
    by_name = activation_sparsity(model, batches, layers=["smooth.2", "rectified.1"])
    assert list(by_name.layers) == ["smooth.2", "rectified.1"]
    assert by_name.layers["smooth.2"].zero_fraction == 0
    relu = by_name.layers["rectified.1"]  # its output
    assert torch.equal(relu.fired, activation_sparsity(model, batches).layers["rectified.3"].fired)
    chosen = activation_sparsity(model, batches, layers=lambda name, module: isinstance(module, nn.ReLU))
    assert list(chosen.layers) == ["rectified.1"]


def test_a_layer_called_several_times_is_counted_each_time():
    down = Given(6)
    model = lambda batch: (down(batch), down(batch))  # noqa: E731
    layer = activation_sparsity(down, [torch.ones(4, 6)], layers=["down"], call=model).layers["down"]
    assert layer.rows == 8


@pytest.mark.parametrize(("activation", "kind"), [("relu", "mlp"), ("relu2", "mlp"), ("reglu", "gated")])
def test_fused_modules_say_what_their_hidden_activation_is(activation, kind):
    model, x = nn.Sequential(dc.nn.SparseMLP(8, 32, activation=activation), nn.Linear(8, 2)), torch.randn(5, 8)
    report = activation_sparsity(model, [x])
    assert list(report.layers) == ["0"]
    assert torch.equal(report.layers["0"].fired, (model[0].hidden(x) != 0).sum(0))
    products = report.layers["0"].products
    assert (products.kind, products.inputs, products.neurons, products.outputs) == (kind, 8, 32, 8)
    assert list(report.unwatched) == ["1"]


def test_a_sparse_linear_layer_is_watched_as_a_linear_one_is():
    model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), dc.nn.SparseLinear(32, 8))
    x = torch.randn(5, 8)
    layer = activation_sparsity(model, [x]).layers["2"]
    assert torch.equal(layer.fired, (model[:2](x) > 0).sum(0))
    assert layer.products.kind == "mlp"


def test_torchs_own_encoder_layer_and_its_fast_path():
    layer = nn.TransformerEncoderLayer(16, 2, 64, activation="relu", batch_first=True)
    report = activation_sparsity(layer, [torch.randn(3, 7, 16)])
    assert list(report.layers) == ["linear2"]
    assert (report.layers["linear2"].rows, report.layers["linear2"].products.kind) == (21, "mlp")


def test_models_of_transformers_are_understood():
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 50, "hidden_size": 16, "ffn_dim": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    opt = transformers.OPTForCausalLM(transformers.OPTConfig(**sizes, word_embed_proj_dim=16, pad_token_id=1)).eval()
    ids = torch.randint(3, 50, (2, 9))
    padding = torch.ones_like(ids)
    padding[1, 6:] = 0
    batch = {"input_ids": ids, "attention_mask": padding}
    report = activation_sparsity(opt, [batch, batch], rows="attention_mask")
    assert [name.rsplit(".", 1)[1] for name in report.layers] == ["fc2", "fc2"]
    assert all((layer.rows, layer.products.kind) == (30, "mlp") for layer in report.layers.values())
    generated = activation_sparsity(opt, [ids], call=lambda i: opt.generate(i, max_new_tokens=4, do_sample=False))
    assert all(layer.rows == 2 * (9 + 3) for layer in generated.layers.values())
    for act, kind in (("relu", "mlp"), ("gated-relu", "gated")):
        sizes = {"vocab_size": 50, "d_model": 16, "d_kv": 8, "d_ff": 64, "num_layers": 1, "num_heads": 2}
        t5 = transformers.T5EncoderModel(transformers.T5Config(**sizes, feed_forward_proj=act))
        layers = activation_sparsity(t5, [{"input_ids": ids}]).layers
        assert [(name.rsplit(".", 1)[1], layer.products.kind) for name, layer in layers.items()] == [("wo", kind)]


@pytest.mark.parametrize("name", ["opt", "t5", "encoder layer"])
def test_a_converted_model_has_the_zeros_of_the_one_it_was(name):
    transformers = pytest.importorskip("transformers")
    if name == "opt":
        sizes = {"vocab_size": 50, "hidden_size": 16, "ffn_dim": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
        model = transformers.OPTForCausalLM(transformers.OPTConfig(**sizes, word_embed_proj_dim=16))
    elif name == "t5":
        sizes = {"vocab_size": 50, "d_model": 16, "d_kv": 8, "d_ff": 64, "num_layers": 1, "num_heads": 2}
        model = transformers.T5EncoderModel(transformers.T5Config(**sizes, feed_forward_proj="gated-relu"))
    else:
        model = nn.TransformerEncoderLayer(16, 2, 64, activation="relu", batch_first=True)
    batches = [torch.randn(3, 7, 16) if name == "encoder layer" else torch.randint(3, 50, (2, 9))]
    before = list(activation_sparsity(model, batches).layers.values())
    assert len(relu_sparse(model).swapped) == 1
    after = list(activation_sparsity(model, batches).layers.values())
    assert len(before) == len(after) == 1
    assert torch.equal(before[0].fired, after[0].fired)
    assert before[0].products == after[0].products


def test_the_model_is_left_as_it_was():
    model = Block()
    model.fc1.eval()
    modes = {name: module.training for name, module in model.named_modules()}

    def failing():
        yield torch.randn(2, 8)
        raise RuntimeError("no more data")

    with pytest.raises(RuntimeError, match="no more data"):
        activation_sparsity(model, failing())
    activation_sparsity(model, [torch.randn(2, 8)])
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert torch.is_grad_enabled()
    hooks = [len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules()]
    assert sum(hooks) == 0
    assert all(p.grad is None for p in model.parameters())


def test_memory_is_of_the_widths_whatever_the_number_of_batches():
    def tensors():
        gc.collect()
        return sum(t.numel() * t.element_size() for t in gc.get_objects() if type(t) is torch.Tensor)

    def held(count):
        before = tensors()
        report = activation_sparsity(model, (skewed(64, 50) for _ in range(count)), layers=["down"])
        assert report.layers["down"].rows == 64 * count
        return tensors() - before

    model = Given(50)
    held(2)  # what earlier tests have left goes now
    assert held(2) == held(40) <= 8 * (50 + 51)  # two counts


def test_no_activation_lives_while_the_next_batch_runs():
    import weakref

    seen = []

    class Watched(Given):
        def forward(self, h):
            own = h.clone()
            assert all(ref() is None for ref in seen)
            seen.append(weakref.ref(own))
            return self.down(own)

    activation_sparsity(Watched(10), [torch.relu(torch.randn(6, 10)) for _ in range(4)])
    assert len(seen) == 4


# Verdicts -------------------------------------------------------------------------------------------------------------


def products(kind, h=100, n=100, dtype=torch.float32):
    return Products(kind, 0 if kind == "linear" else h, 400, n, dtype, "cpu")


@pytest.fixture
def edge(monkeypatch):
    def set_to(value):
        monkeypatch.setattr("dyncore.break_even.dense_from", lambda *args: value)

    return set_to


@pytest.mark.parametrize(
    ("kind", "forward", "training"),
    [
        ("mlp", lambda r: 2 / (1 + r), lambda r: 6 / (1 + 5 * r)),
        ("gated", lambda r: 3 / (1 + 2 * r), lambda r: 9 / (1 + 8 * r)),
        ("linear", lambda r: 1 / r, lambda r: 3 / (1 + 2 * r)),
    ],
)
@pytest.mark.parametrize("density", [0.02, 0.1, 0.3])
def test_speedups_are_those_of_the_products_that_skip(edge, kind, forward, training, density):
    edge(0.4)
    verdict = judge(products(kind), density, lambda rows: density)
    assert verdict.speedups["forward"] == pytest.approx(forward(density / 0.4))
    assert verdict.speedups["training"] == pytest.approx(training(density / 0.4))
    assert verdict.speedups["decode, 1 row"] == pytest.approx(forward(density / 0.4))


def test_few_rows_are_bound_by_the_weights_that_some_row_needs(edge):
    edge(0.8)
    verdict = judge(products("mlp"), 0.1, lambda rows: 1 - 0.9**rows)
    assert verdict.speedups["decode, 1 row"] == pytest.approx(2 / (1 + 0.1 / 0.8))
    assert verdict.speedups["decode, 8 rows"] == pytest.approx(2 / (1 + 1 - 0.9**8))


@pytest.mark.parametrize("density", [0.4, 0.9])
def test_from_the_break_even_on_dense_execution_it_is(edge, density):
    edge(0.4)
    verdict = judge(products("mlp"), density, lambda rows: density)
    assert set(verdict.speedups.values()) == {1.0}
    assert str(verdict) == "dense: skipping pays nowhere"
    assert {verdict.execution(phase) for phase in verdict.speedups} == {"dense"}


def test_a_verdict_says_where_skipping_pays(edge, monkeypatch):
    monkeypatch.setattr("dyncore.break_even.dense_from", lambda device, op, rows, weights: 0.5 if rows == 1 else 0.0)
    verdict = judge(products("mlp"), 0.1, lambda rows: 0.1)
    assert str(verdict) == "skip: decode, 1 row 1.67x; dense: decode, 8 rows, forward, training"


def test_break_evens_are_asked_for_the_weights_as_they_are(monkeypatch):
    asked = []

    def dense_from(device, op, rows, weights):
        asked.append((device, op, rows, [(list(w.shape), w.dtype) for w in weights]))
        return 0.5

    monkeypatch.setattr("dyncore.break_even.dense_from", dense_from)
    judge(products("gated", 30, 20, torch.bfloat16), 0.1, lambda rows: 0.1)
    weights = [([800, 30], torch.bfloat16), ([20, 400], torch.bfloat16)]
    assert asked == [("cpu", "sparse_mlp", rows, weights) for rows in (1, 8, 1024, 1024)]
    asked.clear()
    judge(products("linear"), 0.1, lambda rows: 0.1)
    assert asked[0] == ("cpu", "sparse_linear", 1, [([100, 400], torch.float32)])


def test_nothing_is_promised_where_nothing_skips():
    for p in (products("mlp", dtype=torch.float64), Products("mlp", 8, 32, 8, torch.float32, "meta")):
        assert set(judge(p, 0.01, lambda rows: 0.01).speedups.values()) == {1.0}


def test_no_speedup_is_infinite(edge):
    edge(math.inf)
    verdict = judge(products("linear"), 0.0, lambda rows: 0.0)
    assert verdict.speedups["forward"] == pytest.approx(100)


# Errors ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "message", "arguments", "options"),
    [
        (TypeError, "model: expected a torch.nn.Module, got function", (lambda x: x, []), {}),
        (TypeError, "batches: expected an iterable of batches, got Tensor: put it", (Given(4), torch.ones(2, 4)), {}),
        (TypeError, "batches: expected an iterable of batches, got dict: put it", (Given(4), {}), {}),
        (ValueError, "batches: expected at least one, got none", (Given(4), []), {}),
        (
            ValueError,
            r"layers: expected names of model.named_modules\(\), got 'up'",
            (Given(4), []),
            {"layers": ["up"]},
        ),
        (
            TypeError,
            "layers: expected an iterable of names or a callable, got a str",
            (Given(4), []),
            {"layers": "down"},
        ),
        (TypeError, "tiles: expected a sequence of ints, got int: put it into a list", (Given(4), []), {"tiles": 8}),
        (ValueError, "tiles: expected ints >= 1, got 0", (Given(4), []), {"tiles": (1, 0)}),
        (ValueError, "min_zeros: expected a number from 0 to 1, got 10", (Given(4), []), {"min_zeros": 10}),
        (ValueError, "hot_rate: expected a number from 0 to 1, got nan", (Given(4), []), {"hot_rate": math.nan}),
        (ValueError, "record_masks: expected an int >= 0, got -1", (Given(4), []), {"record_masks": -1}),
        (
            ValueError,
            "rows: expected batches that are mappings with the key 'attention_mask'",
            (Given(4), [torch.ones(2, 4)]),
            {"rows": "attention_mask"},
        ),
        (
            ValueError,
            r"rows: expected a mask of the rows \[2\] of 'down', got \[3\]",
            (Given(4), [torch.ones(2, 4)]),
            {"rows": lambda batch, name: torch.ones(3)},
        ),
        (
            TypeError,
            "rows: expected a bool tensor, got list",
            (Given(4), [torch.ones(2, 4)]),
            {"rows": lambda batch, name: [True, False]},
        ),
    ],
)
def test_wrong_arguments_are_refused_by_name(error, message, arguments, options):
    with pytest.raises(error, match=message):
        activation_sparsity(*arguments, **options)
