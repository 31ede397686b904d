"""dyncore.masks: generated masks have the statistics they promise, recorded ones come back to the bit."""

import json
import math
import subprocess
import sys

import pytest
import torch

from dyncore import masks


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def correlation(x, y):
    """Pearson's, of two float tensors."""
    return float(torch.corrcoef(torch.stack([x.flatten().double(), y.flatten().double()]))[0, 1])


@pytest.mark.parametrize("preset", masks.PRESETS)
def test_firing_rates_follow_the_beta_distribution(preset):
    a, b = masks.PRESETS[preset]
    rates = masks.beta(400, 20_000, preset=preset, generator=seeded()).double().mean(0)
    mean = a / (a + b)
    variance = a * b / ((a + b) ** 2 * (a + b + 1))
    sampling = (mean - mean**2 - variance) / 400  # of a rate seen through 400 tokens
    assert rates.mean() == pytest.approx(mean, rel=0.03)
    assert rates.var() == pytest.approx(variance + sampling, rel=0.06)


def test_rates_of_beta_one_one_are_uniform():
    rates = masks.beta(1000, 4000, a=1, b=1, generator=seeded()).double().mean(0).sort().values
    assert (rates - torch.linspace(0, 1, 4000)).abs().max() < 0.05


@pytest.mark.parametrize("density", [0.0, 0.01, 0.2, 0.5, 0.95, 1.0])
def test_uniform_masks_have_their_density(density):
    mask = masks.uniform(500, 400, density=density, generator=seeded())
    assert mask.dtype == torch.bool
    assert mask.double().mean().item() == pytest.approx(density, abs=4 * math.sqrt(density * (1 - density) / 200_000))


@pytest.mark.parametrize("density", [0.005, 0.05, 0.2, 0.7])
@pytest.mark.parametrize(
    "options", [{}, {"token_scale": 0.8}, {"dead": 0.25}, {"token_scale": 1.5, "correlation": 0.5}]
)
def test_a_target_density_is_reached_whatever_the_rates(density, options):
    mask = masks.beta(600, 3000, preset="opt-30b", density=density, generator=seeded(), **options)
    assert mask.double().mean().item() == pytest.approx(density, rel=0.06)


def test_the_dead_never_fire_and_their_share_is_exact():
    mask = masks.uniform(300, 1000, density=0.5, dead=0.3, generator=seeded())
    assert int((~mask.any(0)).sum()) == 300
    full = masks.uniform(10, 1000, density=0.7, dead=0.3, generator=seeded())  # the live ones always
    assert torch.equal(full.sum(0) % 10, torch.zeros(1000, dtype=torch.int64))
    assert int(full[0].sum()) == 700


@pytest.mark.parametrize("latent", [0.0, 0.5, 0.9])
def test_neighbouring_tokens_are_correlated_as_the_copula_says(latent):
    mask = masks.uniform(2000, 500, density=0.5, correlation=latent, generator=seeded()).double()
    # Sheppard 1899: two Gaussians of correlation r are both under their median with probability 1/4 + asin(r) / (2 pi)
    for distance in (1, 2):
        expected = 2 / math.pi * math.asin(latent**distance)
        assert correlation(mask[distance:], mask[:-distance]) == pytest.approx(expected, abs=0.01)
    assert abs(correlation(mask[:, 1:], mask[:, :-1])) < 0.01  # not so neighbouring neurons


def test_correlation_leaves_the_rates_alone():
    rates = masks.uniform(20_000, 50, density=0.1, correlation=0.8, generator=seeded()).double().mean(0)
    assert rates.mean() == pytest.approx(0.1, abs=0.002)
    first = torch.stack([masks.uniform(3, 2000, density=0.1, correlation=0.8, generator=seeded(i)) for i in range(40)])
    assert first.double().mean((0, 2)).tolist() == pytest.approx([0.1] * 3, abs=0.005)  # stationary from the first row


def test_correlation_runs_on_across_blocks(monkeypatch):
    whole = masks.uniform(64, 40, density=0.3, correlation=0.9, generator=seeded())
    monkeypatch.setattr("dyncore.masks.generators._BLOCK", 16 * 40)
    assert torch.equal(masks.uniform(64, 40, density=0.3, correlation=0.9, generator=seeded()), whole)


