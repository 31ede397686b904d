"""dyncore as the experts implementation of tiny models of transformers: logits, gradients and text as eager's."""

from collections import Counter

import pytest
import torch

from dyncore.integrations import transformers as integration

transformers = pytest.importorskip("transformers")
transformers.logging.set_verbosity_error()
integration.register()

# each family's configuration takes what it knows of these
SIZES = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "sliding_window": 16,
    "num_experts": 6, "num_local_experts": 6, "n_routed_experts": 6, "moe_num_experts": 6, "num_experts_per_tok": 2,
    "moe_topk": 2, "moe_k": 2, "top_k_experts": 2, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 0,
    "n_shared_experts": 1,
    "shared_expert_intermediate_size": 24, "kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4,
    "v_head_dim": 8, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
HEAD = {"head_dim": 8}
FULL = {"layer_types": ["full_attention"] * 2}
SWIGLU, OWN_GATE = "grouped_mlp, swiglu", "grouped_linear, gate in torch, grouped_linear"

# family: (configuration, how its experts are computed, how many layers have them)
FAMILIES = {
    "AriaText": ({}, SWIGLU, 2),  # transposed
    "Afmoe": (HEAD, SWIGLU, 1),
    "Cohere2Moe": (HEAD, SWIGLU, 2),
    "DeepseekV2": (HEAD, SWIGLU, 2),
    "DeepseekV3": ({}, SWIGLU, 2),
    "DeepseekV4": (HEAD, OWN_GATE, 2),
    "Dots1": (HEAD, SWIGLU, 2),
    "Ernie4_5_Moe": (HEAD, SWIGLU, 1),
    "ExaoneMoe": (HEAD, SWIGLU, 2),
    "FlexOlmo": (HEAD, SWIGLU, 2),
    "Glm4Moe": (HEAD, SWIGLU, 2),
    "GptOss": (HEAD, OWN_GATE, 2),  # transposed, biases, gate and up interleaved
    "GraniteMoe": ({}, SWIGLU, 2),
    "HunYuanMoEV1": (HEAD, SWIGLU, 2),
    "HYV4": (HEAD, OWN_GATE, 1),
    "HYV3": (HEAD, SWIGLU, 1),
    "Jamba": (
        {"attn_layer_period": 2, "attn_layer_offset": 1, "use_mamba_kernels": False, "mamba_d_state": 4},
        SWIGLU,
        1,
    ),
    "Kolibri1": (HEAD, SWIGLU, 2),
    "Laguna": (HEAD, SWIGLU, 1),
    "Lfm2Moe": (FULL | {"num_dense_layers": 0}, SWIGLU, 2),
    "Mellum": (HEAD, SWIGLU, 2),
    "MiMoV2Flash": (HEAD, SWIGLU, 1),
    "MiniMax": (HEAD, SWIGLU, 2),
    "MiniMaxM2": (HEAD, SWIGLU, 2),
    "Mistral4": (HEAD, SWIGLU, 2),
    "Mixtral": (HEAD, SWIGLU, 2),
    "NemotronH": (
        HEAD | {"mamba_num_heads": 4, "mamba_head_dim": 8, "n_groups": 1},
        "grouped_mlp, relu2",
        1,
    ),  # no gate
    "Olmoe": ({}, SWIGLU, 2),
    "Phimoe": (HEAD, SWIGLU, 2),
    "Qwen2Moe": ({}, SWIGLU, 2),
    "Qwen3Moe": (HEAD, SWIGLU, 2),
    "Qwen3Next": (HEAD | FULL, SWIGLU, 2),
    "SolarOpen": (HEAD, SWIGLU, 2),
    "Zaya": (HEAD | {"num_experts_per_tok": 1}, SWIGLU, 2),
}
TOKENS = torch.arange(14).view(2, 7) * 5 % 60 + 3


def randomised(model):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.2)
    return model.eval()


def of_transformers(name):
    """A class of transformers; the test is skipped where the installed version has it not yet."""
    found = getattr(transformers, name, None)
    if found is None:
        pytest.skip(f"transformers {transformers.__version__} has no {name}")
    return found


def make(family, **options):
    config = of_transformers(f"{family}Config")(**SIZES | FAMILIES[family][0] | options)
    return randomised(getattr(transformers, f"{family}ForCausalLM")(config))


@pytest.fixture
def plans(monkeypatch):
    """The plans that our implementation makes."""
    made = []

    def recording(*args, **kwargs):
        made.append(route(*args, **kwargs))
        return made[-1]

    route = integration.route
    monkeypatch.setattr(integration, "route", recording)
    return made


