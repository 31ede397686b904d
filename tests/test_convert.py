"""dyncore.convert.relu_sparse: the same model, names and numbers afterwards, fewer FLOPs, and a report that says why."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import dyncore as dc
from dyncore.nn import MLP, SparseLinear, SparseMLP


def total_flops(fn):
    with FlopCounterMode(display=False) as counter:
        fn()
    return counter.get_total_flops()


def results(model, loss):
    """The loss and the gradient of every parameter, by name, from one seed."""
    torch.manual_seed(5)
    out = loss(model)
    grads = torch.autograd.grad(out, list(model.parameters()), allow_unused=True)
    return {"loss": out, **dict(zip(dict(model.named_parameters()), grads, strict=True))}


def assert_same(got, want):
    """To rounding: some gradients (of a key's bias) are 0 but for it, so that each is measured by the largest, too."""
    assert got.keys() == want.keys()
    sizes = {name: float(t.detach().square().mean().sqrt()) for name, t in want.items() if t is not None}
    floor = 1e-3 * max(sizes.values())
    for name, size in sizes.items():
        error = float((got[name] - want[name]).detach().square().mean().sqrt())
        assert error <= 5e-5 * max(size, floor), f"{name}: RMS error {error:.1e} where the RMS is {size:.1e}"
    assert [n for n, t in got.items() if t is None] == [n for n, t in want.items() if t is None]


def kinds(report):
    return [(s.name, s.was, s.now, s.activation, s.shape) for s in report.swapped]


def check(model, loss, expected, kept=()):
    """Convert `model`: gradients in evaluation and training, names and copies stay; the report is as expected."""
    twin = copy.deepcopy(model)
    parameters = dict(model.named_parameters())
    with dc.execution("sparse"):
        report = dc.convert.relu_sparse(model)
        assert kinds(report) == expected
        assert [(k.name, k.kind) for k in report.kept] == list(kept)
        for train in (False, True):
            assert_same(results(model.train(train), loss), results(twin.train(train), loss))
        assert list(model.state_dict()) == list(twin.state_dict())
        assert all(p is parameters[n] for n, p in model.named_parameters())
        model.load_state_dict(twin.state_dict(), strict=True)
        twin.load_state_dict(model.state_dict(), strict=True)
        want = results(twin.eval(), loss)
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert_same(results(other.eval(), loss), want)
        again = dc.convert.relu_sparse(model)
        assert again.swapped == ()
        done = [k.name for k in again.kept if k.reason == "already sparse"]
        assert sorted(done) == sorted(s[0] for s in expected)
        assert [(k.name, k.kind) for k in again.kept if k.name not in done] == list(kept)
    return twin


# transformers ---------------------------------------------------------------------------------------------------------

TOKENS = torch.arange(14).view(2, 7) * 5 % 90 + 3


@pytest.fixture(scope="module")
def transformers():
    module = pytest.importorskip("transformers")
    module.logging.disable_progress_bar()
    return module


def opt(transformers, **options):
    config = transformers.OPTConfig(
        vocab_size=99, hidden_size=32, num_hidden_layers=2, ffn_dim=128, num_attention_heads=4,
        max_position_embeddings=64, word_embed_proj_dim=32, **options,
    )  # fmt: skip
    torch.manual_seed(0)
    return transformers.OPTForCausalLM(config)


def t5(transformers, form):
    config = transformers.T5Config(
        vocab_size=99, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, feed_forward_proj=form,
        decoder_start_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    return transformers.T5ForConditionalGeneration(config)


def language_loss(model):
    return model(input_ids=TOKENS, labels=TOKENS).loss


def logits(model):
    return model(input_ids=TOKENS, labels=TOKENS).logits


def generated(model):
    return model.generate(TOKENS, max_new_tokens=6, do_sample=False)


OPT_SWAPS = [(f"model.decoder.layers.{i}", "OPTDecoderLayer", "fused", "relu", (32, 128)) for i in range(2)]


def t5_swaps(was, activation):
    return [
        (f"{side}.block.{i}.layer.{n}.DenseReluDense", was, "SparseMLP", activation, (32, 64))
        for side, n in (("encoder", 1), ("decoder", 2))
        for i in range(2)
    ]


@pytest.mark.parametrize("family", ["opt", "opt_without_bias", "t5", "t5_gated"])
def test_a_language_model_gives_the_same_logits_gradients_and_text(transformers, family):
    if family.startswith("opt"):
        model, expected = opt(transformers, enable_bias=family == "opt"), OPT_SWAPS
    else:
        gated = family == "t5_gated"
        model = t5(transformers, "gated-relu" if gated else "relu")
        expected = t5_swaps(*(("T5DenseGatedActDense", "reglu") if gated else ("T5DenseActDense", "relu")))
    twin = check(model, language_loss, expected)
    model.eval()
    twin.eval()
    torch.testing.assert_close(logits(model), logits(twin), rtol=1e-4, atol=1e-4)
    with torch.no_grad(), dc.execution("sparse"):
        torch.testing.assert_close(logits(model), logits(twin), rtol=1e-4, atol=1e-4)
        assert total_flops(lambda: logits(model)) < total_flops(lambda: logits(twin))
    assert torch.equal(generated(model), generated(twin))


@pytest.mark.parametrize("family", ["opt", "t5", "t5_gated"])
def test_a_converted_language_model_is_saved_and_loaded_as_the_dense_one(transformers, family, tmp_path):
    model = opt(transformers) if family == "opt" else t5(transformers, "relu" if family == "t5" else "gated-relu")
    want = logits(model.eval())
    swaps = dc.convert.relu_sparse(model).swapped
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).eval()
    torch.testing.assert_close(logits(loaded), want)
    assert dc.convert.relu_sparse(loaded).swapped == swaps  # what from_pretrained made is no part of a larger buffer
    torch.testing.assert_close(logits(loaded), want)


@pytest.mark.parametrize("family", ["opt", "t5_gated"])
def test_a_converted_language_model_in_bfloat16_and_with_checkpointing(transformers, family):
    model = opt(transformers) if family == "opt" else t5(transformers, "gated-relu")
    twin = copy.deepcopy(model)
    dc.convert.relu_sparse(model)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    assert_same(results(model.train(), language_loss), results(twin.train(), language_loss))
    model, twin = model.bfloat16().eval(), twin.bfloat16().eval()
    with torch.no_grad():
        got, want = logits(model).float(), logits(twin).float()
    assert (got - want).square().mean().sqrt() < 2e-2 * want.square().mean().sqrt()


def test_a_t5_in_float16_whose_output_layers_stay_in_float32(transformers):
    model = t5(transformers, "gated-relu").half().eval()
    for name, module in model.named_modules():
        if name.endswith(".wo"):
            module.float()
    with torch.no_grad():
        want = logits(model)
        assert len(dc.convert.relu_sparse(model).swapped) == 4
        torch.testing.assert_close(logits(model), want, rtol=2e-2, atol=2e-3)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["opt", "t5_gated"])