def test_tokens_differ_in_scale():
    def spread(scale):
        per_token = masks.uniform(4000, 2000, density=0.02, token_scale=scale, generator=seeded()).double().sum(1)
        return float((per_token + 0.5).log().std())

    assert spread(0.0) < 0.2
    assert spread(0.8) == pytest.approx(0.8, abs=0.08)


def test_the_generator_decides_the_mask():
    options = {"preset": "opt-66b", "token_scale": 0.5, "dead": 0.1, "correlation": 0.3}
    one, same, other = (masks.beta(50, 200, generator=seeded(s), **options) for s in (1, 1, 2))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    before = torch.get_rng_state()
    masks.activations(masks.beta(5, 20, generator=seeded(), **options), generator=seeded())
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(("rows", "neurons"), [(0, 5), (5, 0), (0, 0), (1, 1)])
def test_small_and_empty_masks(rows, neurons):
    assert masks.beta(rows, neurons, preset="opt-30b", correlation=0.5, density=0.1).shape == (rows, neurons)
    assert masks.uniform(rows, neurons, density=1).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_activations_are_half_normal_where_the_mask_is_true(dtype):
    mask = masks.uniform(500, 400, density=0.4, generator=seeded())
    h = masks.activations(mask, dtype=dtype, generator=seeded())
    assert h.dtype == dtype
    assert torch.equal(h != 0, mask)
    assert (h >= 0).all()
    fired = h[mask].double()
    assert fired.mean().item() == pytest.approx(math.sqrt(2 / math.pi), rel=0.02)
    assert fired.square().mean().item() == pytest.approx(1, rel=0.03)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: masks.beta(3, 4), "a, b: expected both, or a preset"),
        (lambda: masks.beta(3, 4, a=1), "a, b: expected both, or a preset"),
        (lambda: masks.beta(3, 4, a=0, b=1), "a: expected a positive number, got 0"),
        (lambda: masks.beta(3, 4, a=1, b=math.inf), "b: expected a positive number, got inf"),
        (lambda: masks.beta(3, 4, preset="opt-1b"), "preset: expected one of opt-6.7b, opt-30b, opt-66b, got 'opt-1b'"),
        (lambda: masks.beta(3, 4, preset="opt-30b", a=1, b=1), "preset: expected a preset or a and b, got both"),
        (lambda: masks.uniform(-1, 4, density=0.1), "rows: expected an int >= 0, got -1"),
        (lambda: masks.uniform(3, 4.0, density=0.1), "neurons: expected an int >= 0, got 4.0"),
        (lambda: masks.uniform(3, 4, density=1.1), "density: expected a number from 0 to 1, got 1.1"),
        (lambda: masks.uniform(3, 4, density=math.nan), "density: expected a number from 0 to 1, got nan"),
        (lambda: masks.uniform(3, 4, density=0.9, dead=0.5), "density: expected at most the share .* 0.5, got 0.9"),
        (lambda: masks.uniform(3, 4, density=0.1, dead=-1), "dead: expected a number from 0 to 1, got -1"),
        (lambda: masks.uniform(3, 4, density=0.1, correlation=1), "correlation: expected a number from 0 to below 1"),
        (lambda: masks.uniform(3, 4, density=0.1, token_scale=-1), "token_scale: expected a number >= 0, got -1"),
        (lambda: masks.replay(torch.ones(0, 4, dtype=torch.bool), 3), r"mask: expected at least one row .* \[0, 4\]"),
        (lambda: masks.replay(torch.ones(4, dtype=torch.bool), 3), r"mask: expected shape \[T, I\], got \[4\]"),
        (lambda: masks.replay(torch.ones(4, 4, dtype=torch.bool), -3), "rows: expected an int >= 0, got -3"),
    ],
)
def test_wrong_values_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_what_is_not_a_mask_is_refused(tmp_path):
    with pytest.raises(TypeError, match=r"mask: expected a bool tensor, got torch.float32"):
        masks.activations(torch.ones(3, 4))
    with pytest.raises(TypeError, match=r"dtype: expected a floating-point dtype, got torch.int32"):
        masks.activations(torch.ones(3, 4, dtype=torch.bool), dtype=torch.int32)
    for unnamed, kind in ((torch.ones(2, 3) > 0, "Tensor"), ([torch.ones(2, 3) > 0], "list")):
        with pytest.raises(TypeError, match=f"layers: expected masks by name, such as .*, got {kind}"):
            masks.save(tmp_path / "masks", unnamed, source="")
    with pytest.raises(TypeError, match=r"layers\['a'\]: expected a bool tensor, got list"):
        masks.save(tmp_path / "masks", {"a": [True]}, source="")
    with pytest.raises(ValueError, match="layers: expected masks, got none"):
        masks.save(tmp_path / "masks", {}, source="")


