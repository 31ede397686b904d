"""The points that the bars are measured at, part by part: dyncore and its rivals on the same inputs.

A job is a point with what its record needs besides: threads, the bytes a call must read, how often one sample calls.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

import dyncore as dc
from benchmarks import transformers_points
from dyncore.bench import moe, relu_sparsity, token_skipping
from dyncore.bench.contest import Contest, Point, Variant
from dyncore.measure.environment import last_level_cache

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
OVERHEAD_CALLS = 50


@dataclasses.dataclass(frozen=True)
class Job:
    """A point to measure.

    Attributes:
        threads: how many, None for torch's number.
        bytes: of weights that a call must read, None where that is not the question.
        calls: in one sample, for calls shorter than what a clock resolves; records say the time of one.
        min_rounds: fewer than five where a rival takes seconds.
        saved: whether the bytes that a forward keeps for the backward are the question, too.
    """

    point: Point
    threads: int | None = None
    bytes: int | None = None
    calls: int = 1
    min_rounds: int = 5
    saved: bool = False


def token() -> Iterator[Job]:
    """Token skipping, MLP H -> 4H -> H with gelu."""
    for rows in (64, 512, 4096):
        for width in (256, 1024):
            for dtype in (F32, BF16):
                for keep in token_skipping.KEEP:
                    yield Job(token_skipping.synthetic(rows, width, dtype, keep, with_own=keep < 1))


_MOE_ROWS = (8, 64, 512, 4096)
_MOE_RIVALS = ("naive", "grouped_mm", "equal_flops", "own_equal_flops")


def moe_forward() -> Iterator[Job]:
    """Mixture of experts, SwiGLU, top-2. All experts on all rows ("dense") takes minutes; `dyncore bench` has it."""
    for dtype in (F32, BF16, F16):
        for width in (512, 1024):
            for groups in (8, 64):
                for rows in _MOE_ROWS:
                    if (dtype, width, rows) == (F16, 1024, 4096):
                        continue  # torch's float16 runs at 30 GFLOP/s here: half a minute a point, as slow as at 512
                    yield Job(moe.synthetic(rows, groups, width, 2 * width, dtype, rivals=_MOE_RIVALS))


def moe_backward() -> Iterator[Job]:
    """The same, forward and backward."""
    for dtype in (F32, BF16):
        for width in (512, 1024):
            for groups in (8, 64):
                for rows in _MOE_ROWS:
                    point = moe.synthetic(rows, groups, width, 2 * width, dtype, backward=True, rivals=["grouped_mm"])
                    yield Job(point, min_rounds=3)
    # ten seconds a call: in rounds of its own
    point = moe.synthetic(512, 64, 512, 1024, F32, backward=True, rivals=["indexed"])
    yield Job(dataclasses.replace(point, input="random-indexed"), min_rounds=2)


# Streaming weights ----------------------------------------------------------------------------------------------------


def _one_expert(x: Tensor, w_in: Tensor, w_out: Tensor) -> Tensor:
    plan = dc.select(torch.ones(x.shape[0], dtype=torch.bool))
    return dc.grouped_mlp(x, w_in, w_out, plan=plan, activation="gelu")


def _one_expert_truth(x: Tensor, w_in: Tensor, w_out: Tensor) -> Tensor:
    return F.linear(F.gelu(F.linear(x, w_in[0])), w_out[0])


def _reads(size: int) -> dict[str, Variant]:
    """Ways in which PyTorch reads `size` bytes and writes next to nothing."""

    def total(*args: Tensor) -> Tensor:
        return args[-1].sum()

    def largest(*args: Tensor) -> Tensor:
        return args[-1].amax()

    buffer = (torch.rand(size // 4) + 1,)
    return {"read_sum": Variant(total, total, buffer), "read_max": Variant(largest, largest, buffer)}


def _stream(rows: int, groups: int, dtype: torch.dtype) -> Job:
    """Few rows: the time is that of reading the weights of the experts they go to, 2 each and all different."""
    width, hidden = 1024, 4096 if groups == 1 else 2048
    touched = 1 if groups == 1 else 2 * rows
    matrices = 2 if groups == 1 else 3
    size = touched * matrices * width * hidden * dtype.itemsize

    def build() -> Contest:
        torch.manual_seed(0)
        x = torch.randn(rows, width).to(dtype)
        if groups == 1:
            w_in, w_out = torch.randn(1, hidden, width) / width**0.5, torch.randn(1, width, hidden) / hidden**0.5
            ours = Variant(_one_expert, _one_expert_truth, (w_in.to(dtype), w_out.to(dtype)))
            inputs: list[tuple[Tensor, ...]] = [(x,)]
        else:
            ours = Variant(moe.ours, moe.naive, moe.make_weights(groups, width, hidden, dtype))
            experts = [(torch.arange(2 * rows) + 2 * shift).view(rows, 2) % groups for shift in range(4)]
            inputs = [(x, expert, torch.rand(rows, 2).to(dtype)) for expert in experts]
        # of twice the cache a plain read finds much in it: 40 GB/s instead of 31
        return Contest({"dyncore": ours, **_reads(size)}, inputs, cache_bytes=4 * last_level_cache())

    shape = {"T": rows, "E": groups, "H": width, "I": hidden}
    return Job(Point("stream", "distinct experts", shape, dtype, touched / groups, build), bytes=size)


def stream() -> Iterator[Job]:
    """grouped_mlp of few rows against a plain read of as many bytes."""
    for dtype in (F32, BF16):
        for groups in (1, 8):
            for rows in (1, 2, 4):
                yield _stream(rows, groups, dtype)


# Large products -------------------------------------------------------------------------------------------------------


def _linear(x: Tensor, weight: Tensor) -> Tensor:
    return dc.grouped_linear(x, weight[None], plan=dc.select(torch.ones(x.shape[0], dtype=torch.bool)))


def _large(shape: dict[str, int], dtype: torch.dtype, ours: Callable, torchs: Callable, sizes: list[tuple[int, int]]):
    """Every row, one group. `sizes`: (N, K) of the weights."""

    def build() -> Contest:
        torch.manual_seed(0)
        weights = tuple((torch.randn(size) / size[1] ** 0.5).to(dtype) for size in sizes)
        x = torch.randn(shape["T"], sizes[0][1]).to(dtype)
        variants = {"dyncore": Variant(ours, torchs, weights), "dense": Variant(torchs, torchs, weights)}
        return Contest(variants, [(x,)], cold=False)

    return Point("product", "linear" if len(sizes) == 1 else "mlp", shape, dtype, 1.0, build)


def _mlp(x: Tensor, w_in: Tensor, w_out: Tensor) -> Tensor:
    return _one_expert(x, w_in[None], w_out[None])


def _mlp_torch(x: Tensor, w_in: Tensor, w_out: Tensor) -> Tensor:
    return F.linear(F.gelu(F.linear(x, w_in)), w_out)


def product() -> Iterator[Job]:
    """grouped_linear and grouped_mlp on large dense-like shapes against torch.mm, on one thread and on all."""
    for threads in sorted({1, torch.get_num_threads()}):
        for dtype in (F32, BF16):
            for rows, n, k in ((2048, 2048, 2048), (4096, 4096, 1024)):
                shape = {"T": rows, "N": n, "K": k}
                yield Job(_large(shape, dtype, _linear, F.linear, [(n, k)]), threads)
            shape = {"T": 2048, "H": 1024, "I": 4096}
            yield Job(_large(shape, dtype, _mlp, _mlp_torch, [(4096, 1024), (1024, 4096)]), threads)


# Overhead -------------------------------------------------------------------------------------------------------------


def _repeated(fn: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def run(*args: Tensor) -> Tensor:
        for _ in range(OVERHEAD_CALLS - 1):
            fn(*args)
        return fn(*args)

    return run


def _tiny(name: str, shape: dict[str, int], ours: Callable, rival: Callable, inputs: tuple[Tensor, ...]) -> Job:
    variants = {"dyncore": Variant(_repeated(ours), rival), "naive": Variant(_repeated(rival), rival)}
    build = lambda: Contest(variants, [inputs], cold=False)  # noqa: E731
    return Job(Point("overhead", name, shape, F32, 1.0, build), calls=OVERHEAD_CALLS)


def _by_expert(expert: Tensor, weight: Tensor, groups: int) -> Tensor:
    """Rows sorted by expert, with the groups' ends and the weights in that order: what a loop or grouped_mm needs."""
    flat = expert.reshape(-1)
    order = flat.argsort(stable=True)
    torch.bincount(flat, minlength=groups).cumsum(0)
    weight.reshape(-1)[order]
    return order // expert.shape[1]


