"""ReLU sparsity: the down product alone ("relu-down"), and the whole MLP, plain ("relu-mlp") and gated ("reglu-mlp").

T rows, H model width, I neurons, N outputs. The keep ratio is the share of neurons that are on. Which ones they are is
drawn uniformly, or from Beta-distributed rates as trained models have them, or recorded from one (dyncore.masks).
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

import dyncore as dc
from dyncore import masks
from dyncore.bench.contest import Contest, Point, Variant
from dyncore.measure.environment import last_level_cache
from dyncore.measure.timing import storage_bytes

DOWN, MLP, GATED = "relu-down", "relu-mlp", "reglu-mlp"
KEEP = (1.0, 0.5, 0.2, 0.1, 0.05, 0.01)
RECORDING = Path(__file__).with_name("relu_lm_masks.bin")  # made by examples/relu_lm.py --record
RIVALS = ("dense", "naive", "csr", "own")
_INPUTS = 3  # different ones, so that no branch predictor learns one
_FEW = 16  # rows, up to which time is that of reading weights
_SAMPLE = 256  # tokens that firing rates and typical rows are taken from

# The down product: h [T, I] times weight [N, I] -----------------------------------------------------------------------


def ours(h: Tensor, weight: Tensor) -> Tensor:
    return dc.sparse_linear(h, weight)


def dense(h: Tensor, weight: Tensor) -> Tensor:
    return F.linear(h, weight)


def naive(h: Tensor, weight: Tensor) -> Tensor:
    """What one writes in PyTorch: pick the neurons that are on in some row. The gradient of h at the others is lost."""
    on = h.any(0).nonzero().squeeze(1)
    return h.index_select(1, on) @ weight.t().index_select(0, on)


def csr(h: Tensor, weight: Tensor) -> Tensor:
    """torch.sparse: the product of a compressed matrix (of fp32 alone, on a CPU)."""
    return h.to_sparse_csr() @ weight.t()


@functools.cache
def _hear_that_csr_is_beta() -> None:
    """torch warns of it once a process: now."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.zeros(1, 1).to_sparse_csr()


def _every_row(x: Tensor) -> dc.Plan:
    return dc.select(torch.ones(x.shape[0], dtype=torch.bool, device=x.device))


def own(h: Tensor, weight: Tensor) -> Tensor:
    """dyncore's dense product: what its own saving is measured against."""
    return dc.grouped_linear(h, weight[None], plan=_every_row(h))


# The MLP: w_in [I, H], gated [2I, H]; w_out [H, I] --------------------------------------------------------------------


def _hidden(x: Tensor, w_in: Tensor, b_in: Tensor, gated: bool) -> Tensor:
    pre = F.linear(x, w_in, b_in)
    if not gated:
        return torch.relu(pre)
    gate, up = pre.chunk(2, -1)
    return torch.relu(gate) * up


def _mlp(down: Callable[[Tensor, Tensor], Tensor], gated: bool) -> Callable[..., Tensor]:
    """An MLP of plain PyTorch up to its hidden activation."""

    def mlp(x: Tensor, w_in: Tensor, b_in: Tensor, w_out: Tensor) -> Tensor:
        return down(_hidden(x, w_in, b_in, gated), w_out)

    return mlp


def _naive_gated(x: Tensor, w_in: Tensor, b_in: Tensor, w_out: Tensor) -> Tensor:
    """Up and down for the neurons alone whose gate is open in some row."""
    (w_gate, w_up), (b_gate, b_up) = w_in.chunk(2), b_in.chunk(2)
    gate = torch.relu(F.linear(x, w_gate, b_gate))
    on = gate.any(0).nonzero().squeeze(1)
    up = F.linear(x, w_up.index_select(0, on), b_up.index_select(0, on))
    return (gate.index_select(1, on) * up) @ w_out.t().index_select(0, on)


def _functions(mechanism: str) -> dict[str, Callable[..., Tensor]]:
    if mechanism == DOWN:
        return {"dyncore": ours, "dense": dense, "naive": naive, "csr": csr, "own": own}
    gated = mechanism == GATED
    activation = "reglu" if gated else "relu"

    def ours_mlp(x: Tensor, w_in: Tensor, b_in: Tensor, w_out: Tensor) -> Tensor:
        return dc.sparse_mlp(x, w_in, w_out, b_in, activation=activation)

    def own_mlp(x: Tensor, w_in: Tensor, b_in: Tensor, w_out: Tensor) -> Tensor:
        weights = w_in[None], w_out[None], b_in[None]
        return dc.grouped_mlp(x, *weights, plan=_every_row(x), activation=activation)

    return {
        "dyncore": ours_mlp,
        "dense": _mlp(dense, gated),
        "naive": _naive_gated if gated else _mlp(naive, gated),
        "csr": _mlp(csr, gated),
        "own": own_mlp,
    }


# Inputs and weights ---------------------------------------------------------------------------------------------------