def test_a_converted_language_model_compiles(transformers, family):
    model = (opt(transformers) if family == "opt" else t5(transformers, "gated-relu")).eval()
    dc.convert.relu_sparse(model)
    compiled = torch.compile(model, backend="aot_eager")
    torch.testing.assert_close(logits(compiled), logits(model), rtol=1e-4, atol=1e-4)


def test_models_whose_mlps_have_no_relu_are_kept_as_they_are(transformers):
    model = t5(transformers, "gated-gelu")
    before = {id(m): type(m) for m in model.modules()}
    report = dc.convert.relu_sparse(model)
    assert report.swapped == ()
    assert len(report.kept) == 4
    assert {k.reason for k in report.kept} == {"expected a ReLU or its square, got gelu_tanh"}
    assert {id(m): type(m) for m in model.modules()} == before
    report = dc.convert.relu_sparse(opt(transformers, activation_function="gelu"))
    assert [(k.name, k.kind) for k in report.kept] == [(s[0], s[1]) for s in OPT_SWAPS]


@pytest.mark.parametrize("family", ["bert", "vit"])
def test_layers_that_other_modules_call(transformers, family):
    sizes = {
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "intermediate_size": 64,
        "hidden_act": "relu",
    }
    torch.manual_seed(0)
    if family == "bert":
        model = transformers.BertModel(transformers.BertConfig(vocab_size=99, **sizes))
        inputs = {"input_ids": TOKENS}
    else:
        model = transformers.ViTModel(transformers.ViTConfig(image_size=16, patch_size=8, **sizes))
        inputs = {"pixel_values": torch.randn(2, 3, 16, 16)}
    want = model.eval()(**inputs).last_hidden_state
    with dc.execution("sparse"):
        (swap,) = dc.convert.relu_sparse(model).swapped
        assert swap.now == ("SparseLinear" if family == "bert" else "SparseMLP")
        assert swap.note == ("a larger module calls it" if family == "bert" else "")
        torch.testing.assert_close(model(**inputs).last_hidden_state, want, rtol=1e-4, atol=1e-5)


