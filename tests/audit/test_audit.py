"""What an audit finds in models that are written as people write them."""

import dataclasses
import json

import pytest
import torch
from torch import nn

from dyncore.audit import Layer, audit
from dyncore.audit.loading import as_inputs, load_inputs
from dyncore.measure import Timing
from dyncore.measure.calls import tensors
from dyncore.measure.masked_layers import mask_of
from dyncore.nn import MoE, Skip
from tests.audit import models

SECONDS = 0.001


def audited(model, inputs, **options):
    return audit(model, inputs, seconds=SECONDS, **options)


@pytest.fixture(scope="module")
def whole():
    torch.manual_seed(1)
    return audited(models.Whole(), torch.randn(64, 64))


def layer(found, name, kind=None):
    (one,) = [each for each in found.layers if each.name == name and kind in (None, each.kind)]
    return one


def test_each_layer_is_found_in_the_order_of_the_model(whole):
    assert [(each.name, each.kind) for each in whole.layers] == [
        ("relu", "relu"),
        ("gelu", "other"),
        ("moe", "moe"),
        ("masked.block", "masked"),
        ("skip", "dynamic"),
        ("skip.module", "other"),
        ("unused", "relu"),
    ]
    assert whole.errors == []


def test_flops_are_those_of_counting_by_hand(whole):
    mlp = 2 * 2 * 64 * 64 * 256  # 64 rows
    assert layer(whole, "relu").flops["now"] == mlp
    assert layer(whole, "skip").flops == {"now": mlp, "replaced": mlp // 2}
    assert layer(whole, "masked.block").flops == {"now": mlp, "replaced": mlp // 4}
    router = 2 * 64 * 64 * 4
    assert layer(whole, "moe").flops == {"now": 2 * mlp + router, "replaced": 2 * mlp + router}
    assert whole.model["flops"]["now"] == mlp * (2 + 2 + 1) + mlp // 2 + router


def test_zeros_are_counted_and_estimated(whole):
    relu = layer(whole, "relu")
    assert 0 < relu.density < 0.3
    assert relu.flops["replaced"] < relu.flops["now"]
    assert sum(relu.sparsity["histogram"]) == 64
    assert set(relu.estimated) == {"decode, 1 row", "decode, 8 rows", "forward", "training"}
    assert relu.break_even == pytest.approx(0.45)  # the default of float32


def test_what_is_measured_has_times_and_the_line_of_code(whole):
    for name in ("relu", "moe", "masked.block", "skip"):
        assert layer(whole, name).speedup > 0
    assert layer(whole, "relu").how == "dyncore.convert.relu_sparse(model)"
    assert (
        "model.moe = dyncore.nn.MoE.from_experts(list(model.moe.experts), model.moe.router" in layer(whole, "moe").how
    )
    assert "model.masked.block = dyncore.nn.Skip(model.masked.block, gate" in layer(whole, "masked.block").how
    assert set(whole.model["timings"]) == {"now", "replaced"}


def test_speed_ups_of_samples_that_spread_are_marked(whole):
    steady, wild = Timing((100, 101, 102)), Timing((100, 200, 400))
    found = Layer("mlp", "Linear", "relu", "an MLP", timings={"now": steady, "replaced": steady})
    assert not found.noisy
    shown = dataclasses.replace(whole, layers=[dataclasses.replace(found, timings={"now": steady, "replaced": wild})])
    assert "0.51x~" in str(shown)
    assert shown.record()["records"][0]["noisy"]


def test_mixtures_come_before_relu_sparse_which_would_take_their_experts(whole):
    untimed = [dataclasses.replace(found, timings={}) for found in whole.layers]
    shown = str(dataclasses.replace(whole, layers=untimed))
    assert shown.index("MoE.from_experts(list") < shown.index("dyncore.convert.relu_sparse(model)")


def test_why_not_is_said(whole):
    assert "got gelu" in layer(whole, "gelu").why_not
    assert layer(whole, "unused").why_not == "these inputs do not reach it"
    text = str(whole)
    for words in ("why not", "these inputs do not reach it", "got gelu", "break-even"):
        assert words in text


def test_the_model_is_left_as_it_was():
    model = models.Whole().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    audited(model, torch.randn(8, 64))
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(module.training for module in model.modules())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert type(model.relu) is nn.Sequential
    assert isinstance(model.moe, models.Loop)


@pytest.mark.parametrize(("top_k", "normalize"), [(1, False), (2, True), (3, False)])
def test_the_line_of_code_for_experts_gives_the_same_numbers(top_k, normalize):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), models.Loop(top_k, normalize)).eval()
    x = torch.randn(32, 64)
    found = layer(audited(model, x), "1")
    assert found.density == top_k / 4
    with torch.no_grad():
        want = model(x)
        exec(f"import dyncore\n{found.how}", {"model": model})
        assert isinstance(model[1], MoE)
        torch.testing.assert_close(model(x), want)