def results(model, implementation):
    """(logits or hidden states, the gradient of each parameter that has one)."""
    model.set_experts_implementation(implementation)
    model.zero_grad()
    out = model(input_ids=TOKENS)[0]
    out.square().mean().backward()
    return out.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_same(got, want):
    torch.testing.assert_close(got[0], want[0], rtol=0, atol=2e-5 * float(want[0].abs().max()))
    assert got[1].keys() == want[1].keys()
    largest = max(float(g.abs().max()) for g in want[1].values())  # what cancels out is as exact as its terms
    for name, gradient in want[1].items():
        atol = 1e-4 * float(gradient.abs().max()) + 1e-7 * largest
        torch.testing.assert_close(got[1][name], gradient, rtol=0, atol=atol, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_gives_the_same_logits_gradients_and_text(family, plans):
    model = make(family)
    _, way, layers = FAMILIES[family]
    want = results(model, "eager")
    text = model.generate(TOKENS, max_new_tokens=5, do_sample=False)
    assert not plans
    got = results(model, "dyncore")
    assert list(integration.describe(model).values()) == [way] * layers
    slots = TOKENS.numel() * model.config.num_experts_per_tok
    assert [(p.num_rows, p.num_groups, p.num_slots) for p in plans] == [(14, 6, slots)] * layers
    assert_same(got, want)
    assert torch.equal(model.generate(TOKENS, max_new_tokens=5, do_sample=False), text)
    assert len(plans) == layers * 6  # the backward pass, the prompt and four tokens


def gemma4():
    options = {"enable_moe_block": True, "vocab_size_per_layer_input": 64, "hidden_size_per_layer_input": 8}
    config = transformers.Gemma4TextConfig(**SIZES | HEAD | options)
    return transformers.Gemma4ForCausalLM(config)


def muse_spark():
    config = of_transformers("MuseSparkTextConfig")(**SIZES | HEAD | {"moe_hidden_size": 16})
    module = transformers.models.muse_spark.modeling_muse_spark
    return module.MuseSparkTextModel(config)


def privacy_filter():
    config = transformers.OpenAIPrivacyFilterConfig(**SIZES | HEAD)
    return transformers.OpenAIPrivacyFilterForTokenClassification(config)


@pytest.mark.parametrize(
    ("build", "way"),
    [
        (gemma4, OWN_GATE),  # the tanh form of gelu, gated
        (muse_spark, f"{OWN_GATE}, norm in torch, scatter_rows"),
        (privacy_filter, OWN_GATE),  # transposed, biases
    ],
)
def test_models_with_experts_of_their_own_kind(build, way, plans):
    model = randomised(build())
    want = results(model, "eager")
    got = results(model, "dyncore")
    assert list(integration.describe(model).values()) == [way] * 2
    assert len(plans) == 2
    assert_same(got, want)


def test_a_model_loaded_with_the_implementation_uses_it(tmp_path, plans):
    make("Mixtral").save_pretrained(tmp_path)
    auto = transformers.AutoModelForCausalLM
    want, got = (auto.from_pretrained(tmp_path, experts_implementation=name) for name in ("eager", "dyncore"))
    assert got.config._experts_implementation == "dyncore"
    with torch.no_grad():
        torch.testing.assert_close(got(TOKENS).logits, want(TOKENS).logits, rtol=1e-5, atol=1e-5)
    assert len(plans) == 2


@pytest.mark.parametrize("family", ["Qwen3Moe", "GptOss"])
def test_a_model_trains_with_checkpointing_as_without(family, plans):
    model = make(family).train()
    want = results(model, "eager")
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    assert_same(results(model, "dyncore"), want)
    assert len(plans) == 4  # each layer once more for its backward


@pytest.mark.parametrize(("family", "dynamic"), [("Qwen3Moe", False), ("GptOss", True)])
def test_a_model_compiles_into_one_graph(family, dynamic):
    model = make(family, num_hidden_layers=1)
    want = results(model, "dyncore")
    compiled = torch.compile(model, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    model.zero_grad()
    logits = compiled(input_ids=TOKENS, use_cache=False).logits
    logits.square().mean().backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert_same((logits.detach(), gradients), want)


@pytest.mark.parametrize(("family", "ops"), [("Mixtral", {"grouped_mlp": 1}), ("GptOss", {"grouped_linear": 2})])
def test_an_exported_model_routes_whatever_tokens_it_is_given(family, ops):
    model = make(family, num_hidden_layers=1)
    model.set_experts_implementation("dyncore")
    sizes = {0: torch.export.Dim("batch", min=2, max=8), 1: torch.export.Dim("tokens", min=2, max=64)}
    arguments = {"input_ids": TOKENS, "use_cache": False}
    dynamic = {"input_ids": sizes, "use_cache": None}
    with torch.no_grad():
        exported = torch.export.export(model, (), arguments, dynamic_shapes=dynamic)
        targets = [str(node.target) for node in exported.graph.nodes if str(node.target).startswith("dyncore.")]
        assert Counter(targets) == {f"dyncore.{name}.default": n for name, n in {"plan_route": 1, **ops}.items()}
        run = exported.module()
        model.set_experts_implementation("eager")
        for tokens in (TOKENS, TOKENS.flip(1), torch.randint(3, 60, (3, 11))):
            got, want = (m(input_ids=tokens, use_cache=False).logits for m in (run, model))
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["Qwen3Moe", "GptOss", "NemotronH"])
def test_a_model_in_bfloat16_and_under_autocast(family):
    model = make(family)
    model.set_experts_implementation("dyncore")
    with torch.no_grad():
        want = model(TOKENS).logits
        with torch.autocast("cpu", dtype=torch.bfloat16):
            under_autocast = model(TOKENS).logits
        narrow = model.bfloat16()(TOKENS).logits
    for got in (under_autocast, narrow):
        assert float((got.float() - want).square().mean().sqrt() / want.square().mean().sqrt()) < 0.05


def test_describe_is_empty_where_transformers_asks_nobody():
    assert integration.describe(torch.nn.Linear(4, 4)) == {}
    config = transformers.Llama4TextConfig(**SIZES | HEAD | {"intermediate_size_mlp": 48})
    assert integration.describe(transformers.Llama4ForCausalLM(config)) == {}