@functools.cache
def recorded() -> Tensor:
    """bool [T, I]: of the layers in the recording that is shipped with the package, that of median density."""
    layers = sorted(masks.load(RECORDING).layers.values(), key=lambda mask: float(mask.float().mean()))
    return layers[len(layers) // 2]


def _mask(source: str, rows: int, neurons: int, keep: float, seed: int) -> Tensor:
    """bool [rows, neurons], by `source`: "uniform", "beta" or "recorded"."""
    if source == "recorded":
        mask = recorded()
        return masks.replay(mask, rows, neurons, start=seed * (mask.shape[0] // _INPUTS))
    generator = torch.Generator().manual_seed(seed)
    if source == "uniform":
        return masks.uniform(rows, neurons, density=keep, generator=generator)
    form = {"token_scale": 0.5, "dead": 0.1, "correlation": 0.5}
    return masks.beta(rows, neurons, preset="opt-6.7b", density=keep, generator=generator, **form)


def _typical(on: Tensor, rows: int, keep: float) -> Tensor:
    """_INPUTS times `rows` row numbers of a mask, of the rows that are nearest to `keep`."""
    distance = (on.float().mean(1) - keep).abs()
    return distance.argsort(stable=True)[: _INPUTS * rows].view(_INPUTS, rows)


def _coarse(*shape: int) -> Tensor:
    """Unit Gaussians in steps of 1/8: sums of their products are exact in fp32, in any order. So every variant finds
    the same neurons on; one that rounding turned off would be a wrong gradient."""
    return torch.randn(shape).mul_(8).round_().div_(8)


@functools.lru_cache(maxsize=1)  # several points in a row have the same
def _matrices(width: int, hidden: int, halves: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """(w_in [halves I, H], w_out [H, I], w_out stored by neuron) that keep unit-scale inputs near unit scale."""
    torch.manual_seed(0)
    w_in = _coarse(halves * hidden, width).div_(_norm(width)).to(dtype)
    w_out = torch.randn(width, hidden).div_(hidden**0.5).to(dtype)
    return w_in, w_out, w_out.t().contiguous().t()


def _norm(width: int) -> int:
    """About its square root: a power of 2, so that steps stay steps."""
    return 2 ** round(math.log2(width) / 2)


def _biases(source: str, width: int, hidden: int, keep: float) -> Tensor:
    """[I]: what makes each neuron fire at its rate, in steps of 1/64."""
    if source == "uniform":
        rates = torch.full((hidden,), keep)
    else:
        rates = _mask(source, 2 * _SAMPLE, hidden, keep, 0).float().mean(0)
    scale = width**0.5 / _norm(width)  # of pre-activations without biases
    return torch.special.ndtri(rates.double()).clamp_(-5, 5).mul_(64 * scale).round_().div_(64)


def _down_inputs(source: str, rows: int, neurons: int, keep: float, dtype: torch.dtype) -> list[tuple[Tensor, ...]]:
    """Activations [T, I]. Few rows are typical ones, so that all inputs are of one density."""
    if rows > _FEW:
        drawn = [_mask(source, rows, neurons, keep, seed) for seed in range(_INPUTS)]
    else:
        many = _mask(source, _SAMPLE, neurons, keep, 0)
        drawn = [many[index] for index in _typical(many, rows, keep)]
    generator = torch.Generator().manual_seed(rows)
    return [(masks.activations(mask, dtype=dtype, generator=generator),) for mask in drawn]


def _mlp_inputs(rows: int, w_gate: Tensor, b_gate: Tensor, keep: float) -> list[tuple[Tensor, ...]]:
    """Rows x [T, H], likewise."""
    width, dtype = w_gate.shape[1], w_gate.dtype
    if rows > _FEW:
        return [(_coarse(rows, width).to(dtype),) for _ in range(_INPUTS)]
    many = _coarse(_SAMPLE, width).to(dtype)
    return [(many[index],) for index in _typical(F.linear(many, w_gate, b_gate) > 0, rows, keep)]


def contest(
    mechanism: str,
    source: str,
    shape: dict[str, int],
    dtype: torch.dtype,
    keep: float,
    *,
    backward: bool = False,
    rivals: Sequence[str] = RIVALS,
) -> Contest:
    rows, hidden = shape["T"], shape["I"]
    if mechanism == DOWN:
        _, w_out, by_neuron = _matrices(shape["N"], hidden, 1, dtype)
        first: tuple[Tensor, ...] = ()
        inputs = _down_inputs(source, rows, hidden, keep, dtype)
    else:
        width, gated = shape["H"], mechanism == GATED
        w_in, w_out, by_neuron = _matrices(width, hidden, 2 if gated else 1, dtype)
        torch.manual_seed(rows)
        biases = [_biases(source, width, hidden, keep), torch.randn(hidden)][: 2 if gated else 1]
        b_in = torch.cat([b.to(dtype) for b in biases])
        first = w_in.detach(), b_in  # the cached stay as they are
        inputs = _mlp_inputs(rows, w_in[:hidden], b_in[:hidden], keep)
    if "csr" in rivals:
        _hear_that_csr_is_beta()
    row_major, neuron_major = (*first, w_out.detach()), (*first, by_neuron.detach())
    functions = _functions(mechanism)
    variants = {
        name: Variant(functions[name], functions["dense"], row_major if name in ("dense", "own") else neuron_major)
        for name in ("dyncore", *rivals)
    }
    # four copies at least: of two, what a rival has just read is still in the cache when we come to it
    cache = max(2 * last_level_cache(), 2 * storage_bytes(row_major)) if rows <= _FEW else None
    return Contest(variants, inputs, backward, cache_bytes=cache)


def synthetic(
    mechanism: str,
    source: str,
    rows: int,
    width: int,
    hidden: int,
    dtype: torch.dtype,
    keep: float | None = None,
    *,
    backward: bool = False,
    rivals: Sequence[str] = RIVALS,
    share: float = 1.0,
) -> Point:
    """`source`: "uniform", "beta" or "recorded", whose keep ratio is what was recorded. `width` is N or H."""
    if keep is None:
        keep = float(recorded().float().mean())
    shape = {"T": rows, "I": hidden, "N": width} if mechanism == DOWN else {"T": rows, "H": width, "I": hidden}
    products = {DOWN: 1, MLP: 2, GATED: 3}[mechanism]
    work = (3 if backward else 1) * products * (1 + len(rivals)) * 2e-9 * rows * width * hidden
    return Point(
        mechanism,
        source,
        shape,
        dtype,
        keep,
        lambda: contest(mechanism, source, shape, dtype, keep, backward=backward, rivals=rivals),
        backward,
        work,
        share,
    )


_DECODE = (1, 1024, 4096)  # T, H or N, I
_PREFILL = (512, 512, 2048)
_REALISTIC = (0.2, 0.1, 0.05)
_F32, _BF16 = torch.float32, torch.bfloat16


def _curve(
    mechanism: str,
    source: str,
    sizes: tuple[int, int, int],
    dtype: torch.dtype,
    keeps: Sequence[float] = KEEP,
    *,
    backward: bool = False,
    share: float = 0.1,
) -> Iterator[Point]:
    """The rivals whose calls take longest, and are never near, take part where they may win."""
    for keep in keeps:
        slow = {"csr"} if sizes[0] > _FEW and keep > 0.1 else set()
        slow |= {"naive"} if backward else set()
        rivals = [name for name in RIVALS if name not in slow]
        yield synthetic(mechanism, source, *sizes, dtype, keep, backward=backward, rivals=rivals, share=share)


def _recorded(mechanism: str, sizes: tuple[int, int, int], dtype: torch.dtype, *, backward: bool = False):
    if RECORDING.exists():
        yield synthetic(mechanism, "recorded", *sizes, dtype, backward=backward, share=0.1)


def _tiny(mechanism: str) -> Iterator[Point]:
    for keep in (0.1, 0.5, 1.0):
        yield synthetic(mechanism, "uniform", 1, 64, 512, _F32, keep)
    yield synthetic(mechanism, "beta", 32, 32, 128, _BF16, 0.1)
    yield synthetic(mechanism, "beta", 32, 32, 128, _F32, 0.1, backward=True, rivals=("dense", "csr", "own"))


def _sweep(mechanism: str, full: bool) -> Iterator[Point]:
    """Few and many rows, both dtypes; realistic masks in fp32, in "full" in bf16, too."""
    for sizes in (_DECODE, _PREFILL, *([(64, 2048, 8192), (512, 2048, 8192)] if full else [])):
        yield from _curve(mechanism, "uniform", sizes, _F32)
        yield from _curve(mechanism, "beta", sizes, _F32, _REALISTIC)
        yield from _curve(mechanism, "uniform", sizes, _BF16)
        if full:
            yield from _curve(mechanism, "beta", sizes, _BF16, _REALISTIC)
        yield from _recorded(mechanism, sizes, _F32)


def down_points(size: str) -> Iterator[Point]:
    """The sweep of `size` "tiny", "quick" or "full": sparse_linear."""
    yield from _tiny(DOWN) if size == "tiny" else _sweep(DOWN, size == "full")


def mlp_points(size: str) -> Iterator[Point]:
    """The same: sparse_mlp, with forward and backward."""
    if size == "tiny":
        yield from _tiny(MLP)
        return
    yield from _sweep(MLP, size == "full")
    for sizes in [_PREFILL, *([(4096, 1024, 4096)] if size == "full" else [])]:
        yield from _curve(MLP, "uniform", sizes, _F32, backward=True)
        yield from _curve(MLP, "beta", sizes, _F32, _REALISTIC[1:2], backward=True)
        yield from _curve(MLP, "uniform", sizes, _BF16, backward=True)
        yield from _recorded(MLP, sizes, _F32, backward=True)


def gated_points(size: str) -> Iterator[Point]:
    """The same: sparse_mlp of reglu."""
    if size == "tiny":
        yield from _tiny(GATED)
        return
    yield from _curve(GATED, "uniform", _DECODE, _F32)
    if size == "full":
        yield from _curve(GATED, "uniform", _DECODE, _BF16)
        for dtype in (_F32, _BF16):
            yield from _curve(GATED, "uniform", _PREFILL, dtype)
            yield from _curve(GATED, "uniform", _PREFILL, dtype, backward=True)
