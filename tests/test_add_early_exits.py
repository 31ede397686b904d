"""convert.add_early_exits: exits in models as they stand, torch's and transformers'."""

import copy
import math
import pickle

import pytest
import torch
from torch import nn

import dyncore as dc
from dyncore.convert.add_early_exits import _ByNumber
from dyncore.nn import exits
from tests.support import assert_gradients, assert_values

INF, C = math.inf, 5


class Residual(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(channels, channels, 3, padding=1), nn.BatchNorm2d(channels)

    def forward(self, x):
        return x + torch.relu(self.norm(self.conv(x)))


class ResNet(nn.Module):
    """Stages under names of their own, as torchvision's."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.layer1, self.layer2, self.layer3 = Residual(8), nn.Sequential(Residual(8), nn.MaxPool2d(2)), Residual(8)
        self.fc = nn.Linear(8, C)

    def forward(self, x):
        x = self.layer3(self.layer2(self.layer1(self.stem(x))))
        return self.fc(x.mean((2, 3)))


class Tokens(nn.Module):
    """torch's encoder, whose layers are given a mask [S, S]."""

    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)
        self.fc = nn.Linear(16, C)

    def forward(self, x, mask=None):
        return self.fc(
            self.encoder(x, mask=torch.triu(torch.ones(6, 6, dtype=torch.bool), 1), src_key_padding_mask=mask)[:, -1]
        )


def sequential():
    layers = [nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, C)]
    return nn.Sequential(*layers), ["1", "3"], (torch.randn(7, 6),)


def resnet():
    return ResNet(), ["layer1", "layer2"], (torch.randn(7, 3, 6, 6),)


def encoder():
    return Tokens(), ["encoder.layers.0", "encoder.layers.1"], (torch.randn(6, 6, 16), torch.rand(6, 6) > 0.9)


def hugging_face(name):
    transformers = pytest.importorskip("transformers")
    small = {
        "num_labels": C,
        "hidden_size": 16,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "intermediate_size": 24,
    }
    tokens = {"input_ids": torch.randint(5, 50, (7, 6)), "attention_mask": torch.ones(7, 6, dtype=torch.long)}
    tokens["attention_mask"][2:4, 4:] = 0
    if name == "bert":
        model = transformers.BertForSequenceClassification(transformers.BertConfig(**small, vocab_size=50))
        return model, ["bert.encoder.layer.0", "bert.encoder.layer.1"], tokens
    if name == "vit":
        model = transformers.ViTForImageClassification(transformers.ViTConfig(**small, image_size=8, patch_size=4))
        layers = next(n for n, m in model.named_modules() if isinstance(m, nn.ModuleList))
        return model, [f"{layers}.0", f"{layers}.1"], {"pixel_values": torch.randn(7, 3, 8, 8)}
    if name == "llama":
        config = transformers.LlamaConfig(**small, vocab_size=50, pad_token_id=0)
        return transformers.LlamaForSequenceClassification(config), ["model.layers.0", "model.layers.1"], tokens
    config = transformers.GPT2Config(n_embd=16, n_layer=3, n_head=2, vocab_size=50, num_labels=C, pad_token_id=0)
    return transformers.GPT2ForSequenceClassification(config), ["transformer.h.0", "transformer.h.1"], tokens


MODELS = {
    "sequential": sequential,
    "resnet": resnet,
    "encoder": encoder,
    **{name: lambda name=name: hugging_face(name) for name in ("bert", "vit", "llama", "gpt2")},
}


@pytest.fixture(params=MODELS)
def built(request):
    """(the model with exits, the dense logits, a call of a forward)"""
    model, at, example = MODELS[request.param]()
    model.eval()

    def call(m):
        return m(**example) if isinstance(example, dict) else m(*example)

    with torch.no_grad():
        dense = call(model)
    layer = dc.convert.add_early_exits(model, at, example)
    return layer, getattr(dense, "logits", dense), call


def same(got, dense, layer):
    """Exactly so, but for torch's encoder layers, which leave their fused path where there are hooks."""
    return torch.equal(got, dense) or (isinstance(layer.model, Tokens) and torch.allclose(got, dense, atol=1e-5))