def test_the_parts_of_a_fused_opt_layer_say_what_they_are(transformers):
    model = opt(transformers)
    layer = model.model.decoder.layers[0]
    widths = layer.fc1.in_features, layer.fc1.out_features
    swap, _ = dc.convert.relu_sparse(model).swapped
    assert swap.note.startswith("fc1 computes it all: hooks on its parts see no hidden layer; fc1.hidden(x) makes one")
    assert (layer.fc1.in_features, layer.fc1.out_features) == widths
    assert layer.fc1.hidden(torch.ones(3, widths[0])).shape == (3, widths[1])
    with pytest.raises(ValueError, match=r"h: expected the MLP's output \[\.\.\., 32\]"):
        layer.fc2(torch.ones(3, widths[1]))


def test_a_fused_opt_layer_is_measured_by_its_old_names(transformers):
    model, names = opt(transformers), [f"model.decoder.layers.0.{n}" for n in ("activation_fn", "fc2")]
    measure = dc.measure.activation_sparsity
    want = measure(model, [TOKENS], layers=names).layers
    dc.convert.relu_sparse(model)
    got = measure(model, [TOKENS], layers=names).layers
    assert list(got) == list(want) == names
    for name in names:
        assert torch.equal(got[name].fired, want[name].fired)
    assert not any(name.endswith("fc2") for name in measure(model, [TOKENS]).unwatched)


def test_a_model_without_an_mlp_says_what_would_be_one():
    assert "no dense MLP was recognised" in repr(dc.convert.relu_sparse(nn.Linear(3, 4)))


def test_a_hooked_or_patched_opt_layer_is_not_fused(transformers):
    for harm in (
        lambda layer: layer.fc1.register_forward_hook(lambda *a: None),
        lambda layer: layer.__dict__.update(forward=lambda *a, **k: None),
    ):
        model = opt(transformers)
        harm(model.model.decoder.layers[1])
        report = dc.convert.relu_sparse(model)
        assert kinds(report) == [
            OPT_SWAPS[0], ("model.decoder.layers.1.fc2", "Linear", "SparseLinear", "relu", (32, 128))
        ]  # fmt: skip


# torch.nn -------------------------------------------------------------------------------------------------------------

SEQUENCE = torch.linspace(-2, 2, 2 * 5 * 16).view(2, 5, 16).sin()


@pytest.mark.parametrize("norm_first", [False, True])
def test_torchs_transformer(norm_first):
    model = nn.Transformer(16, 4, 2, 1, 48, dropout=0.1, batch_first=True, norm_first=norm_first)
    expected = [
        (f"encoder.layers.{i}", "TransformerEncoderLayer", "SparseTransformerEncoderLayer", "relu", (16, 48))
        for i in (0, 1)
    ] + [("decoder.layers.0", "TransformerDecoderLayer", "SparseTransformerDecoderLayer", "relu", (16, 48))]
    twin = check(model, lambda m: m(SEQUENCE, SEQUENCE.flip(1)).square().sum(), expected)
    with torch.no_grad(), dc.execution("sparse"):
        torch.testing.assert_close(model.eval()(SEQUENCE, SEQUENCE), twin.eval()(SEQUENCE, SEQUENCE))


def encoder(**options):
    layer = nn.TransformerEncoderLayer(16, 4, 48, batch_first=True, **options)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=True).eval()


def test_torchs_fused_inference_path_does_not_pass_the_zeros_by():
    model = encoder()
    twin, hidden = copy.deepcopy(model), []
    for layer in twin.layers:
        layer.linear2.register_forward_pre_hook(lambda m, args: hidden.append(args[0]))
    want = twin(SEQUENCE)
    on = sum(int((h > 0).sum()) for h in hidden)
    dc.convert.relu_sparse(model)
    with torch.no_grad(), dc.execution("sparse"):
        torch.testing.assert_close(model(SEQUENCE), want)
        dense = total_flops(lambda: twin(SEQUENCE))
        assert total_flops(lambda: model(SEQUENCE)) == dense - 2 * 16 * (2 * 10 * 48 - on)


def test_a_converted_encoder_compiles_and_exports():
    model = encoder()
    dc.convert.relu_sparse(model)
    want = model(SEQUENCE)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(SEQUENCE), want)
    with torch.no_grad():
        torch.testing.assert_close(torch.export.export(model, (SEQUENCE,)).module()(SEQUENCE), want)


def test_padding_masks_go_through_the_ordinary_path():
    model, padding = encoder(), torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    with torch.no_grad():
        want = model(SEQUENCE, src_key_padding_mask=padding)
        dc.convert.relu_sparse(model)
        got = model(SEQUENCE, src_key_padding_mask=padding)
    torch.testing.assert_close(got[~padding], want[~padding])


