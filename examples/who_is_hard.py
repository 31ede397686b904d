"""Who is hard? Whether early exits, mixtures of experts, token skipping and adaptive modules spend more on the same
images.

A small vision transformer is trained on the digits, and each of the four is made of it, trained on, and set by the
validation images to the same mean compute. What each test image then costs, in FLOPs when it is run alone, ranks the
images: `measure.ranking` says how alike the rankings are, beside what seeds of one method agree on, and what a dense
network's doubts explain. Under five minutes on two cores.

    python -m examples.who_is_hard
    python -m examples.who_is_hard --quick --out /tmp/who    # a few seconds: too little training to learn much

Writes OUT.json (of schema dyncore.ranking/1, for `dyncore report`), OUT.png (agreement), OUT-ranks.png and
OUT-disputed.png.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import math
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dyncore as dc
from dyncore.measure import Ranking, write_results
from dyncore.nn import EarlyExit, GumbelGate, TokenSkip, TransformerBlock, collect_costs
from dyncore.nn.losses import compute_target, exit_distillation, multi_exit
from examples import acm, moe_dynamic_k, token_skip
from examples.common import CLASSES, Split, digits, train

DEFAULT = Path(__file__).parents[1] / "benchmarks" / "results" / "who_is_hard"
SIZE, PATCH, HEADS = 16, 4, 4
SHARE = 0.6  # of the dense network's FLOPs, on average, that every method is set to
STEPS = 16  # of the bisection of a threshold; confidences may all lie close to 1
ALONE = 32, 8  # validation images that a threshold is set on, and steps, where each image has to be run alone
EXPERTS, ROUTER = 16, 16  # routers of 128, the usual, would cost as much as an expert each
LEARNERS, TARGET = 4, 0.4  # of the MLPs' learners: with attention, which runs in full, about SHARE
VERDICTS = ((0.8, "Yes, nearly as much as their own seeds allow"), (0.3, "In part"), (0.1, "Hardly"), (-math.inf, "No"))
TOKENS = 0.5  # of the tokens, in the blocks that have gates: with the first block, which runs in full, about SHARE


@dataclasses.dataclass(frozen=True)
class Scale:
    """How much is trained: epochs of the dense network, then of each method made of it; steps of the MoE's routers."""

    width: int = 64
    depth: int = 6
    epochs: int = 20
    tuning: int = 10
    steps: int = 200


QUICK = Scale(width=16, depth=2, epochs=1, tuning=1, steps=2)


