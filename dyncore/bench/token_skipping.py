"""Token skipping: x + MLP(x) on the kept rows, x on the others. T rows, H model width, MLP H -> I -> H with gelu."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

import dyncore as dc
from dyncore.bench.contest import Contest, Point, Variant
from dyncore.bench.routing import recorded
from dyncore.masks import ROW_PATTERNS, row_mask

NAME = "token-skipping"
KEEP = (0.125, 0.25, 0.5, 0.75, 1.0)
_MASKS = 3  # different masks, so that no branch predictor learns one


def _mlp(x: Tensor, w_in: Tensor, b_in: Tensor, w_out: Tensor, b_out: Tensor) -> Tensor:
    return F.linear(F.gelu(F.linear(x, w_in, b_in)), w_out, b_out)


def ours(x: Tensor, mask: Tensor, w_in: Tensor, b_in: Tensor, w_out: Tensor, b_out: Tensor) -> Tensor:
    """Weights in the layout of a layer's parameters: [1, I, H], [1, I], [1, H, I], [1, H]."""
    return dc.grouped_mlp(x, w_in, w_out, b_in, b_out, plan=dc.select(mask), activation="gelu", residual=x)


def naive(x: Tensor, mask: Tensor, *weights: Tensor) -> Tensor:
    """What one writes in PyTorch: select the rows, run the MLP, add the result back."""
    rows = mask.nonzero().squeeze(1)
    return x.index_add(0, rows, _mlp(x.index_select(0, rows), *weights))


def dense(x: Tensor, mask: Tensor, *weights: Tensor) -> Tensor:
    """The dense twin: no skipping at all."""
    return x + _mlp(x, *weights)


def own(x: Tensor, mask: Tensor, *weights: Tensor) -> Tensor:
    """dyncore with nothing skipped: what its own saving is measured against."""
    return ours(x, torch.ones_like(mask), *weights)


def _of_one_group(truth: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`truth` for weights in the layout of `ours`."""

    def run(x: Tensor, mask: Tensor, *weights: Tensor) -> Tensor:
        return truth(x, mask, *(t[0] for t in weights))

    return run


def make_weights(width: int, hidden: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """(w_in [I, H], b_in [I], w_out [H, I], b_out [H]) that keep unit-scale inputs at unit scale."""
    w_in = torch.randn(hidden, width) / width**0.5
    w_out = torch.randn(width, hidden) / hidden**0.5
    return tuple(t.to(dtype) for t in (w_in, torch.randn(hidden), w_out, torch.randn(width)))


def contest(
    masks: list[Tensor],
    width: int,
    hidden: int,
    dtype: torch.dtype,
    *,
    backward: bool = False,
    cold: bool = True,
    with_own: bool = False,
) -> Contest:
    torch.manual_seed(0)
    weights = make_weights(width, hidden, dtype)
    one_group = tuple(t[None].clone() for t in weights)
    inputs = [(torch.randn(mask.shape[0], width).to(dtype), mask) for mask in masks]
    variants = {
        "dyncore": Variant(ours, _of_one_group(naive), one_group),
        "dense": Variant(dense, dense, weights),
        "naive": Variant(naive, naive, weights),
    }
    if with_own:
        variants["own"] = Variant(own, _of_one_group(dense), one_group)
    return Contest(variants, inputs, backward, cold)


def random_masks(rows: int, keep: float) -> list[Tensor]:
    """Masks that keep exactly round(keep * rows) rows, drawn independently."""
    generator = torch.Generator().manual_seed(rows)
    masks = []
    for _ in range(_MASKS):
        mask = torch.zeros(rows, dtype=torch.bool)
        mask[torch.randperm(rows, generator=generator)[: round(keep * rows)]] = True
        masks.append(mask)
    return masks


def _point(
    name: str,
    masks: list[Tensor],
    width: int,
    dtype: torch.dtype,
    *,
    backward: bool = False,
    cold: bool = True,
    with_own: bool = False,
    granularity: str = "row",
) -> Point:
    rows, hidden = masks[0].shape[0], 4 * width
    keep = sum(int(mask.sum()) for mask in masks) / (len(masks) * rows)
    work = (3 if backward else 1) * (1 + 2 * keep) * 4e-9 * rows * width * hidden
    return Point(
        NAME,
        name,
        {"T": rows, "H": width, "I": hidden},
        dtype,
        keep,
        lambda: contest(masks, width, hidden, dtype, backward=backward, cold=cold, with_own=with_own),
        backward,
        work,
        granularity=granularity,
    )


def synthetic(
    rows: int, width: int, dtype: torch.dtype, keep: float, *, backward: bool = False, with_own: bool = False
) -> Point:
    """Rows kept at random. `with_own`: dyncore without skipping ("own") takes part."""
    return _point("random", random_masks(rows, keep), width, dtype, backward=backward, with_own=with_own)


def replayed(width: int | None, dtype: torch.dtype, *, backward: bool = False) -> Point:
    """The rows that the trained Mixture-of-Depths model of examples/digits.py kept, at its width (None) or another.

    At its own width the whole model fits in a cache, so weights are warm there.
    """
    routing = recorded()
    masks = [layer.mask for layer in routing.layers if layer.mask is not None]
    return _point("digits", masks, width or routing.width, dtype, backward=backward, cold=width is not None)


def patterned(
    pattern: str, batch: int, rows: int, width: int, dtype: torch.dtype, keep: float, *, tile: int = 1
) -> Point:
    """Rows of `batch` sequences kept in a pattern of dyncore.masks, `tile` of them at once: `rows`: whole samples."""
    drawn = [
        row_mask(pattern, batch, rows, keep, tile=tile, generator=torch.Generator().manual_seed(seed)).flatten()
        for seed in range(_MASKS)
    ]
    return _point(pattern, drawn, width, dtype, granularity={1: "row", rows: "sample"}.get(tile, f"tile of {tile}"))


def points(size: str) -> Iterator[Point]:
    """The sweep of `size`: "tiny", "quick" or "full"."""
    f32, bf16 = torch.float32, torch.bfloat16
    if size == "tiny":
        for keep in (0.25, 0.5, 1.0):
            yield synthetic(64, 32, f32, keep)
        yield synthetic(64, 32, bf16, 0.5)
        yield synthetic(64, 32, f32, 0.5, backward=True)
        yield patterned("clustered", 2, 32, 32, f32, 0.5, tile=32)
        yield replayed(16, f32)
        return
    for keep in KEEP:
        yield synthetic(4096, 1024, f32, keep)
    for keep in KEEP if size == "full" else (0.25, 0.5, 1.0):
        yield synthetic(4096, 1024, bf16, keep)
    for keep in KEEP:
        yield synthetic(512, 256, f32, keep)
    for keep in (0.25, 0.5):
        yield synthetic(2048, 512, f32, keep, backward=True)
    for width in (None, 512):
        yield replayed(width, f32)
    if size == "full":
        for keep in KEEP:
            yield synthetic(512, 256, bf16, keep)
            yield synthetic(2048, 512, bf16, keep, backward=True)
            yield synthetic(64, 1024, f32, keep)
        yield replayed(512, bf16)
        yield replayed(512, f32, backward=True)
        for pattern in ROW_PATTERNS:
            for tile in (1, 16, 256):
                for keep in (0.25, 0.5):
                    yield patterned(pattern, 8, 256, 512, f32, keep, tile=tile)
