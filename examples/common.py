"""What the examples share: real images, training, and one model's curve of accuracy, FLOPs and wall clock.

Every example trains a dynamic network once and then moves its thresholds; `run(quick)` returns the curve as a `Result`,
and `python -m examples.NAME` prints it. Needs the extra dyncore[bench].
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

import dyncore as dc

CLASSES = 10


@dataclasses.dataclass(frozen=True)
class Split:
    """scikit-learn's digits: images [N, 1, S, S] in 0..1 and labels [N], for training, for setting thresholds, and for
    the figures."""

    train: tuple[Tensor, Tensor]
    valid: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]


def digits(seed: int = 0, *, size: int = 8) -> Split:
    """The 1797 digits, 60% / 20% / 20%, enlarged from 8 x 8 to `size` x `size` pixels."""
    images, labels = load_digits(return_X_y=True)
    x = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 16
    if size != 8:
        x = F.interpolate(x, size=(size, size), mode="bilinear", align_corners=False)
    y = torch.tensor(labels)
    rest, test = train_test_split(range(len(y)), test_size=0.2, random_state=seed, stratify=labels)
    train, valid = train_test_split(rest, test_size=0.25, random_state=seed, stratify=labels[rest])
    return Split((x[train], y[train]), (x[valid], y[valid]), (x[test], y[test]))


def images(quick: bool, size: int, epochs: int) -> tuple[Split, int]:
    """(the digits, for how many epochs to train); a few of them for one where it has to be quick."""
    data = digits(size=size)
    if not quick:
        return data, epochs
    parts = zip((data.train, data.valid, data.test), (64, 32, 64), strict=True)
    return Split(*((x[:count], y[:count]) for (x, y), count in parts)), 1


@dataclasses.dataclass(frozen=True)
class Point:
    """A model at one threshold.

    Attributes:
        threshold: what was set, None for a model that has none.
        accuracy: share of the images that are right.
        flops: executed for an image, 2 per multiply-add, on average.
        ms: wall clock for an image, in batches.
        single_ms: wall clock for an image, one at a time.
    """

    threshold: float | None
    accuracy: float
    flops: float
    ms: float
    single_ms: float


@dataclasses.dataclass(frozen=True)
class Result:
    """The curve of one dynamic network, and the dense one it is to save from.

    Attributes:
        name: of the mechanism.
        dense: the network that computes everything.
        points: the dynamic one, from most compute to least.
        note: what a reader of the table must know, such as why the clock does not follow.
    """

    name: str
    dense: Point
    points: list[Point]
    note: str = ""


SMOKE = "smoke test: hardly trained"

Loss = Callable[[nn.Module, Tensor, Tensor], Tensor]
Move = Callable[[nn.Module, float], None]


def mover(kind: type[nn.Module], name: str) -> Move:
    """move(model, value): sets the attribute `name` of every `kind` in a model."""

    def move(model: nn.Module, value: float) -> None:
        for module in model.modules():
            if isinstance(module, kind):
                setattr(module, name, value)

    return move


def cross_entropy(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(model(x), y)


def shifted(x: Tensor, pixels: int) -> Tensor:
    """Each image of [B, C, H, W] moved by up to `pixels` in both directions, zeros coming in."""
    batch, _, height, width = x.shape
    padded = F.pad(x, (pixels,) * 4)
    down, right = torch.randint(0, 2 * pixels + 1, (2, batch, 1, 1))
    rows, columns = torch.arange(height).view(1, -1, 1) + down, torch.arange(width).view(1, 1, -1) + right
    return padded[torch.arange(batch).view(-1, 1, 1), :, rows, columns].permute(0, 3, 1, 2)


def train(
    model: nn.Module,
    data: tuple[Tensor, Tensor],
    *,
    epochs: int,
    loss: Loss = cross_entropy,
    rate: float = 4e-3,
    batch: int = 64,
    parameters: Iterable[nn.Parameter] | None = None,
) -> nn.Module:
    """The model after AdamW with one cycle of the learning rate, in evaluation. Images are moved by up to an eighth."""
    x, y = data
    chosen = list(model.parameters() if parameters is None else parameters)
    optimizer = torch.optim.AdamW(chosen, weight_decay=0.01)
    steps = epochs * -(-len(x) // batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=rate, total_steps=max(steps, 1))
    model.train()
    for _ in range(epochs):
        for index in torch.randperm(len(x)).split(batch):
            value = loss(model, shifted(x[index], x.shape[-1] // 8), y[index])
            optimizer.zero_grad()
            value.backward()
            nn.utils.clip_grad_norm_(chosen, 1.0)
            optimizer.step()
            schedule.step()
    return model.eval()


def clock(quick: bool) -> dict[str, Any]:
    """How long `curve` may look at the clock."""
    return {"seconds": 0.2, "singles": 2} if quick else {"seconds": 8.0}


def _batches(data: tuple[Tensor, Tensor], size: int) -> Iterator[tuple[Tensor, Tensor]]:
    return zip(data[0].split(size), data[1].split(size), strict=True)


@torch.no_grad()
def curve(
    dense: nn.Module,
    model: nn.Module,
    move: Move,
    thresholds: Sequence[float],
    data: tuple[Tensor, Tensor],
    *,
    batch: int = 64,
    seconds: float = 4.0,
    singles: int = 32,
) -> tuple[Point, list[Point]]:
    """(the dense network, the dynamic one at each threshold), all timed in the same rounds.

    Args:
        move: move(model, threshold) sets it; both networks map images to logits in evaluation.
        data: images and labels of the test set. A round runs the images in batches; then `singles` of them alone.
        seconds: spent on the clock.
    """
    states: list[float | None] = [None, *thresholds]

    def run(threshold: float | None, x: Tensor) -> Tensor:
        return (dense if threshold is None else model)(x)

    def prepare(threshold: float | None) -> None:
        if threshold is not None:
            move(model, threshold)

    right, flops = {}, {}
    for state in states:
        prepare(state)
        right[state] = sum(int((run(state, x).argmax(1) == y).sum()) for x, y in _batches(data, batch)) / len(data[1])
        flops[state] = sum(dc.measure.flops(run, state, x) for x, _ in _batches(data, batch)) / len(data[1])

    def timed(size: int, images: Tensor, share: float) -> dict[str, float]:
        pieces = images.split(size)

        def arguments(name: str, round: int) -> tuple[float | None, Sequence[Tensor]]:
            state = states[int(name)]
            prepare(state)
            return state, pieces

        def whole(state: float | None, pieces: Sequence[Tensor]) -> list[Tensor]:
            return [run(state, piece) for piece in pieces]

        variants = {str(i): whole for i in range(len(states))}
        timings = dc.measure.Interleaved(variants, arguments=arguments).run(seconds=share, min_rounds=3)
        return {name: timing.median * 1e3 / len(images) for name, timing in timings.items()}

    many, one = timed(batch, data[0], seconds * 0.7), timed(1, data[0][:singles], seconds * 0.3)
    points = [Point(s, right[s], flops[s], many[str(i)], one[str(i)]) for i, s in enumerate(states)]
    return points[0], points[1:]


def times(result: Result, point: Point) -> tuple[float, float]:
    """(times fewer FLOPs, times faster) than the dense network."""
    return result.dense.flops / point.flops if point.flops else math.inf, result.dense.ms / point.ms


def table(result: Result) -> str:
    """The curve as text: what the FLOPs promise, what the clock gives."""
    lines = [
        f"{result.name}, {torch.get_num_threads()} thread(s); times are for an image, in batches and one at a time",
        f"{'threshold':>10}{'accuracy':>10}{'MFLOP':>9}{'ms':>9}{'alone ms':>10}{'FLOPs x':>9}{'time x':>8}{'SE':>6}",
    ]
    for point in [result.dense, *result.points]:
        fewer, faster = times(result, point)
        name = "dense" if point.threshold is None else f"{point.threshold:.4g}"
        lines.append(
            f"{name:>10}{point.accuracy:10.1%}{point.flops / 1e6:9.2f}{point.ms:9.3f}{point.single_ms:10.3f}"
            f"{fewer:9.2f}{faster:8.2f}{faster / fewer:6.2f}"
        )
    return "\n".join([*lines, *([result.note] if result.note else [])])


def marked(result: Result, quick: bool) -> Result:
    """The result, whose note says if it was quick."""
    note = f"{SMOKE}; {result.note}".removesuffix("; ")
    return dataclasses.replace(result, note=note) if quick else result


def main(run: Callable[[bool], Result], text: str | None) -> None:
    """The command line of an example: its module's docstring is the help."""
    parser = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a few seconds, a smoke test: hardly any training")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    start = time.perf_counter()
    print(table(marked(run(args.quick), args.quick)))
    print(f"{time.perf_counter() - start:.0f} s")
