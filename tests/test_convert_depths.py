"""convert.mixture_of_depths: models of torch, dyncore and transformers whose every other block some tokens pass by."""

import copy
import pickle

import pytest
import torch
from torch import nn

import dyncore as dc
from dyncore.convert.mixture_of_depths import MixedDecoderLayer, MixedEncoderLayer
from tests.nn.oracle import block, flops

B, S, D = 2, 10, 16


def encoder(**options):
    layer = nn.TransformerEncoderLayer(D, 4, 32, dropout=0.0, **{"batch_first": True, **options})
    return nn.TransformerEncoder(layer, 4, enable_nested_tensor=False)


def own():
    return nn.Sequential(*(block() for _ in range(4)))


def transformer(family, attention="sdpa", layers=4):
    transformers = pytest.importorskip("transformers")
    sizes = {
        "vocab_size": 40,
        "hidden_size": D,
        "intermediate_size": 24,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "attn_implementation": attention,
    }
    if family == "GPT2":
        names = {"hidden_size": "n_embd", "num_hidden_layers": "n_layer", "num_attention_heads": "n_head"}
        sizes = {names.get(k, k): v for k, v in sizes.items() if k not in ("intermediate_size", "num_key_value_heads")}
        sizes |= {"n_positions": 64, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    config = getattr(transformers, f"{family}Config")(**sizes, pad_token_id=0)
    torch.manual_seed(0)
    return getattr(
        transformers,
        "BertModel" if family == "Bert" else f"{family}LMHeadModel" if family == "GPT2" else f"{family}ForCausalLM",
    )(config).eval()


def logits(model, ids, **options):
    out = model(ids, **options)
    return out.logits if hasattr(out, "logits") else out.last_hidden_state


MODELS = {
    "encoder": (encoder, lambda model: model(INPUT)),
    "encoder_seq_first": (lambda: encoder(batch_first=False), lambda model: model(INPUT.transpose(0, 1))),
    "encoder_norm_first": (lambda: encoder(norm_first=True), lambda model: model(INPUT, mask=CAUSAL, is_causal=True)),
    "encoder_masked": (encoder, lambda model: model(INPUT, mask=CAUSAL, src_key_padding_mask=PADDED)),
    "own": (own, lambda model: model(INPUT)),
    "llama": (lambda: transformer("Llama"), lambda model: logits(model, IDS)),
    "llama_eager_padded": (lambda: transformer("Llama", "eager"), lambda model: logits(model, IDS, attention_mask=MASK)),
    "qwen": (lambda: transformer("Qwen2"), lambda model: logits(model, IDS, attention_mask=MASK)),
    "gpt2": (lambda: transformer("GPT2"), lambda model: logits(model, IDS)),
    "gpt2_eager": (lambda: transformer("GPT2", "eager"), lambda model: logits(model, IDS)),
    "bert": (lambda: transformer("Bert"), lambda model: logits(model, IDS, attention_mask=MASK)),
}  # fmt: skip
G = torch.Generator().manual_seed(5)
INPUT = torch.randn(B, S, D, generator=G)
IDS = torch.randint(1, 40, (B, S), generator=G)
CAUSAL = torch.ones(S, S, dtype=torch.bool).triu(1)
PADDED = torch.zeros(B, S, dtype=torch.bool)
PADDED[1, 8:] = True
MASK = (~PADDED).long()


@pytest.mark.parametrize("name", MODELS)
def test_capacity_one_is_exactly_the_dense_model(name):
    make, call = MODELS[name]
    model = make().eval()
    with torch.no_grad():
        want = call(model)
        parameters = {id(p) for p in model.parameters()}
        report = dc.convert.mixture_of_depths(model, capacity=1.0)
        assert len(report.mixed) == len(report.dense) == 2
        assert torch.equal(call(model), want)
    assert parameters < {id(p) for p in model.parameters()}
    assert "2 blocks with capacity 1.0, 2 dense" in repr(report)


@pytest.mark.parametrize("name", MODELS)
def test_chosen_tokens_come_out_as_masked_execution_has_them(name):
    """Masked execution gives the block every token, and masks in full size: nothing is gathered there."""
    make, call = MODELS[name]
    model = make().eval()
    dc.convert.mixture_of_depths(model, capacity=0.4)
    layers = [m for m in model.modules() if isinstance(m, dc.nn.MixtureOfDepths)]
    results = []
    for mode in ("sparse", "masked"):
        model.zero_grad()
        with dc.execution(mode):
            out = call(model)
        out.square().sum().backward()
        assert all(m.last_plan.num_slots == B * 4 for m in layers)
        results.append((out.detach(), {n: p.grad for n, p in model.named_parameters()}))
    (sparse, grads), (masked, others) = results
    torch.testing.assert_close(sparse, masked, rtol=1e-4, atol=1e-4)
    assert all(grads[n] is not None and grads[n].any() for n in grads if n.endswith("router.weight"))
    for n, grad in grads.items():
        assert (grad is None) == (others[n] is None), n
        if grad is not None:
            torch.testing.assert_close(grad, others[n], rtol=1e-3, atol=1e-3 * float(1 + grad.abs().max()), msg=n)


@pytest.mark.parametrize("name", ["encoder", "own", "llama", "gpt2"])
def test_flops_fall(name):
    make, call = MODELS[name]
    model = make().eval()  # with gradients: without them torch's encoder is one fused op that nobody counts
    dense = flops(lambda: call(model))
    report = dc.convert.mixture_of_depths(model, capacity=1.0)
    layers = [model.get_submodule(m.name) for m in report.mixed]
    counts = []
    for capacity in (0.0, 0.2, 0.5, 1.0):
        for layer in layers:
            layer.capacity = capacity
        counts.append(flops(lambda: call(model)))
    assert counts == sorted(set(counts))
    assert counts[-1] == dense + 2 * 2 * B * S * D  # the routers
    assert counts[0] < 0.7 * dense


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen"])
@pytest.mark.parametrize("inference", ["predictor", "threshold"])
def test_decoding_with_the_models_own_cache_equals_the_full_forward(name, inference):
    model = MODELS[name][0]()
    report = dc.convert.mixture_of_depths(model, capacity=0.5, inference=inference)
    with torch.no_grad():
        for m in report.mixed:  # as if trained: some tokens go, others pass
            layer = model.get_submodule(m.name)
            layer.threshold = 0.5
            for p in (layer.predictor or layer.router).parameters():
                p.mul_(20 if p.dim() > 1 else 0)
        want = model(IDS, use_cache=False).logits
        shares = [float(c.mean()) for c in dc.nn.collect_costs(model).values()]
        assert len(shares) == 2
        assert all(0.1 < share < 0.9 for share in shares), shares
        for lengths in ([4] + [1] * 6, [1, 5, 4]):
            cache, parts = None, []
            for part in IDS.split(lengths, 1):
                out = model(part, past_key_values=cache, use_cache=True)
                cache = out.past_key_values
                parts.append(out.logits)
            torch.testing.assert_close(torch.cat(parts, 1), want, rtol=1e-4, atol=1e-4)
        assert model.generate(IDS, max_new_tokens=3, do_sample=False).shape == (B, S + 3)


def test_topk_takes_no_cache_and_says_why():
    model = MODELS["llama"][0]()
    report = dc.convert.mixture_of_depths(model)
    assert not model.config.use_cache
    assert "use_cache = False" in repr(report)
    assert model(IDS).past_key_values is None
    with pytest.raises(ValueError, match=r"past_key_values: expected None \(use_cache=False\) with inference='topk'"):
        model(IDS, use_cache=True)
    model.train()(IDS, use_cache=True)  # nothing is kept in training


def test_converted_models_train_and_keep_their_weights():
    model = transformer("Llama")
    before = {n: p.clone() for n, p in model.named_parameters()}
    dc.convert.mixture_of_depths(model, capacity=0.3, inference="predictor")
    after = dict(model.named_parameters())
    for name, p in before.items():
        same = (
            name
            if name in after
            else name.replace("layers.1.", "layers.1.block.").replace("layers.3.", "layers.3.block.")
        )
        assert torch.equal(after[same], p)
    model.train()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    first = last = None
    for _ in range(25):
        out = model(IDS, labels=IDS)
        loss = out.loss + sum(dc.nn.collect_losses(model).values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        first, last = first or loss.item(), loss.item()
    assert last < 0.8 * first


@pytest.mark.parametrize("name", ["encoder", "llama"])
def test_copies_pickles_and_compiles(name):
    make, call = MODELS[name]
    model = make().eval()
    dc.convert.mixture_of_depths(model, capacity=0.4)
    with torch.no_grad():
        want = call(model)
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(call(twin), want)
        if name == "encoder":
            torch._dynamo.reset()
            torch.testing.assert_close(call(torch.compile(model, backend="aot_eager")), want)


def test_what_is_no_block_stays_and_what_cannot_be_mixed_says_why():
    shared = block()
    model = nn.ModuleDict(
        {"shared": nn.ModuleList([shared, shared]), "plain": nn.Sequential(nn.Linear(D, D), nn.ReLU())}
    )
    report = dc.convert.mixture_of_depths(model, every=1)
    assert report.mixed == ()
    assert "expected blocks of their own, got one in several places" in repr(report)
    assert "no list of transformer blocks was recognised" in repr(dc.convert.mixture_of_depths(nn.Linear(D, D)))
    model = own()
    assert [m.name for m in dc.convert.mixture_of_depths(model, every=4).mixed] == ["3"]
    again = dc.convert.mixture_of_depths(model, every=4)
    assert [(k.name, k.reason) for k in again.kept] == [("3", "mixes depths already")]
    with pytest.raises(ValueError, match="every: expected at most 4, the number of blocks in the model, got 9"):
        dc.convert.mixture_of_depths(own(), every=9)


def test_blocks_keep_their_attributes():
    model = encoder()
    dc.convert.mixture_of_depths(model, every=1)
    assert isinstance(model.layers[0], MixedEncoderLayer)
    assert model.layers[0].self_attn is model.layers[0].block.self_attn
    with pytest.raises(AttributeError, match="nothing"):
        model.layers[0].nothing  # noqa: B018
    llama = transformer("Llama")
    dc.convert.mixture_of_depths(llama)
    assert isinstance(llama.model.layers[1], MixedDecoderLayer)


def test_bad_arguments_are_named():
    with pytest.raises(TypeError, match="model: expected a module, got int"):
        dc.convert.mixture_of_depths(3)
    with pytest.raises(ValueError, match="every: expected an int >= 1, got 0"):
        dc.convert.mixture_of_depths(own(), every=0)
    with pytest.raises(ValueError, match=r"capacity: expected a float ratio in 0\.\.1"):
        dc.convert.mixture_of_depths(own(), capacity=1.5)
    with pytest.raises(ValueError, match="weight: expected one of linear, sigmoid, tanh, hard, got 'soft'"):
        dc.convert.mixture_of_depths(own(), weight="soft")
