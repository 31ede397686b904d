"""`dyncore audit` as a user calls it."""

import json

import pytest
import torch

from dyncore.cli import main

MODELS = "tests.audit.models"


def audit(*args):
    return main(["audit", *args, "--seconds", "0.001"])


def refused(*args):
    with pytest.raises(SystemExit) as done:
        audit(*args)
    return done.value.code


def test_from_end_to_end(tmp_path, capsys):
    out = tmp_path / "audit.json"
    assert audit(f"{MODELS}:Whole", "--inputs", "64x64", "--out", str(out)) == 0
    shown = capsys.readouterr().out
    for words in (
        "Whole: ",
        "inputs: [64, 64] float32",
        "GFLOP",
        "how",
        "dyncore.convert.relu_sparse(model)",
        "why not",
        "the inputs are random numbers",
    ):
        assert words in shown
    document = json.loads(out.read_text())
    assert document["command"].startswith(f"dyncore audit {MODELS}:Whole --inputs 64x64")
    assert len(document["records"]) == 7


@pytest.mark.parametrize("factory", [f"{MODELS}:with_inputs", f"{MODELS}:instance"])
def test_factories_may_give_inputs_and_be_models(factory, capsys):
    inputs = [] if factory.endswith("inputs") else ["--inputs", "2x8:int64<vocab"]
    assert audit(factory, *inputs) == 0
    assert "relu" in capsys.readouterr().out


def test_a_file_of_python_and_a_file_of_inputs(tmp_path, capsys):
    (tmp_path / "mine.py").write_text(
        "import torch\nclass Box:\n  make = staticmethod(lambda: torch.nn.Linear(8, 8))\n"
    )
    torch.save(torch.randn(4, 8), tmp_path / "x.pt")
    assert audit(f"{tmp_path / 'mine.py'}:Box.make", "--inputs", str(tmp_path / "x.pt")) == 0
    assert "Linear: 72 parameters" in capsys.readouterr().out


def test_a_failing_model_keeps_partial_results(tmp_path, capsys):
    out = tmp_path / "audit.json"
    assert audit(f"{MODELS}:Whole", "--inputs", "64x63", "--out", str(out)) == 1
    shown = capsys.readouterr().out
    error, found = shown.index("error: the model: forward on [64, 63] float32 failed in"), shown.index("nothing was")
    assert error < found < shown.index("dyncore.convert.relu_sparse(model)")
    assert "if skipped" not in shown  # no table of dashes
    document = json.loads(out.read_text())
    assert document["errors"][0]["point"] == "the model"
    assert [r["name"] for r in document["records"]][:2] == ["relu", "gelu"]


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        (f"{MODELS}:fails", f"factory: {MODELS}:fails failed: OSError: no such weights ("),
        (f"{MODELS}:needs_a_gpu", f"factory: {MODELS}:needs_a_gpu failed: "),
        ("tests.audit.broken:model", "factory: importing tests.audit.broken failed: ZeroDivisionError"),
    ],
)
def test_a_factory_that_fails_is_status_1_and_one_line(factory, message, capsys, monkeypatch):
    if torch.cuda.is_available() and "gpu" in factory:
        pytest.skip("there is a GPU")
    assert audit(factory, "--inputs", "1x1") == 1
    err = capsys.readouterr().err
    assert f"dyncore audit: {message}" in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([MODELS], "argument factory: expected package.module:factory or file.py:factory, got"),
        (["no.such:thing"], "argument factory: expected a module that can be imported, got 'no.such'"),
        (["none.py:thing"], "argument factory: expected a file or module that is there, got 'none.py'"),
        ([f"{MODELS}:nothing"], f"argument factory: expected a name in {MODELS}, which has no 'nothing'"),
        ([f"{MODELS}:number"], "argument factory: expected a callable or a torch.nn.Module"),
        ([f"{MODELS}:a_string"], f"argument factory: expected {MODELS}:a_string to give a torch.nn.Module, got str"),
        ([f"{MODELS}:Whole"], "argument --inputs: expected --inputs with a file or shapes"),
        ([f"{MODELS}:Whole", "--inputs", "0x64"], "argument --inputs: expected sizes above 0, got '0x64'"),
        ([f"{MODELS}:Whole", "--inputs", "many"], "argument --inputs: expected a file or a shape"),
        (
            [f"{MODELS}:Whole", "--device", "cuda:77"],
            "argument --device: expected a device that is there, PyTorch finds",
        ),
        ([f"{MODELS}:Whole", "--out", "/proc/nope/x"], "argument --out: expected a file in a folder that is there"),
        ([f"{MODELS}:Whole", "--out", "/"], "argument --out: expected a file, got '/'"),
    ],
)
def test_bad_arguments_are_one_line_and_status_2(args, message, capsys):
    assert refused(*args) == 2
    out, err = capsys.readouterr()
    assert message in err
    assert (out, err.count("\n")) == ("", 1)


def test_help_has_examples(capsys):
    with pytest.raises(SystemExit):
        main(["audit", "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    for words in ("examples:", "--inputs", "--device", "Ctrl-C", "Exit status"):
        assert words in shown


@pytest.mark.parametrize("kind", ["OPT", "Mixtral", "T5"])
def test_models_of_transformers(kind, capsys):
    transformers = pytest.importorskip("transformers")
    sizes = {
        "OPT": {"hidden_size": 32, "word_embed_proj_dim": 32, "ffn_dim": 64, "num_hidden_layers": 2},
        "Mixtral": {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_local_experts": 4},
        "T5": {"d_model": 32, "d_ff": 64, "d_kv": 8, "num_layers": 1, "num_heads": 4},
    }
    config = getattr(transformers, f"{kind}Config")(vocab_size=50, **sizes[kind])
    if kind != "T5":
        config.num_attention_heads, config.num_key_value_heads = 4, 4
    model = getattr(transformers, f"{kind}ForC{'onditionalGeneration' if kind == 'T5' else 'ausalLM'}")(config)
    from dyncore.audit import audit
    from dyncore.audit.loading import load_inputs

    inputs = load_inputs([] if kind == "T5" else ["input_ids=2x8:int64<vocab"], model)
    found = audit(model, inputs, seconds=0.001)
    assert found.errors == []
    names = {
        "OPT": "model.decoder.layers.1",
        "Mixtral": "model.layers.0.mlp.experts",
        "T5": "decoder.block.0.layer.2.DenseReluDense",
    }
    (layer,) = [each for each in found.layers if each.name == names[kind]]
    assert layer.speedup > 0
    expected = "set_experts_implementation" if kind == "Mixtral" else "relu_sparse"
    assert expected in layer.how