class OwnBlock(nn.TransformerEncoderLayer):
    def _ff_block(self, x):
        return 2 * super()._ff_block(x)


def hooked_layer():
    layer = nn.TransformerEncoderLayer(16, 4, 48)
    layer.linear1.register_forward_hook(lambda *a: None)
    return layer


def patched_layer():
    layer = nn.TransformerEncoderLayer(16, 4, 48)
    layer._ff_block = lambda x: x
    return layer


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: nn.TransformerEncoderLayer(16, 4, 48, activation="gelu"), "expected the activation relu, got gelu"),
        (lambda: OwnBlock(16, 4, 48), "expected one of TransformerEncoderLayer, TransformerDecoderLayer, got OwnBlock"),
        (hooked_layer, "expected nothing that hangs on linear1, got hooks"),
        (patched_layer, "expected its class's forward, got one that was put over it"),
    ],
    ids=["gelu", "subclass", "hook", "patch"],
)
def test_transformer_layers_that_are_kept(make, reason):
    model = nn.ModuleDict({"layer": make()})
    before = type(model["layer"])
    (kept,) = dc.convert.relu_sparse(model).kept
    assert (kept.name, kept.kind, kept.reason) == ("layer", before.__name__, reason)
    assert type(model["layer"]) is before
    assert type(model["layer"].linear2) is not SparseLinear


# Anything else --------------------------------------------------------------------------------------------------------


class Net(nn.Module):
    """MLPs in the ways people build them."""

    def __init__(self):
        super().__init__()
        self.ff = nn.Sequential(nn.Linear(16, 40), nn.ReLU(), nn.Dropout(0.2), nn.Linear(40, 16))
        self.shared = nn.ModuleList([self.ff, MLP(16, 40, activation="reglu")])
        self.deep = nn.Sequential(
            nn.LayerNorm(16),
            nn.Linear(16, 40),
            nn.ReLU(),
            nn.Dropout(0.1),
            nn.Linear(40, 24),
            nn.ReLU(),
            nn.Linear(24, 4),
        )
        self.smooth = nn.Sequential(nn.Linear(4, 4), nn.GELU(), nn.Linear(4, 4))

    def forward(self, x):
        for layer in self.shared:
            x = x + layer(x) + self.ff(x)
        return self.smooth(self.deep(x))


def test_every_way_to_build_an_mlp():
    model = Net()
    check(
        model,
        lambda m: m(SEQUENCE).square().sum(),
        [
            ("ff", "Sequential", "SparseMLP", "relu", (16, 40)),
            ("shared.1", "MLP", "SparseMLP", "reglu", (16, 40)),
            ("deep.4", "Linear", "SparseLinear", "relu", (24, 40)),
            ("deep.6", "Linear", "SparseLinear", "relu", (4, 24)),
        ],
        [("smooth", "Sequential")],
    )
    assert model.shared[0] is model.ff
    assert isinstance(model.ff, SparseMLP)
    assert model.deep[5].__class__ is nn.ReLU


def test_the_report_reads_as_a_list():
    report = dc.convert.relu_sparse(Net())
    assert str(report) == repr(report)
    assert str(report).splitlines() == [
        "4 swapped, 1 kept",
        "  ff: Sequential -> SparseMLP, relu, H=16, I=40",
        "  shared.1: MLP -> SparseMLP, reglu, H=16, I=40",
        "  deep.4: Linear -> SparseLinear, relu, H=24, I=40 "
        "(expected Sequential(Linear, ReLU, [Dropout,] Linear [, Dropout]), got Sequential(LayerNorm, Linear, ReLU, "
        "Dropout, Linear, ReLU, Linear))",
        "  deep.6: Linear -> SparseLinear, relu, H=4, I=24 "
        "(expected Sequential(Linear, ReLU, [Dropout,] Linear [, Dropout]), got Sequential(LayerNorm, Linear, ReLU, "
        "Dropout, Linear, ReLU, Linear))",
        "  smooth: Sequential kept: expected a ReLU or its square, got gelu",
    ]


def test_a_second_report_counts_what_skips_already():
    model = Net()
    dc.convert.relu_sparse(model)
    lines = str(dc.convert.relu_sparse(model)).splitlines()
    assert lines[:2] == ["0 swapped, 1 kept, already sparse: 4", "  ff: SparseMLP already sparse"]


def test_save_reaches_every_layer():
    model = nn.ModuleList([Net(), nn.TransformerEncoderLayer(16, 4, 48)])
    dc.convert.relu_sparse(model, save="recompute")
    saves = [m.save for m in model.modules() if hasattr(m, "save")]
    assert saves == ["recompute"] * 3