def test_at_the_ends_it_is_exactly_the_model_or_the_first_head(built):
    layer, dense, call = built
    for mode in ("sparse", "masked", "auto"):
        with torch.no_grad(), dc.execution(mode):
            layer.threshold = INF
            assert same(call(layer), dense, layer)
            assert layer.last_exit.unique().tolist() == [2]
            layer.threshold = -INF
            assert torch.equal(call(layer), call(lambda *a, **k: layer.every_exit(*a, **k))[0])
            assert layer.last_exit.unique().tolist() == [0]


def test_exits_are_those_of_running_everything(built):
    layer, _, call = built
    logits = call(lambda *a, **k: layer.every_exit(*a, **k))
    surest = exits.confidences(logits, layer.criterion)
    layer.threshold = surest[:2].median(1).values  # about half leave at each
    want = exits.simulate(logits, layer.criterion)
    for mode in ("sparse", "masked"):
        with torch.no_grad(), dc.execution(mode):
            got = call(layer)
        assert torch.equal(layer.last_exit, want.exit)
        assert len(want.exit.unique()) > 1
        assert_values(got, want.logits)


def test_gradients_are_those_of_computing_everything(built):
    layer, _, call = built
    layer = copy.deepcopy(layer).eval()
    layer.criterion = _ByNumber(3)
    grads = {}
    for mode in ("sparse", "masked"):
        layer.zero_grad()
        with dc.execution(mode):
            call(layer).square().sum().backward()
        grads[mode] = {name: p.grad for name, p in layer.named_parameters()}
    for name, grad in grads["sparse"].items():
        other = grads["masked"][name]
        assert (grad is None) == (other is None), name
        if grad is not None and (other.abs().max() > 1e-6 or grad.abs().max() > 1e-6):  # biases of keys have none
            assert_gradients(grad, other, torch.float32, name)


def test_flops_fall_with_the_samples_that_leave(built):
    layer, _, call = built
    executed = []
    for threshold in ([INF, INF], [INF, -INF], -INF):
        layer.threshold = threshold if isinstance(threshold, list) else [threshold] * 2
        with torch.no_grad():
            executed.append(dc.measure.flops(lambda: call(layer)))
    assert executed == sorted(executed, reverse=True)
    assert len(set(executed)) == 3
    share = [sum(layer.costs[: k + 1]) / sum(layer.costs) for k in (2, 1, 0)]
    assert [e / executed[0] for e in executed] == pytest.approx(share, rel=1e-3)


def test_training_returns_all_logits_and_trains_heads_and_model(built):
    layer, _, call = built
    layer.train()
    logits = call(layer)
    assert [z.shape for z in logits] == [(len(logits[0]), C)] * 3
    dc.nn.losses.multi_exit(logits, torch.randint(C, (len(logits[0]),))).backward()
    assert all(p.grad is not None for p in layer.heads.parameters())
    assert any(p.grad is not None and p.grad.any() for p in layer.model.parameters())


def test_the_model_by_itself_stays_what_it_was(built):
    layer, dense, call = built
    names = [name for name in layer.state_dict() if not name.startswith(("heads", "criterion"))]
    with torch.no_grad():
        out = call(layer.model)
        assert same(getattr(out, "logits", out), dense, layer)
        assert {f"model.{name}" for name in layer.model.state_dict()} == set(names)
        model = layer.remove()
        out = call(model)
        assert torch.equal(getattr(out, "logits", out), dense)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_copies_are_independent(built):
    layer, _, call = built
    layer.threshold = 0.25
    with torch.no_grad():
        want = call(layer)
        for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
            assert twin.last_exit is None
            twin.threshold = INF
            call(twin)
            assert layer.last_exit is not None
            twin.threshold = 0.25
            assert torch.equal(call(twin), want)
            for p in twin.heads.parameters():
                p.add_(1)
        assert torch.equal(call(layer), want)


def test_the_report_says_what_was_added():
    model, at, example = resnet()
    layer = dc.convert.add_early_exits(model.eval(), at, example)
    assert [e.name for e in layer.report.exits] == at
    assert layer.report.exits[0].shape == (8, 6, 6)
    first, second, third = repr(layer.report).splitlines()
    assert first.startswith(f"2 exits added before the model's own, {C} classes; their heads have 90 parameters")
    assert second.startswith("  after layer1: Residual -> [8, 6, 6], PooledHead, ")
    assert third.startswith("  after layer2: Sequential -> [8, 3, 3], PooledHead, ")
    assert layer.costs[0] > layer.costs[2] > 0  # counted