# Recordings -----------------------------------------------------------------------------------------------------------


def test_recorded_masks_come_back_to_the_bit(tmp_path):
    layers = {
        f"layer {rows} {neurons}": masks.uniform(rows, neurons, density=0.3, generator=seeded(rows))
        for rows, neurons in [(1, 1), (7, 9), (8, 16), (100, 63), (0, 5), (5, 0)]
    }
    layers["of another memory"] = layers["layer 100 63"].t()[3:50:2]
    masks.save(tmp_path / "masks", layers, source="some text", command="a command")
    again = masks.load(tmp_path / "masks")
    assert (again.source, again.command) == ("some text", "a command")
    assert list(again.layers) == list(layers)
    for name, mask in layers.items():
        assert torch.equal(again.layers[name], mask)
        assert again.layers[name].dtype == torch.bool


def test_the_file_is_what_its_description_says(tmp_path):
    import zlib

    mask = torch.zeros(9, 3, dtype=torch.bool)
    mask[0, 0] = mask[3, 1] = mask[8, 1] = True
    masks.save(tmp_path / "masks", {"a": mask}, source="s")
    first, _, rest = (tmp_path / "masks").read_bytes().partition(b"\n")
    assert json.loads(first) == {
        "schema": "dyncore.masks/1",
        "source": "s",
        "command": "",
        "layers": [{"name": "a", "rows": 9, "neurons": 3}],
    }
    assert zlib.decompress(rest) == bytes([1, 0, 8, 1, 0, 0])


def test_realistic_masks_are_stored_in_less_than_their_bits(tmp_path):
    mask = masks.beta(512, 2048, preset="opt-6.7b", dead=0.2, generator=seeded())
    masks.save(tmp_path / "masks", {"a": mask}, source="")
    assert (tmp_path / "masks").stat().st_size < 0.35 * mask.numel() / 8


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "begins with no JSON"),
        (b"\x80\x81\n", "begins with no JSON"),
        (b"[]\n", "expected masks of schema dyncore.masks/1, .* has None"),
        (b'{"schema": "dyncore.routing/1"}\n', "has 'dyncore.routing/1'"),
        (b'{"schema": "dyncore.masks/1"}\n', "is damaged"),
        (b'{"schema": "dyncore.masks/1", "source": "", "command": "", "layers": []}\nxyz', "is damaged"),
    ],
)
def test_a_file_of_something_else_is_refused(tmp_path, content, message):
    (tmp_path / "masks").write_bytes(content)
    with pytest.raises(ValueError, match=f"path: .*{message}"):
        masks.load(tmp_path / "masks")


def test_a_truncated_file_is_refused(tmp_path):
    masks.save(tmp_path / "masks", {"a": masks.uniform(50, 50, density=0.5)}, source="")
    content = (tmp_path / "masks").read_bytes()
    (tmp_path / "masks").write_bytes(content[:-9])
    with pytest.raises(ValueError, match="is damaged"):
        masks.load(tmp_path / "masks")
    (tmp_path / "masks").write_bytes(content.replace(b'"rows": 50', b'"rows": 90'))
    with pytest.raises(ValueError, match=r"is damaged \(expected 600 bytes of masks, got 350\)"):
        masks.load(tmp_path / "masks")