def test_a_block_of_experts_that_returns_a_pair_is_measured_and_not_replaced():
    found = audited(models.Loop(pair=True), torch.randn(32, 64))
    assert "it gives the output alone" in layer(found, "the model").how
    assert layer(found, "the model").speedup > 0


def test_a_routing_of_another_kind_is_named():
    found = layer(audited(models.Loop(sigmoid=True), torch.randn(32, 64)), "the model")
    assert "dyncore.route(expert, weight, num_groups=4)" in found.why_not
    assert found.how is None


def test_experts_of_an_unknown_build_are_named():
    model = models.Loop()
    for expert in model.experts:
        expert.append(nn.LayerNorm(64))
    found = layer(audited(model, torch.randn(32, 64)), "the model")
    assert found.kind == "moe"
    assert "experts.0" in found.why_not


def test_stacked_weights_are_named():
    found = layer(audited(models.Stacked(), torch.randn(32, 64)), "the model")
    assert "dyncore.grouped_mlp" in found.why_not
    assert found.flops["now"] > 0


@pytest.mark.parametrize("how", ["mul", "where", "fill"])
def test_a_mask_is_seen_however_it_is_multiplied(how):
    found = layer(audited(models.Masked(how), torch.randn(32, 64)), "block", "masked")
    assert found.density == 0.25
    assert found.flops["replaced"] * 4 == found.flops["now"]


def test_experts_that_compute_every_row_are_no_skips():
    found = audited(models.Everyone(), torch.randn(12, 64))
    for i in range(3):
        expert = layer(found, f"experts.{i}", "masked")
        assert expert.how is None
        assert "it and 2 beside it compute the same rows" in expert.why_not
        assert "num_groups=3" in expert.why_not


def test_rows_that_are_mixed_cannot_be_left_out():
    model = models.Masked()
    model.block = nn.Sequential(nn.Linear(64, 64), nn.Softmax(dim=0))
    found = layer(audited(model, torch.randn(32, 64)), "block", "masked")
    assert "it mixes rows" in found.why_not
    assert found.how is None