def test_heads_of_tokens_heed_the_mask():
    from dyncore.nn.with_exits import PooledHead

    hidden, mask = torch.randn(3, 4, 6), torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1], [0, 1, 1, 0]])
    spoiled = torch.where(mask[..., None].bool(), hidden, 1e6)
    for pool, want in (
        ("mean", torch.stack([hidden[0, :2].mean(0), hidden[1].mean(0), hidden[2, 1:3].mean(0)])),
        ("last", torch.stack([hidden[0, 1], hidden[1, 3], hidden[2, 2]])),
    ):
        head = PooledHead(hidden.shape, C, pool)
        torch.testing.assert_close(head(spoiled, attention_mask=mask), head.linear(head.norm(want)))
    head = PooledHead(hidden.shape, C, "first")
    torch.testing.assert_close(head(hidden), head.linear(head.norm(hidden[:, 0])))
    want = torch.stack([hidden[0, 0], hidden[1, 0], hidden[2, 1]])
    torch.testing.assert_close(head(spoiled, attention_mask=mask), head.linear(head.norm(want)))


def test_heads_may_use_the_exit_before():
    model, at, example = sequential()
    heads = [exits.ZeroTimeWaste(nn.Identity(), 8, C) for _ in at]
    layer = dc.convert.add_early_exits(model, at, example, heads=heads).eval()
    x = example[0]
    first = heads[0](model[:2](x))
    second = heads[1](model[:4](x), previous=first)
    assert torch.equal(layer.every_exit(x)[1], second)
    layer.threshold = [torch.softmax(first, 1).amax(1).median().item(), -INF]
    out = layer(x)
    assert layer.last_exit.unique().numel() == 2
    assert_values(out, torch.where((layer.last_exit == 0)[:, None], first, second).detach())


def test_compiles_into_one_graph():
    model, at, example = resnet()
    layer = dc.convert.add_early_exits(model.eval(), at, example).eval()
    layer.threshold = 0.25
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        want = layer(*example)
        exit = layer.last_exit
        assert_values(compiled(*example), want)
    assert torch.equal(layer.last_exit, exit)