def feed_forward():
    return nn.Sequential(nn.Linear(16, 40), nn.ReLU(), nn.Linear(40, 16))


def test_the_model_itself_is_changed_in_place():
    model, x = feed_forward(), SEQUENCE
    want = model(x)
    (swap,) = dc.convert.relu_sparse(model).swapped
    assert (swap.name, swap.now) == ("2", "SparseLinear")
    torch.testing.assert_close(model(x), want)
    layer = nn.TransformerEncoderLayer(16, 4, 48)
    (swap,) = dc.convert.relu_sparse(layer).swapped
    assert (swap.name, swap.now) == ("the model", type(layer).__name__)


def test_tied_weights_are_kept():
    model = nn.ModuleDict({"a": feed_forward(), "b": feed_forward(), "c": nn.Linear(16, 40)})
    model["b"][2].weight = nn.Parameter(torch.randn(16, 40))
    model["a"][2].weight = model["b"][2].weight
    model["c"].weight = nn.Parameter(torch.randn(40, 16))
    report = dc.convert.relu_sparse(model)
    assert report.swapped == ()
    assert [k.name for k in report.kept] == ["a", "b"]
    assert report.kept[0].reason == "expected Parameters of its own, got tied ones: a.2.weight and b.2.weight"


class Quantized(nn.Linear):
    pass


class Linear(nn.Linear):
    """Named as torch names its quantised layers."""


class HiddenNoise(nn.Module):
    """Something stands between the layers that no module shows."""

    def __init__(self):
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Linear(16, 40), nn.ReLU(), nn.Linear(40, 16)

    def forward(self, x):
        return self.fc2(F.dropout(self.act(self.fc1(x)), 0.4, self.training))


def test_a_forward_of_its_own_still_skips_in_its_second_layer():
    model = nn.ModuleDict({"ff": HiddenNoise()})
    check(model, lambda m: m["ff"](SEQUENCE).square().sum(), [("ff.fc2", "Linear", "SparseLinear", "relu", (16, 40))])
    swap = dc.convert.relu_sparse(nn.ModuleDict({"ff": HiddenNoise()})).swapped[0]
    assert "HiddenNoise whose outputs in training are" in swap.note


def test_hooks_and_quantised_layers():
    first, second = feed_forward(), feed_forward()
    first[0].register_forward_hook(lambda *a: None)
    second[2].register_forward_hook(lambda *a: None)
    third = nn.Sequential(nn.Linear(16, 40), nn.ReLU(), Quantized(40, 16))
    report = dc.convert.relu_sparse(nn.ModuleList([first, second, third]))
    assert [(s.name, s.now, s.note) for s in report.swapped] == [
        ("0.2", "SparseLinear", "expected nothing that hangs on it, got hooks on 0")
    ]
    assert [(k.name, k.reason) for k in report.kept] == [
        ("1", "expected nothing that hangs on 2, got hooks"),
        ("2", "2: expected an nn.Linear, got Quantized"),
    ]
    (kept,) = dc.convert.relu_sparse(nn.ModuleList([nn.Sequential(Linear(16, 40), nn.ReLU(), Linear(40, 16))])).kept
    assert kept.reason == "2: expected an nn.Linear, got tests.test_convert.Linear"


def test_all_weights_of_a_model_are_laid_out_in_one_call(transformers):
    model = nn.ModuleDict({"opt": opt(transformers), "ff": feed_forward()}).eval()
    want = logits(model["opt"])
    dc.convert.relu_sparse(model)
    assert not all(p.is_contiguous() for p in model.parameters())
    parameters = list(model.parameters())
    assert dc.convert.lay_out(model, neuron_major=False) == 3
    assert all(p.is_contiguous() for p in model.parameters())
    assert all(p is before for p, before in zip(model.parameters(), parameters, strict=True))
    torch.testing.assert_close(logits(model["opt"]), want)
    assert dc.convert.lay_out(model, neuron_major=True) == 3
    assert model["ff"].get_submodule("2").weight.stride() == (1, 16)


def test_bad_arguments_name_themselves():
    with pytest.raises(TypeError, match="model: expected a module, got str"):
        dc.convert.lay_out("opt", neuron_major=False)
    with pytest.raises(TypeError, match="neuron_major: expected a bool, got str"):
        dc.convert.lay_out(feed_forward(), neuron_major="yes")
    with pytest.raises(TypeError, match="model: expected a module, got str"):
        dc.convert.relu_sparse("opt")
    with pytest.raises(ValueError, match="save: expected one of compressed, dense, recompute, got 'all'"):
        dc.convert.relu_sparse(feed_forward(), save="all")