def _plan_making(rows: int, groups: int, top_k: int) -> Job:
    def ours(expert: Tensor, weight: Tensor) -> Tensor:
        return dc.route(expert, weight, num_groups=groups).rows

    def rival(expert: Tensor, weight: Tensor) -> Tensor:
        return _by_expert(expert, weight, groups)

    inputs = [(expert, torch.rand(rows, top_k)) for expert in moe.random_experts(rows, groups, top_k)]
    variants = {"dyncore": Variant(ours, rival), "naive": Variant(rival, rival)}
    shape = {"T": rows, "G": groups, "K": top_k}
    return Job(Point("overhead", "route", shape, F32, top_k / groups, lambda: Contest(variants, inputs, cold=False)))


def overhead() -> Iterator[Job]:
    """What a call costs besides its work, no grad; and making the plan of a mixture of experts."""
    torch.manual_seed(0)
    rows = width = 16
    mask, x = torch.ones(rows, dtype=torch.bool), torch.randn(rows, width)
    w_in, w_out = torch.randn(1, width, width) / 4, torch.randn(1, width, width) / 4
    plan = dc.select(mask)

    def tiny_mlp(x: Tensor) -> Tensor:
        return dc.grouped_mlp(x, w_in, w_out, plan=plan)

    def tiny_truth(x: Tensor) -> Tensor:
        return _one_expert_truth(x, w_in.to(x.dtype), w_out.to(x.dtype))

    yield _tiny("select", {"T": rows}, lambda m: dc.select(m).rows, lambda m: m.nonzero().squeeze(1), (mask,))
    yield _tiny("grouped_mlp", {"T": rows, "H": width, "I": width}, tiny_mlp, tiny_truth, (x,))
    yield _plan_making(4096, 64, 2)


