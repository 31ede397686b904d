"""A small ReLU language model learns to leave most of its neurons off, and its time falls with them.

Trains a byte-level transformer on the documentation and source text that ships with Python, with a penalty on the
hidden activations of its MLPs, twice in lock step: nn.SparseMLP, and its dense twin (linear, relu, linear) from the
same weights on the same batches. Prints, as training goes on, both losses, the share of zeros, the time of a training
step and of decoding a token; a few minutes on two cores.

    python examples/relu_lm.py
    python examples/relu_lm.py --penalty hoyer
    python examples/relu_lm.py --json relu_lm.json --record masks.bin    # the masks on held-out text, for dyncore.masks

What a penalty costs. The L1 norm of a ReLU's output is its sum, hence one more output of the down product, whose
weights are all 1: the fused op gives it and its gradient without any [T, I] tensor. Hoyer's ratio needs the hidden
activation itself: a dense up product with dc.sparse_linear behind it, so that four of six products stay dense.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import statistics
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dyncore as dc
from dyncore import masks
from dyncore.nn import MLP, SparseMLP

VOCABULARY = 128  # ASCII
SHARE_HELD_OUT = 16  # every 16th piece of the text
PIECE = 2**14


@dataclasses.dataclass(frozen=True)
class Sizes:
    """dim H, hidden I; batch sequences of length tokens."""

    dim: int = 384
    hidden: int = 3072
    heads: int = 6
    depth: int = 3
    batch: int = 8
    length: int = 128


FULL = Sizes()
STRENGTHS = {"l1": 1.0, "hoyer": 1.0}
QUICK = Sizes(dim=64, hidden=512, heads=2, depth=2, batch=4, length=64)


# Text -----------------------------------------------------------------------------------------------------------------


def python_text(limit: int = 2**23) -> Tensor:
    """uint8 [N]: the topics of pydoc, where they are installed, and the sources of the standard library's modules."""
    try:
        parts = list(importlib.import_module("pydoc_data.topics").topics.values())
    except ImportError:
        parts = []
    for file in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        parts.append(file.read_text(encoding="utf-8", errors="replace"))
    data = "\n".join(parts).encode("ascii", "replace")[:limit]
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