def test_replay_cycles_the_rows():
    mask = masks.uniform(5, 8, density=0.5, generator=seeded())
    assert torch.equal(masks.replay(mask, 5), mask)
    assert torch.equal(masks.replay(mask, 12), torch.cat([mask, mask, mask[:2]]))
    assert torch.equal(masks.replay(mask, 3, start=4), torch.stack([mask[4], mask[0], mask[1]]))
    assert torch.equal(masks.replay(mask, 5, 3), mask[:, :3])


def test_replay_repeats_neurons_as_they_fired_elsewhere():
    mask = masks.uniform(6, 8, density=0.5, generator=seeded())
    wide = masks.replay(mask, 6, 20)
    assert torch.equal(wide[:, :8], mask)
    assert torch.equal(wide[:, 8:16], mask.roll(-2, 0))
    assert torch.equal(wide[:, 16:], mask.roll(-4, 0)[:, :4])


def test_masks_are_loaded_at_first_use():
    probe = "import sys, dyncore; assert 'dyncore.masks' not in sys.modules; dyncore.masks.uniform(2, 3, density=0.5)"
    subprocess.run([sys.executable, "-c", probe], check=True)


def test_a_generator_that_is_none_names_itself():
    mask = torch.ones(2, 3, dtype=torch.bool)
    for make in (
        lambda g: masks.beta(2, 3, preset="opt-30b", generator=g),
        lambda g: masks.uniform(2, 3, density=0.1, generator=g),
        lambda g: masks.activations(mask, generator=g),
    ):
        with pytest.raises(TypeError, match=r"generator: expected a torch\.Generator or None, got int"):
            make(5)


@pytest.mark.parametrize("pattern", masks.ROW_PATTERNS)
@pytest.mark.parametrize("tile", [1, 8, 1000])
def test_row_masks_keep_the_exact_share_in_whole_tiles(pattern, tile):
    mask = masks.row_mask(pattern, 16, 64, 0.25, tile=tile, generator=torch.Generator().manual_seed(0))
    assert mask.shape == (16, 64)
    assert int(mask.sum()) == 256
    units = mask.view(16, -1, min(tile, 64))
    assert (units.all(-1) == units.any(-1)).all()
    assert masks.row_mask(pattern, 2, 64, 1.0).all()
    assert not masks.row_mask(pattern, 2, 64, 0.0).any()
    assert masks.row_mask(pattern, 0, 4, 0.5).shape == (0, 4)


def test_patterns_of_rows_differ_as_they_say():
    drawn = {
        p: masks.row_mask(p, 32, 256, 0.25, generator=torch.Generator().manual_seed(0)) for p in masks.ROW_PATTERNS
    }
    runs = {p: float((m[:, 1:] & m[:, :-1]).sum() / m.sum()) for p, m in drawn.items()}  # kept after a kept one
    assert runs["adversarial"] == 0
    assert abs(runs["iid"] - 0.25) < 0.05
    assert runs["clustered"] > 0.7
    between = {p: float(m.float().mean(1).std()) for p, m in drawn.items()}  # of the samples' shares
    assert between["adversarial"] < 0.01 < between["iid"] < 0.05
    assert between["correlated"] > 0.25
    tiles = {p: float(m.view(32, -1, 4).any(-1).float().mean()) for p, m in drawn.items()}
    assert tiles["adversarial"] == 1.0
    assert tiles["clustered"] < tiles["iid"]


@pytest.mark.parametrize(
    ("args", "more", "message"),
    [
        (("zigzag", 1, 1, 0.5), {}, "pattern: expected one of iid, clustered, correlated, adversarial, got 'zigzag'"),
        (("iid", -1, 1, 0.5), {}, "batch: expected an int >= 0, got -1"),
        (("iid", 1, 1.0, 0.5), {}, r"rows: expected an int >= 0, got 1\.0"),
        (("iid", 1, 1, 1.5), {}, r"keep: expected a number from 0 to 1, got 1\.5"),
        (("iid", 1, 1, 0.5), {"tile": 0}, "tile: expected an int >= 1, got 0"),
        (("iid", 1, 1, 0.5), {"generator": 3}, r"generator: expected a torch\.Generator or None, got int"),
    ],
)
def test_bad_arguments_of_row_masks_are_named(args, more, message):
    with pytest.raises((TypeError, ValueError), match=message):
        masks.row_mask(*args, **more)