class Embed(nn.Module):
    """Tokens [B, 16, width] of images [B, 1, 16, 16], by two convolutions."""

    def __init__(self, width: int) -> None:
        super().__init__()
        first = [nn.Conv2d(1, 32, 3, stride=2, padding=1), nn.BatchNorm2d(32), nn.ReLU()]
        self.convolve = nn.Sequential(*first, nn.Conv2d(32, width, 3, stride=2, padding=1), nn.BatchNorm2d(width))
        self.position = nn.Parameter(torch.randn((SIZE // PATCH) ** 2, width) * 0.3)

    def forward(self, images: Tensor) -> Tensor:
        return self.convolve(images).flatten(2).transpose(1, 2) + self.position


class Head(nn.Module):
    """Logits of the mean token."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(width), nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.norm(x).mean(1))


def build(scale: Scale) -> nn.Sequential:
    """The dense network: tokens, blocks, head."""
    blocks = (
        TransformerBlock(scale.width, HEADS, causal=False, rotary=False, activation="relu") for _ in range(scale.depth)
    )
    return nn.Sequential(Embed(scale.width), *blocks, Head(scale.width))


def with_exits(dense: nn.Sequential, data: Split, scale: Scale) -> nn.Module:
    """An exit after every block."""
    embed, first, *blocks, head = dense
    heads = [*(Head(scale.width) for _ in blocks), head]
    model = EarlyExit([nn.Sequential(embed, first), *blocks], heads)

    def loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        logits = model(x)
        return multi_exit(logits, y) + 0.5 * exit_distillation(logits)

    return train(model, data.train, epochs=scale.tuning, loss=loss, rate=2e-3)


def with_experts(dense: nn.Sequential, data: Split, scale: Scale) -> nn.Module:
    """MLPs of 16 experts, of which as many run as a router expects to matter."""
    train(dense, data.train, epochs=scale.tuning, loss=moe_dynamic_k.sparse_loss, rate=2e-3)
    dc.convert.moefy(dense, EXPERTS, data=data.train[0], router_dim=ROUTER, steps=scale.steps)
    return dense.eval()


def with_skipping(dense: nn.Sequential, data: Split, scale: Scale) -> nn.Module:
    """A gate for each token before every block but the first."""
    embed, first, *blocks, head = dense
    model = nn.Sequential(embed, first, *(TokenSkip(b, GumbelGate(scale.width)) for b in blocks), head)

    def loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(model(x), y) + compute_target(collect_costs(model).values(), TOKENS)

    return train(model, data.train, epochs=scale.tuning, loss=loss, rate=2e-3)


def with_learners(dense: nn.Sequential, data: Split, scale: Scale) -> nn.Module:
    """MLPs of four learners, of which each token takes as many as its gate says."""
    dc.convert.acmize(dense, LEARNERS, data=data.train[0])

    def loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(model(x), y) + 2 * compute_target(collect_costs(model).values(), TARGET)

    return train(dense, data.train, epochs=scale.tuning, loss=loss, rate=2e-3)


def move_exits(model: nn.Module, threshold: float) -> None:
    assert isinstance(model, EarlyExit)
    model.threshold = threshold


@dataclasses.dataclass(frozen=True)
class Method:
    """How a dynamic network is made of a dense one and set.

    Attributes:
        make: make(dense, data, scale) may use up the dense network.
        move: move(model, threshold) sets it.
        ends: thresholds of little compute and of much.
        padded: images of a batch are padded to the longest, so that only one alone costs what it needs.
    """

    make: Callable[[nn.Sequential, Split, Scale], nn.Module]
    move: Callable[[nn.Module, float], None]
    ends: tuple[float, float]
    padded: bool = False


METHODS = {
    "early exit": Method(with_exits, move_exits, (0.0, 1.0)),
    "dynamic-k MoE": Method(with_experts, moe_dynamic_k.move, (0.0, 1.0)),
    "token skipping": Method(with_skipping, token_skip.move, (1.0, 0.0), padded=True),
    "ACM": Method(with_learners, acm.move, (1.0, 0.0)),
}


def mean_flops(method: Method, model: nn.Module, x: Tensor) -> float:
    """Of an image run alone."""
    if method.padded:
        return float(dc.measure.flops(model, x[: ALONE[0]], per_row=True).mean())
    return dc.measure.flops(model, x) / len(x)


def calibrate(method: Method, model: nn.Module, x: Tensor, wanted: float) -> float:
    """The threshold at which images x cost `wanted` FLOPs on average, set on the model."""
    low, high = method.ends
    for _ in range(ALONE[1] if method.padded else STEPS):
        middle = (low + high) / 2
        method.move(model, middle)
        if mean_flops(method, model, x) < wanted:
            low = middle
        else:
            high = middle
    method.move(model, high)
    return high


@torch.no_grad()
def accuracy(model: nn.Module, data: tuple[Tensor, Tensor]) -> float:
    return float((model(data[0]).argmax(1) == data[1]).float().mean())


@dataclasses.dataclass(frozen=True)
class Trained:
    """A method with one seed: test accuracy beside that of its dense network, FLOPs [N] of each test image, as shares
    of the dense network's."""

    method: str
    seed: int
    accuracy: float
    dense: float
    threshold: float
    shares: Tensor

    def record(self) -> dict[str, Any]:
        low, high = self.shares.quantile(torch.tensor([0.1, 0.9], dtype=torch.float64)).tolist()
        fields = {"method": self.method, "seed": self.seed, "accuracy": self.accuracy, "dense_accuracy": self.dense}
        spread = {"share": float(self.shares.mean()), "share_p10": low, "share_p90": high}
        return {
            **fields,
            "threshold": self.threshold,
            **spread,
            "distinct": len(self.shares.unique()),
            "shares": [round(s, 5) for s in self.shares.tolist()],
        }


def one_seed(seed: int, data: Split, scale: Scale) -> tuple[list[Trained], Tensor]:
    """(every method made of the dense network of a seed, that network's logits [N, C] on the test images)."""
    torch.manual_seed(seed)
    dense = build(scale)
    train(dense, data.train, epochs=scale.epochs, rate=2e-3)
    x, _ = data.test
    with torch.no_grad():
        logits = dense(x)
    full, right = float(dc.measure.flops(dense, x[:1])), accuracy(dense, data.test)
    found: list[Trained] = []
    for number, (name, method) in enumerate(METHODS.items()):
        torch.manual_seed(1000 * (number + 1) + seed)
        start = time.perf_counter()
        model = method.make(copy.deepcopy(dense), data, scale).eval()
        with torch.no_grad(), dc.execution("sparse"):  # "auto" may compute everything where that is faster
            threshold = calibrate(method, model, data.valid[0], SHARE * full)
            shares = dc.measure.flops(model, x, per_row=True) / full
        found.append(Trained(name, seed, accuracy(model, data.test), right, threshold, shares))
        seconds = time.perf_counter() - start
        print(f"seed {seed}, {name}: {found[-1].accuracy:.1%} (dense {right:.1%}), {seconds:.0f} s", flush=True)
    return found, logits


def references(logits: Tensor, data: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    """What might make an image hard, by the dense networks' logits [seeds, N, C], or by the image alone."""
    x, y = data
    log_p = logits.double().log_softmax(-1)
    right = y.expand(len(logits), -1)
    return {
        "dense doubt": 1 - log_p.amax(-1).exp(),
        "dense loss": -log_p.gather(-1, right[..., None]).squeeze(-1),
        "dense errors": (log_p.argmax(-1) != right).double(),
        "ink": x.double().mean((1, 2, 3)),
    }


def models_table(models: Sequence[Trained]) -> str:
    """How good the networks are, and what they spend: means over seeds."""
    lines = [f"{'':16}{'accuracy':>10}{'dense':>8}{'FLOPs':>8}{'of 80% of the images':>22}{'distinct':>10}"]
    for name in METHODS:
        records = [m.record() for m in models if m.method == name]
        mean = {k: sum(r[k] for r in records) / len(records) for k in records[0] if k not in ("method", "shares")}
        between = f"{mean['share_p10']:.0%} .. {mean['share_p90']:.0%}"
        lines.append(
            f"{name:16}{mean['accuracy']:10.1%}{mean['dense_accuracy']:8.1%}{mean['share']:8.0%}{between:>22}"
            f"{mean['distinct']:10.0f}"
        )
    return "\n".join(lines)


def auc(cost: Tensor, chosen: Tensor) -> float:
    """How often one of the chosen costs more than one of the others, ties being half."""
    a, b = cost[chosen][:, None], cost[~chosen]
    return float(((a > b).double() + (a == b).double() / 2).mean())


def explained(values: Tensor, classes: Tensor) -> float:
    """The share of the variance of values [N] that lies between classes [N]."""
    means = torch.stack([values[classes == c].mean() for c in classes])
    return float(means.var(unbiased=False) / values.var(unbiased=False))


def answer(found: Ranking, wrong: Tensor, classes: Tensor) -> list[str]:
    """Sentences that answer the question, from the figures alone. `wrong` [N]: some dense network errs there."""
    names = found.methods[: len(METHODS)]
    repeatable = [i for i in range(len(names)) if bool(found.repeatable[i])]
    pairs = [(a, b) for a in repeatable for b in repeatable if a < b]
    question = "Do they rank the images alike?"
    if not pairs:
        return [f"{question} That cannot be said: the seeds of most methods do not agree among themselves."]

    def mean(matrix: Tensor) -> float:
        return sum(float(matrix[p]) for p in pairs) / len(pairs)

    def named(pair: tuple[int, int]) -> str:
        return f"{names[pair[0]]} and {names[pair[1]]} ({found.tau[pair]:.2f}, {found.corrected[pair]:.0%})"

    def each(value: Callable[[int], str]) -> str:
        return ", ".join(f"{name} {value(i)}" for i, name in enumerate(names))

    share = mean(found.corrected)
    verdict = next(words for least, words in VERDICTS if share >= least)
    by_share = sorted(pairs, key=lambda p: float(found.corrected[p]))
    own = sum(float(found.tau[i, i]) for i in repeatable) / len(repeatable)
    doubt = found.methods.index("dense doubt")
    drawn = [name for i, name in enumerate(names) if i not in repeatable]
    return [
        f"{question} {verdict}: tau-b between two methods is {mean(found.tau):.2f} on average, between two seeds of "
        f"one {own:.2f}; two methods agree as well as {share:.0%} of what their seeds allow.",
        *([f"Left out, as their own seeds do not agree: {', '.join(drawn)}."] if drawn else []),
        f"Most alike: {named(by_share[-1])}; least: {named(by_share[0])}.",
        f"Of the {found.q:.0%} of the images that cost one method most, {mean(found.overlap):.0%} are among those of "
        f"another (by chance {found.q:.0%}).",
        f"How unsure the dense network is ranks them with tau-b {each(lambda i: f'{float(found.tau[i, doubt]):.2f}')} "
        f"(its own seeds {float(found.tau[doubt, doubt]):.2f}). Held fixed, a mean correlation of two methods' mean "
        f"ranks of {mean(torch.corrcoef(found.mean_ranks)):.2f} becomes {mean(found.given('dense doubt')):.2f}.",
        "An image that some dense network gets wrong costs more than one that all get right in so many pairs: "
        f"{each(lambda i: f'{auc(found.mean_ranks[i], wrong):.0%}')} (by chance 50%).",
        "Which digit it shows explains so much of the variance of an image's mean rank: "
        f"{each(lambda i: f'{explained(found.mean_ranks[i], classes):.0%}')}.",
    ]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, help="of every network, at least 2 (default: 3)")
    parser.add_argument("--quick", action="store_true", help="a few seconds: too little training to learn much")
    parser.add_argument("--out", type=Path, default=DEFAULT, help="without suffix (default: benchmarks/results/...)")
    args = parser.parse_args(argv)
    if args.seeds < 2:
        parser.error(f"--seeds: expected at least 2, without which nothing says how much is noise, got {args.seeds}")
    start = time.perf_counter()
    data, scale = digits(size=SIZE), Scale()
    if args.quick:
        data = Split(*((x[:16], y[:16]) for x, y in (data.train, data.valid, data.test)))
        scale = QUICK
    by_seed = [one_seed(seed, data, scale) for seed in range(args.seeds)]
    models = [m for trained, _ in by_seed for m in trained]
    others = references(torch.stack([logits for _, logits in by_seed]), data.test)
    spent = {name: torch.stack([m.shares for m in models if m.method == name]) for name in METHODS}
    found = dc.measure.ranking(spent, references=others, shared_seeds=True)
    said = answer(found, others["dense errors"].amax(0) > 0, data.test[1])
    print("", models_table(models), str(found), *said, sep="\n\n")
    images, labels = data.test[0], data.test[1].tolist()
    document = found.record(images, labels)
    document["command"] = " ".join(["python -m examples.who_is_hard", *(sys.argv[1:] if argv is None else argv)])
    document["threads"], document["seconds"] = torch.get_num_threads(), round(time.perf_counter() - start)
    document["models"], document["answer"] = [m.record() for m in models], said
    write_results(args.out.with_suffix(".json"), document)
    found.plot(args.out.with_suffix(".png"))
    found.plot_ranks(args.out.with_name(f"{args.out.name}-ranks.png"))
    found.plot_disputed(args.out.with_name(f"{args.out.name}-disputed.png"), images, labels)
    print(f"\n{args.out}.json, .png, -ranks.png, -disputed.png; {document['seconds']} s")


if __name__ == "__main__":
    main()