def test_samples_of_pictures_are_rows_too():
    class Pictures(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = nn.Conv2d(8, 8, 3, padding=1)

        def forward(self, x):
            return x + (torch.arange(len(x)) % 2).view(-1, 1, 1, 1) * self.block(x)

    found = layer(audited(Pictures(), torch.randn(8, 8, 6, 6)), "block", "masked")
    assert found.density == 0.5
    assert found.flops["now"] == 2 * found.flops["replaced"]


def test_factors_that_are_no_masks_of_rows_are_none():
    y = torch.randn(4, 3, 8)
    assert mask_of(torch.randn(4, 3, 1), y) is None  # nothing is 0
    assert mask_of(torch.zeros(8), y) is None  # columns
    assert mask_of(torch.tensor(0.0), y) is None
    assert mask_of(torch.tensor([[1.0], [0.0], [2.0]]), y).tolist() == [[True, False, True]] * 4
    assert mask_of(torch.tensor([1.0, 0, 0, 1]).view(4, 1, 1), y).tolist() == [True, False, False, True]


def test_a_dynamic_layer_that_skips_nothing_is_exposed():
    found = layer(audited(models.Fake(), torch.randn(32, 64)), "the model")
    assert found.flop_speedup == 1.0
    assert found.density == 0.5
    assert "nothing was skipped" in found.why_not


def test_modes_that_disagree_are_an_error_with_the_layers_name():
    found = audited(nn.Sequential(nn.Linear(64, 64), models.Wrong()), torch.randn(32, 64))
    (error,) = found.errors
    assert error["point"] == "1"
    assert "differ" in error["message"]
    assert layer(found, "1").speedup is None


def test_a_model_that_fails_leaves_what_was_found():
    found = audited(models.Whole(), torch.randn(64, 63))
    (error,) = found.errors
    assert error["point"] == "the model"
    assert "forward on [64, 63] float32 failed in relu.0 (Linear): RuntimeError: " in error["message"]
    assert layer(found, "relu").how == "dyncore.convert.relu_sparse(model)"
    assert not any(m._forward_hooks for m in models.Whole().modules())


def test_a_model_that_cannot_be_copied_is_said():
    found = audited(models.Uncopyable(), torch.randn(8, 64))
    assert "cannot be copied" in found.errors[0]["message"]
    assert found.model["flops"]["now"] > 0


@pytest.mark.parametrize("scale", [None, torch.ones(8, 64)])
def test_dataclasses_and_keywords(scale):
    x = torch.randn(8, 64)
    found = audited(models.Structured(), {"x": x} if scale is None else {"x": x, "scale": scale})
    assert found.errors == []
    assert layer(found, "relu").speedup > 0
    assert len(tensors(models.Structured()(x))) == 3


def test_a_model_without_tensors_in_its_output_is_noted():
    class Number(models.Structured):
        def forward(self, x):
            return float(self.relu(x).sum())

    found = audited(Number(), torch.randn(8, 64))
    assert "the model returns float without tensors" in " ".join(found.notes)
    assert layer(found, "relu").speedup > 0


def test_a_compiled_model_is_audited_as_the_module_inside():
    model = torch.compile(models.Structured(), backend="eager")
    found = audited(model, torch.randn(8, 64))
    assert layer(found, "relu").density is not None
    assert "the model is compiled" in " ".join(found.notes)


def test_gates_that_draw_are_held_against_the_same_draw():
    class Draw(nn.Module):
        def forward(self, x):
            return torch.rand(x.shape[0]) < 0.5

    found = audited(Skip(nn.Linear(64, 64), Draw()), torch.randn(32, 64))
    assert found.errors == []


def test_a_model_of_which_no_flop_is_counted_says_so():
    found = audited(nn.LayerNorm(8), torch.randn(4, 8))
    assert "no FLOPs were counted" in " ".join(found.notes)


def test_ops_that_nobody_can_count_are_named():
    @torch.library.custom_op("dyncore_audit_test::double", mutates_args=())
    def double(x: torch.Tensor) -> torch.Tensor:
        return x * 2

    class Custom(nn.Linear):
        def forward(self, x):
            return double(super().forward(x))

    model = nn.Sequential(Custom(8, 8), Skip(nn.Linear(8, 8), lambda x: x[:, 0] > 0))
    found = audited(model, torch.randn(4, 8))
    assert [layer.name for layer in found.layers] == ["1"]
    assert found.model["uncounted"] == {"dyncore_audit_test::double": 1}
    assert "not counted, for nobody knows their FLOPs: dyncore_audit_test::double x1" in str(found)


def test_nothing_to_replace_is_said():
    found = audited(nn.Linear(8, 8), torch.randn(4, 8))
    assert found.layers == []
    assert "no dynamic layer of dyncore, and none that dyncore replaces" in str(found)
    assert found.model["timings"]["now"].median > 0


def test_ctrl_c_keeps_what_was_measured():
    model = models.Whole()

    def interrupt(text):
        if text == "moe":
            raise KeyboardInterrupt

    found = audited(model, torch.randn(16, 64), progress=interrupt)
    assert found.interrupted
    assert layer(found, "relu").speedup > 0
    assert layer(found, "moe").speedup is None
    assert found.record()["interrupted"]


def test_the_record_is_json_and_its_rows_a_table(whole, tmp_path):
    path = tmp_path / "audit.json"
    whole.to_json(path)
    document = json.loads(path.read_text())
    assert document["schema"] == "dyncore.audit/1"
    assert document["break_evens"] in ("defaults", "measured")
    assert document["environment"]["versions"]["torch"] == torch.__version__
    names = {name for record in document["records"] for name in record}
    assert {"name", "kind", "flops", "density", "break_even", "speedup", "timings", "how", "why_not"} <= names
    assert document["records"][0]["timings"]["now"]["samples_ns"]


@pytest.mark.parametrize(
    ("args", "error", "message"),
    [
        (("model", torch.ones(1)), TypeError, "model: expected a torch.nn.Module, got str"),
        ((nn.Linear(1, 1), torch.ones(1), 0), ValueError, "seconds: expected a number above 0, got 0"),
    ],
)
def test_bad_arguments_are_named(args, error, message):
    model, inputs, *seconds = args
    with pytest.raises(error, match=message):
        audit(model, inputs, seconds=seconds[0] if seconds else 1)


@pytest.mark.parametrize("spec", ["2x8:int64<vocab", "2x8:int64<50", "ids=2x8:int64", "ids=2x8<50"])
def test_token_numbers_are_below_their_bound(spec):
    inputs = load_inputs([spec], models.Tokens())
    ids = inputs.kwargs["ids"] if "ids" in spec else inputs.args[0]
    assert ids.shape == (2, 8)
    assert ids.dtype == torch.int64
    assert 40 <= ids.max() + 12 <= 61
    assert inputs.call(models.Tokens()).shape == (2, 8, 64)


def test_shapes_make_tensors_of_the_models_dtype():
    inputs = load_inputs(["4x8", "4x8:float16", "mask=4x8:bool"], nn.Linear(8, 8).bfloat16())
    assert [t.dtype for t in inputs.args] == [torch.bfloat16, torch.float16]
    assert inputs.kwargs["mask"].all()


@pytest.mark.parametrize(
    ("value", "args", "kwargs"),
    [(torch.ones(2), 1, []), ((1, torch.ones(2)), 2, []), ([torch.ones(2)], 1, []), ({"x": torch.ones(2)}, 0, ["x"])],
)
def test_inputs_of_a_file(value, args, kwargs, tmp_path):
    path = tmp_path / "batch.pt"
    torch.save(value, path)
    inputs = load_inputs([str(path)], nn.Linear(2, 2))
    assert len(inputs.args) == args
    assert list(inputs.kwargs) == kwargs
    assert as_inputs(inputs) is inputs


@pytest.mark.parametrize(
    ("specs", "message"),
    [
        (["8xx2"], "inputs: expected a file or a shape such as"),
        (["8x2:float31"], "inputs: expected a dtype of torch, got 'float31'"),
        (["8x2:float32<4"], "inputs: expected a bound with whole numbers alone"),
        (["8x2:int64"], "inputs: expected a bound such as 8x2:int64<100, for the model holds no nn.Embedding"),
        (["8x2:int64<0"], "inputs: expected a bound above 0"),
        (["x=8", "x=9"], "inputs: expected each name once"),
        ([], r"inputs: expected --inputs with a file or shapes .* forward takes \(input"),
    ],
)
def test_bad_inputs_are_named(specs, message):
    with pytest.raises(ValueError, match=message):
        load_inputs(specs, nn.Linear(2, 2))


def test_files_of_other_things_are_refused(tmp_path):
    path = tmp_path / "batch.pt"
    torch.save({"x": Skip}, path)
    with pytest.raises(ValueError, match=r"tensors, numbers, tuples, .*, got .*batch.pt, which .* refuses$"):
        load_inputs([str(path)], nn.Linear(2, 2))
    path.write_text("hello")
    with pytest.raises(ValueError, match="inputs: expected"):
        load_inputs([str(path)], nn.Linear(2, 2))
    with pytest.raises(ValueError, match="inputs: expected one file, or shapes alone"):
        load_inputs([str(path), "8x2"], nn.Linear(2, 2))


@pytest.mark.parametrize(
    ("now", "replaced", "words"),
    [
        ((100, 200, 300, 120, 90, 400), (100, 90, 310, 150, 200, 120), "whether it pays is not known: 0."),
        ((200,) * 6, (100,) * 6, None),
        ((100,) * 6, (100,) * 6, "what it saves is lost again at this size: measured 1.00x"),
    ],
)
def test_a_verdict_is_given_where_the_samples_carry_it(now, replaced, words):
    found = Layer("0", "Linear", "masked", "rows", how="a line of code")
    found.timings = {"now": Timing(now), "replaced": Timing(replaced)}
    found.judge()
    assert (found.why_not or "").startswith(words) if words else found.why_not is None