def split(text: Tensor) -> tuple[Tensor, Tensor]:
    """Text to train on and text held out."""
    pieces = text[: len(text) // PIECE * PIECE].view(-1, PIECE)
    held_out = torch.arange(len(pieces)) % SHARE_HELD_OUT == SHARE_HELD_OUT - 1
    return pieces[~held_out].flatten(), pieces[held_out].flatten()


def batches(text: Tensor, sizes: Sizes, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless random windows [B, S] and what follows each of their tokens."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        start = torch.randint(len(text) - sizes.length, (sizes.batch, 1), generator=generator)
        window = text[start + torch.arange(sizes.length + 1)].long()
        yield window[:, :-1], window[:, 1:]


# Model ----------------------------------------------------------------------------------------------------------------


class ReluMLP(SparseMLP):
    """A SparseMLP with a penalty on its hidden activation h [..., I].

    In training `last_penalty` is the mean over tokens of the penalty: "l1" |h|_1 / I, "hoyer" |h|_1^2 / (I |h|_2^2)
    (Hoyer 2004, as a loss Yang et al. 2020, "DeepHoyer"), which is 1/I for one active neuron and 1 for equal ones.
    """

    last_penalty: Tensor | None = None

    def __init__(self, dim: int, hidden_dim: int, penalty: str) -> None:
        super().__init__(dim, hidden_dim)
        self.penalty = penalty

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        if self.penalty == "l1":
            y, norm = with_l1(x, self.w_in.weight, self.w_out.weight, self.w_in.bias, self.w_out.bias)
            self.last_penalty = norm.mean() / self.w_in.out_features
            return y
        h = self.hidden(x)
        self.last_penalty = hoyer(h)
        return self.project(h)


class DenseMLP(MLP):
    """The same of linear, relu and linear, with PyTorch's own layout."""

    last_penalty: Tensor | None = None

    def __init__(self, dim: int, hidden_dim: int, penalty: str) -> None:
        super().__init__(dim, hidden_dim, activation="relu")
        self.penalty = penalty

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.w_in(x))
        if self.training:
            self.last_penalty = h.mean() if self.penalty == "l1" else hoyer(h)
        return self.w_out(h)


# More inputs and outputs than the norm needs, so that rows stay whole vectors: forward and backward of 1024 tokens at
# full size and 95% zeros take 34.1 ms with 1 more, 31.4 with 16, 26.7 without the norm; dense 88.
MORE = 16


def with_l1(x: Tensor, w_in: Tensor, w_out: Tensor, b_in: Tensor, b_out: Tensor) -> tuple[Tensor, Tensor]:
    """(y [..., H], |h|_1 [...]) of one fused MLP that has inputs, always 0, and outputs more; the first is the norm."""
    width, hidden = w_out.shape
    more = w_out.new_zeros(hidden, MORE)
    more[:, 0] = 1
    w_out = torch.cat([w_out.t(), more], dim=1).t()
    y = dc.sparse_mlp(F.pad(x, (0, MORE)), F.pad(w_in, (0, MORE)), w_out, b_in, F.pad(b_out, (0, MORE)))
    return y[..., :width], y[..., width]


def hoyer(h: Tensor) -> Tensor:
    """Mean over tokens; a token without an active neuron counts 0."""
    ratio = h.sum(-1).square() / h.square().sum(-1).clamp(min=1e-12)
    return ratio.mean() / h.shape[-1]


class Attention(nn.Module):
    """Causal, with the keys and values of earlier tokens in `cache` [2, B, heads, S, d] when decoding one at a time."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(dim, 3 * dim, bias=False), nn.Linear(dim, dim, bias=False)

    def forward(self, x: Tensor, cache: Tensor | None = None, at: int = 0) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        if cache is not None:
            end = at + x.shape[1]
            cache[0, :, :, at:end], cache[1, :, :, at:end] = k, v
            k, v = cache[:, :, :, :end]
        y = F.scaled_dot_product_attention(q, k, v, is_causal=x.shape[1] > 1)
        return self.out(y.transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self, sizes: Sizes, mlp: nn.Module) -> None:
        super().__init__()
        self.norm_attention, self.attention = nn.LayerNorm(sizes.dim), Attention(sizes.dim, sizes.heads)
        self.norm_mlp, self.mlp = nn.LayerNorm(sizes.dim), mlp

    def forward(self, x: Tensor, cache: Tensor | None = None, at: int = 0) -> Tensor:
        x = x + self.attention(self.norm_attention(x), cache, at)
        return x + self.mlp(self.norm_mlp(x))


class LanguageModel(nn.Module):
    def __init__(self, sizes: Sizes, mlp: type[nn.Module], penalty: str) -> None:
        super().__init__()
        self.sizes = sizes
        self.embed = nn.Embedding(VOCABULARY, sizes.dim)
        self.position = nn.Parameter(torch.randn(sizes.length, sizes.dim) * 0.02)
        self.blocks = nn.ModuleList(Block(sizes, mlp(sizes.dim, sizes.hidden, penalty)) for _ in range(sizes.depth))
        self.norm = nn.LayerNorm(sizes.dim)
        self.head = nn.Linear(sizes.dim, VOCABULARY)

    def forward(self, tokens: Tensor, caches: list[Tensor] | None = None, at: int = 0) -> Tensor:
        """Logits [B, S, vocabulary] of tokens [B, S], which stand at positions `at` and after."""
        x = self.embed(tokens) + self.position[at : at + tokens.shape[1]]
        for i, block in enumerate(self.blocks):
            x = block(x, None if caches is None else caches[i], at)
        return self.head(self.norm(x))

    def penalty(self) -> Tensor:
        """Mean over the layers, of the latest forward in training."""
        return torch.stack([block.mlp.last_penalty for block in self.blocks]).mean()

    def caches(self) -> list[Tensor]:
        s = self.sizes
        return [torch.zeros(2, 1, s.heads, s.length, s.dim // s.heads) for _ in range(s.depth)]

    @torch.no_grad()
    def decode(self, prompt: Tensor, count: int) -> Tensor:
        """[1, count]: the likeliest continuation of prompt [1, S], token by token."""
        caches = self.caches()
        logits = self(prompt, caches)
        tokens = []
        for at in range(prompt.shape[1], prompt.shape[1] + count):
            tokens.append(logits[:, -1:].argmax(-1))
            logits = self(tokens[-1], caches, at)
        return torch.cat(tokens, dim=1)


# Training -------------------------------------------------------------------------------------------------------------


class Trainer:
    """One model and its optimizer; `step` returns the loss without the penalty."""

    def __init__(self, model: LanguageModel, steps: int, strength: float, learning_rate: float) -> None:
        self.model, self.steps, self.strength = model, steps, strength
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.01)
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(
            self.optimizer, max_lr=learning_rate, total_steps=steps, pct_start=0.1
        )
        self.taken = 0
        self.seconds: list[float] = []

    def step(self, tokens: Tensor, targets: Tensor) -> float:
        """The penalty grows to its full strength over the first third of the training."""
        self.model.train()
        start = time.perf_counter()
        loss = F.cross_entropy(self.model(tokens).flatten(0, 1), targets.flatten())
        strength = self.strength * min(1.0, 3 * self.taken / self.steps)
        (loss + strength * self.model.penalty()).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.seconds.append(time.perf_counter() - start)
        self.schedule.step()
        self.taken += 1
        return loss.item()


@torch.no_grad()
def held_out_loss(model: LanguageModel, windows: Tensor) -> float:
    model.eval()
    return F.cross_entropy(model(windows[:, :-1]).flatten(0, 1), windows[:, 1:].flatten()).item()


def decode_seconds(models: dict[str, LanguageModel], prompt: Tensor, seconds: float) -> dict[str, float]:
    """Median time of a token of each model, decoded one at a time in the same rounds."""
    count = min(32, models["sparse"].sizes.length - prompt.shape[1])
    for model in models.values():
        model.eval()
    runs = {name: lambda m=model: m.decode(prompt, count) for name, model in models.items()}
    timings = dc.measure.Interleaved(runs).run(seconds=seconds, min_rounds=3)
    return {name: timing.median / count for name, timing in timings.items()}


HEAD = f"{'step':>5} {'loss':>7} {'dense':>7} {'zeros':>7} {'dead':>6} | {'step ms':>8} {'dense':>7} {'x':>5} | "
HEAD += f"{'token ms':>8} {'dense':>7} {'x':>5}"


def line(point: dict[str, Any]) -> str:
    step, token = point["step_ms"], point["token_ms"]
    return (
        f"{point['step']:5} {point['loss']['sparse']:7.3f} {point['loss']['dense']:7.3f} {point['zeros']:7.1%} "
        f"{point['dead']:6.1%} | {step['sparse']:8.1f} {step['dense']:7.1f} {step['dense'] / step['sparse']:5.2f} | "
        f"{token['sparse']:8.3f} {token['dense']:7.3f} {token['dense'] / token['sparse']:5.2f}"
    )


@dataclasses.dataclass(frozen=True)
class Settings:
    """penalty is "l1" or "hoyer", of this strength; `points` lines are printed."""

    penalty: str = "l1"
    strength: float = 1.0
    steps: int = 300
    points: int = 10
    learning_rate: float = 1.5e-3
    seed: int = 0
    decode_seconds: float = 1.0


@dataclasses.dataclass(frozen=True)
class Outcome:
    """The printed lines as records, every loss, and the zeros of the trained model on held-out text."""

    models: dict[str, LanguageModel]
    points: list[dict[str, Any]]
    losses: dict[str, list[float]]
    sparsity: dc.measure.ActivationSparsity
    flops: dict[str, int]


def run(text: Tensor, sizes: Sizes, settings: Settings, record_rows: int = 0) -> Outcome:
    """Train both models in lock step: each batch goes through the one and the other, in turns first."""
    training, held_out = split(text)
    windows = next(batches(held_out, sizes, settings.seed))
    windows = torch.cat([windows[0], windows[1][:, -1:]], dim=1)
    trainers = {}
    for name, mlp in (("sparse", ReluMLP), ("dense", DenseMLP)):
        torch.manual_seed(settings.seed)
        model = LanguageModel(sizes, mlp, settings.penalty)
        trainers[name] = Trainer(model, settings.steps, settings.strength, settings.learning_rate)
    trainers["dense"].model.load_state_dict(trainers["sparse"].model.state_dict())
    models = {name: trainer.model for name, trainer in trainers.items()}
    losses: dict[str, list[float]] = {name: [] for name in trainers}
    points, begun = [], 0
    ends = {round(settings.steps * (i + 1) / settings.points) for i in range(settings.points)}
    print(HEAD, flush=True)
    for step, batch in zip(range(1, settings.steps + 1), batches(training, sizes, settings.seed), strict=False):
        for name in list(trainers)[:: 1 if step % 2 else -1]:
            losses[name].append(trainers[name].step(*batch))
        if step not in ends:
            continue
        zeros = dc.measure.activation_sparsity(models["sparse"], [windows[:, :-1]], record_masks=record_rows)
        layers = [layer for name, layer in zeros.layers.items() if name.endswith("mlp")]
        token = decode_seconds(models, windows[:1, : sizes.length // 2], settings.decode_seconds)
        point = {
            "step": step,
            "loss": {name: statistics.fmean(values[begun:]) for name, values in losses.items()},
            "held_out_loss": {name: held_out_loss(model, windows) for name, model in models.items()},
            "zeros": statistics.fmean(layer.zero_fraction for layer in layers),
            "dead": statistics.fmean(layer.dead for layer in layers),
            "step_ms": {name: 1e3 * statistics.median(t.seconds[begun:]) for name, t in trainers.items()},
            "token_ms": {name: 1e3 * seconds for name, seconds in token.items()},
        }
        points.append(point)
        print(line(point), flush=True)
        begun = step
    flops = {name: dc.measure.flops(model, windows[:, :-1]) for name, model in models.items()}
    return Outcome(models, points, losses, zeros, flops)


def report(outcome: Outcome) -> None:
    apart = max(abs(a - b) for a, b in zip(outcome.losses["sparse"], outcome.losses["dense"], strict=True))
    last = outcome.points[-1]["held_out_loss"]
    fewer = outcome.flops["dense"] / outcome.flops["sparse"]
    print(f"\nlargest difference of the two losses in any step: {apart:.1e}")
    print(f"held-out loss: {last['sparse']:.4f}, dense {last['dense']:.4f} nats per byte")
    print(f"FLOPs of a forward: {fewer:.2f} times fewer than dense, attention and all\n")
    print(outcome.sparsity)


def write_json(path: Path, command: str, sizes: Sizes, settings: Settings, outcome: Outcome) -> None:
    document = {
        **outcome.sparsity.record(),
        "schema": "dyncore.relu_lm/1",
        "command": command,
        "sizes": dataclasses.asdict(sizes),
        "settings": dataclasses.asdict(settings),
        "points": outcome.points,
        "losses": outcome.losses,
        "flops": outcome.flops,
    }
    dc.measure.write_results(path, document)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--penalty", choices=("l1", "hoyer"), default="l1")
    parser.add_argument("--strength", type=float, help="what the penalty is multiplied by (0: none)")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, help="default: torch's")
    parser.add_argument("--quick", action="store_true", help="a small model and few steps: seconds, and no speed-up")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures")
    parser.add_argument("--record", type=Path, metavar="FILE", help="write the masks of held-out text (dyncore.masks)")
    parser.add_argument("--rows", type=int, default=512, help="tokens to record")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    sizes = QUICK if args.quick else FULL
    settings = Settings(args.penalty, STRENGTHS[args.penalty], seed=args.seed)
    if args.quick:
        settings = dataclasses.replace(settings, steps=24, points=3, decode_seconds=0.1)
    if args.steps:
        settings = dataclasses.replace(settings, steps=args.steps, points=min(args.steps, settings.points))
    if args.strength is not None:
        settings = dataclasses.replace(settings, strength=args.strength)
    outcome = run(python_text(), sizes, settings, args.rows if args.record else 0)
    report(outcome)
    command = f"python examples/relu_lm.py --penalty {settings.penalty} --steps {settings.steps} --seed {settings.seed}"
    if args.json:
        write_json(args.json, command, sizes, settings, outcome)
    if args.record:
        source = f"byte-level transformer, {settings.penalty} penalty, held-out text that ships with Python"
        masks.save(args.record, outcome.sparsity.masks, source=source, command=command)
        print(f"\nmasks of {args.rows} tokens written to {args.record}")


if __name__ == "__main__":
    main()
