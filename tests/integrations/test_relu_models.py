"""convert.relu_sparse on what transformers ships with a ReLU (OPT and T5 in depth: tests/test_convert.py)."""

import copy

import pytest
import torch

import dyncore as dc

transformers = pytest.importorskip("transformers")
transformers.logging.set_verbosity_error()

SIZES = {
    "vocab_size": 64, "hidden_size": 32, "d_model": 32, "intermediate_size": 64, "d_ff": 64, "ffn_dim": 64,
    "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "num_hidden_layers": 1, "num_layers": 1, "encoder_layers": 1,
    "decoder_layers": 1, "num_attention_heads": 4, "num_heads": 4, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 8, "d_kv": 8, "max_position_embeddings": 64,
    "pad_token_id": 0, "decoder_start_token_id": 0, "num_experts": 2,
}  # fmt: skip
RELU = {"hidden_act": "relu", "activation_function": "relu"}
TOKENS = torch.arange(14).view(2, 7) * 5 % 60 + 3

# class: (configuration, what its MLPs become, activation, how many; 0 where they are kept)
MODELS = {
    "ArceeForCausalLM": ({}, "SparseMLP", "relu2", 1),
    "Jais2ForCausalLM": ({}, "SparseMLP", "relu2", 1),
    "NanoChatForCausalLM": ({}, "SparseMLP", "relu2", 1),
    "NemotronForCausalLM": ({}, "SparseMLP", "relu2", 1),
    "PersimmonForCausalLM": ({}, "SparseMLP", "relu2", 1),
    "LongT5ForConditionalGeneration": ({}, "SparseMLP", "relu", 2),
    "UMT5ForConditionalGeneration": ({"feed_forward_proj": "relu"}, "SparseMLP", "relu", 2),
    "M2M100ForConditionalGeneration": ({}, "SparseLinear", "relu", 2),
    "BartForConditionalGeneration": (RELU, "SparseLinear", "relu", 2),
    "BertForMaskedLM": (RELU, "SparseLinear", "relu", 1),
    "GPTNeoXForCausalLM": (RELU, "SparseMLP", "relu", 1),
    "LlamaForCausalLM": (RELU, "SparseMLP", "reglu", 1),  # as ReLU-fied Llamas have it
    "BitNetForCausalLM": ({}, "BitNetRMSNorm in between, which keeps none", "relu2", 0),
    "LlamaModel": ({}, "got silu", None, 0),
}


def logits(model):
    more = {"decoder_input_ids": TOKENS} if model.config.is_encoder_decoder else {}
    return model(input_ids=TOKENS, **more)[0]


@pytest.mark.parametrize("name", MODELS)
def test_relu_models_are_swapped_or_kept_with_a_reason(name):
    options, becomes, activation, count = MODELS[name]
    build = getattr(transformers, name)
    model = build(build.config_class(**SIZES | options)).eval()
    twin = copy.deepcopy(model)
    report = dc.convert.relu_sparse(model)
    assert [(s.now, s.activation) for s in report.swapped] == [(becomes, activation)] * count
    assert [k.reason.endswith(becomes) for k in report.kept] == [True] * (not count)
    with torch.no_grad(), dc.execution("sparse"):
        torch.testing.assert_close(logits(model), logits(twin), rtol=1e-4, atol=1e-4)