class Mixing(nn.Module):
    """Looks at all samples after the exit."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 8), nn.Linear(8, C)

    def forward(self, x):
        h = self.a(x)
        return self.b(h - h.mean(0))


class Counting(Mixing):
    def forward(self, x):
        return self.b(self.a(x) + x[:, :1])


def add(model=None, at=("1",), example=None, **options):
    sequence, _, x = sequential()
    return dc.convert.add_early_exits(model or sequence, list(at), x if example is None else example, **options)


BAD_CALLS = [
    (lambda: add(at=["9"]), ValueError, "at: expected names of model.named_modules(), got '9'"),
    (lambda: add(at=["4"]), ValueError, "at: expected blocks before the model's head, got '4', which returns its logits"),
    (lambda: add(resnet()[0], ["0"], resnet()[2]), ValueError, "got '0'; layer2.0?"),
    (lambda: add(add()), ValueError, "model: expected one without exits, got WithExits"),
    (lambda: add(at=[]), ValueError, "at: expected a list of at least one name"),
    (lambda: dc.convert.add_early_exits(nn.Identity(), "1", X), ValueError, "at: expected a list of at least one name of"),
    (lambda: add(at=["3", "1"]), ValueError, "at: expected blocks that run once each, in this order; they ran as ['1', '3']"),
    (lambda: add(at=["1", "1"]), ValueError, "at: expected different names"),
    (lambda: add(example=torch.zeros(0, 6)), ValueError, "example: expected tensors [B, ...] of at least one sample"),
    (lambda: add(heads=[]), ValueError, "heads: expected 1 of them, one for each name in at, got 0"),
    (lambda: add(heads=[nn.Linear(8, 3)]), ValueError, "exit 1: expected 3 classes, got 5"),
    (lambda: add(pool="max"), ValueError, "pool: expected one of mean, first, last, got 'max'"),
    (lambda: add("model"), TypeError, "model: expected a module, got str"),
    (lambda: add(Mixing(), ["a"]), ValueError, "model: expected one that treats each sample alone"),
    (lambda: add(Counting(), ["a"]), ValueError, "model: expected one whose samples may leave after a"),
    (lambda: add(nn.Sequential(nn.Linear(6, 8), nn.Unflatten(1, (2, 4))), ["0"]), ValueError, "model: expected one that returns logits [B, C], got shape [7, 2, 4]"),
]  # fmt: skip
X = torch.zeros(3, 6)


@pytest.mark.parametrize(("call", "kind", "message"), BAD_CALLS, ids=[m for _, _, m in BAD_CALLS])
def test_bad_calls_name_the_argument(call, kind, message):
    with pytest.raises(kind) as error:
        call()
    assert message in str(error.value)


def test_a_model_that_is_refused_has_no_hooks():
    model = Mixing()
    with pytest.raises(ValueError, match="treats each sample alone"):
        add(model, ["a"])
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert model.training


def test_generation_is_refused():
    model, at, example = hugging_face("llama")
    layer = dc.convert.add_early_exits(model.eval(), at, example).eval()
    with pytest.raises(ValueError, match="past_key_values: expected none: exits are for whole sequences"):
        layer(**example, past_key_values=object())


def test_labels_are_refused_since_no_loss_is_computed():
    model, at, example = hugging_face("bert")
    layer = dc.convert.add_early_exits(model.eval(), at, example)
    for mode in (layer.eval(), layer.train()):
        with pytest.raises(ValueError, match="labels: expected none, since logits are returned and no loss"):
            mode(**example, labels=torch.zeros(7, dtype=torch.long))
        mode(**example, labels=None)


def test_a_mapping_of_arguments_is_taken_as_the_example_was():
    transformers = pytest.importorskip("transformers")
    model, at, example = hugging_face("bert")
    layer = dc.convert.add_early_exits(model.eval(), at, example)
    with torch.no_grad():
        want, every = layer(**example), layer.every_exit(**example)
        for given in (example, transformers.BatchEncoding(example)):
            assert torch.equal(layer(given), want)
            assert all(torch.equal(a, b) for a, b in zip(layer.every_exit(given), every, strict=True))
    y = torch.randint(C, (7,))
    found = dc.measure.exits(layer, transformers.BatchEncoding(example), y, batch=3)
    assert repr(found) == repr(dc.measure.exits(layer, example, y, batch=3))


def test_a_threshold_on_the_model_that_was_given_exits_is_refused():
    model, at, example = resnet()
    layer = dc.convert.add_early_exits(model.eval(), at, example)
    model.threshold = 0.5
    with pytest.raises(ValueError, match="threshold: expected to be set on the module with exits"):
        layer(*example)
    del model.threshold
    layer(*example)
    model.threshold = 1.0  # a model may have one of its own
    dc.convert.add_early_exits(layer.remove(), at, example)(*example)


def test_arguments_may_come_by_position():
    model, at, example = hugging_face("bert")
    layer = dc.convert.add_early_exits(model.eval(), at, example).eval()
    layer.threshold = 0.25
    with torch.no_grad():
        assert torch.equal(layer(*example.values()), layer(**example))
        for got, want in zip(layer.every_exit(*example.values()), layer.every_exit(**example), strict=True):
            assert torch.equal(got, want)
    model, at, example = hugging_face("gpt2")
    layer = dc.convert.add_early_exits(model.eval(), at, example).eval()
    with pytest.raises(ValueError, match="past_key_values: expected none"):
        layer(example["input_ids"], object())


def test_an_exit_after_the_last_block_alone():
    model, _, example = hugging_face("gpt2")
    layer = dc.convert.add_early_exits(model.eval(), ["transformer.h.2"], example).eval()
    with torch.no_grad():
        first, last = layer.every_exit(**example)
        layer.threshold = torch.softmax(first, 1).amax(1).median().item()
        out = layer(**example)
    assert layer.last_exit.unique().numel() == 2
    assert_values(out, torch.where((layer.last_exit == 0)[:, None], first, last))