# ReLU sparsity --------------------------------------------------------------------------------------------------------


def relu() -> Iterator[Job]:
    """The down product I=8192 -> 2048, the MLP around it at one row, and a training step, by share of neurons on."""
    sizes, few, many = (2048, 8192), ("dense", "own", "naive", "csr"), ("dense", "own", "naive")
    for dtype in (F32, BF16):
        for rows in (1, 64, 512):
            for keep in (1.0, 0.5, 0.1, 0.05, 0.01):
                if (rows, keep) == (512, 0.01):
                    continue  # no bar
                # torch's CSR product of 512 rows takes seconds where half is on; at 95% it has lost by 3 and more
                rivals = many if rows == 512 and keep > 0.1 else few
                yield Job(relu_sparsity.synthetic("relu-down", "uniform", rows, *sizes, dtype, keep, rivals=rivals))
        for mechanism in ("relu-mlp", "reglu-mlp"):
            for keep in (0.2, 0.1, 0.05, 0.01):
                yield Job(relu_sparsity.synthetic(mechanism, "uniform", 1, *sizes, dtype, keep, rivals=few))
    for keep in (1.0, 0.7, 0.5, 0.3, 0.2, 0.1, 0.05):
        # at 90% with every rival: the slow ones take seconds
        rivals = few if keep == 0.1 else ("dense",)
        point = relu_sparsity.synthetic(
            "relu-mlp", "uniform", 4096, 1024, 4096, F32, keep, backward=True, rivals=rivals, share=0
        )
        yield Job(point, min_rounds=3, saved=keep in (0.2, 0.1, 0.05))


def transformers() -> Iterator[Job]:
    """The experts of a transformers layer, by each implementation."""
    for point in transformers_points.points():
        yield Job(point, min_rounds=5 if point.shape["T"] <= 8 else 3)


PARTS: dict[str, Callable[[], Iterator[Job]]] = {
    "token": token,
    "moe": moe_forward,
    "backward": moe_backward,
    "stream": stream,
    "product": product,
    "overhead": overhead,
    "relu": relu,
    "transformers": transformers,
}
