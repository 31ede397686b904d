"""Real images, three small vision transformers: a dense one, one with Mixture-of-Depths, one with mixtures of experts.

Trains each on scikit-learn's 8x8 digits (under a minute on two cores) and prints test accuracy, executed FLOPs and wall
clock against the dense twin. The images make 16 tokens and the models are 64 wide, so fixed costs of each layer weigh
as much as its products: this is where skipping pays least. `dyncore bench` replays the routing at larger widths too.

    python examples/digits.py
    python examples/digits.py --record dyncore/bench/digits_routing.json    # the routing that the bench replays
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

import dyncore as dc
from dyncore.bench.routing import Layer, Routing, save_routing
from dyncore.nn import MixtureOfDepths, MoE, TransformerBlock, collect_losses

PATCH, WIDTH, HEADS, DEPTH = 2, 64, 4, 4
TOKENS = (8 // PATCH) ** 2
CAPACITY = 0.25  # Mixture-of-Depths: 4 of the 16 tokens of an image, in every other block
EXPERTS, TOP_K = 8, 2  # experts of width 64: two of them make half of the dense MLP's 256
LOSS_WEIGHTS = {"load_balance": 1e-2, "router_z": 1e-3}
RECORDED_IMAGES = 256  # 4096 tokens


class Vit(nn.Module):
    """Vision transformer on 2x2 patches; `layer` makes block number i."""

    def __init__(self, layer: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.embed = nn.Linear(PATCH * PATCH, WIDTH)
        self.position = nn.Parameter(torch.randn(TOKENS, WIDTH) * 0.02)
        self.blocks = nn.Sequential(*(layer(i) for i in range(DEPTH)))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Logits [B, 10] of images [B, 8, 8]."""
        patches = F.unfold(images[:, None], PATCH, stride=PATCH).transpose(1, 2)
        x = self.blocks(self.embed(patches) + self.position)
        return self.head(self.norm(x).mean(1))


def block(mlp: nn.Module | None = None) -> TransformerBlock:
    return TransformerBlock(WIDTH, HEADS, causal=False, rotary=False, mlp=mlp)


def dense() -> Vit:
    return Vit(lambda i: block())


def mixture_of_depths() -> Vit:
    return Vit(lambda i: MixtureOfDepths(block(), CAPACITY) if i % 2 else block())


def mixture_of_experts() -> Vit:
    return Vit(lambda i: block(MoE(WIDTH, WIDTH, EXPERTS, TOP_K, activation="gelu", bias=True) if i % 2 else None))


MODELS = {"dense": dense, "mixture of depths": mixture_of_depths, "mixture of experts": mixture_of_experts}


@dataclasses.dataclass(frozen=True)
class Digits:
    """Images [N, 8, 8] in 0..1 and labels [N], a fifth of them for testing."""

    train: Tensor
    train_labels: Tensor
    test: Tensor
    test_labels: Tensor


def digits() -> Digits:
    images, labels = load_digits(return_X_y=True)
    parts = train_test_split(images / 16, labels, test_size=0.2, random_state=0, stratify=labels)
    train, test = (torch.tensor(part, dtype=torch.float32).view(-1, 8, 8) for part in parts[:2])
    return Digits(train, torch.tensor(parts[2]), test, torch.tensor(parts[3]))


def train(model: Vit, data: Digits, epochs: int, batch: int = 128) -> None:
    """AdamW with one cycle of the learning rate; the layers' own losses are added."""
    steps = epochs * -(-len(data.train) // batch)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=4e-3, total_steps=steps)
    model.train()
    for _ in range(epochs):
        for index in torch.randperm(len(data.train)).split(batch):
            loss = F.cross_entropy(model(data.train[index]), data.train_labels[index])
            for name, auxiliary in collect_losses(model).items():
                loss = loss + LOSS_WEIGHTS[name.rsplit(".", 1)[-1]] * auxiliary
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    model.eval()


@torch.no_grad()
def accuracy(model: Vit, data: Digits) -> float:
    return (model(data.test).argmax(1) == data.test_labels).float().mean().item()


@torch.no_grad()
def record(models: dict[str, Vit], data: Digits, command: str) -> Routing:
    """Which tokens and which experts the trained models choose on the first test images."""
    layers = []
    for model in models.values():
        model(data.test[:RECORDED_IMAGES])
        for name, layer in model.named_modules():
            plan = layer.last_plan if isinstance(layer, (MixtureOfDepths, MoE)) else None
            if plan is None:
                continue
            if isinstance(layer, MixtureOfDepths):
                layers.append(Layer(name, mask=plan.row_offsets.diff() > 0))
            else:
                experts = plan.groups()[plan.row_slots].view(plan.num_rows, TOP_K)  # the slots of each row, in order
                layers.append(Layer(name, expert=experts, num_groups=EXPERTS))
    source = f"vision transformers on {RECORDED_IMAGES} images of sklearn.datasets.load_digits, {TOKENS} tokens each"
    return Routing(source, command, WIDTH, WIDTH, layers)


@torch.no_grad()
def compare(models: dict[str, Vit], data: Digits, seconds: float = 2.0) -> None:
    """Print accuracy, executed FLOPs and wall clock of each model, timed in the same rounds."""
    images = data.test
    timings = dc.measure.Interleaved({n: lambda m=m: m(images) for n, m in models.items()}).run(seconds=seconds)
    flops = {name: dc.measure.flops(model, images) for name, model in models.items()}
    print(f"\nforward of {len(images)} test images, {torch.get_num_threads()} thread(s)")
    print(f"{'model':20}{'accuracy':>9}{'MFLOP/image':>13}{'FLOPs x':>9}{'ms':>8}{'time x':>8}{'SE':>6}")
    for name, model in models.items():
        fewer = flops["dense"] / flops[name]
        faster = timings["dense"].median / timings[name].median
        efficiency = dc.measure.scaling_efficiency(faster, fewer)
        print(
            f"{name:20}{accuracy(model, data):9.1%}{flops[name] / len(images) / 1e6:13.2f}{fewer:9.2f}"
            f"{timings[name].median * 1e3:8.2f}{faster:8.2f}{efficiency:6.2f}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1, help="products this small gain nothing from a second one")
    parser.add_argument("--record", type=Path, metavar="FILE", help="write the routing that dyncore bench replays")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    data = digits()
    models = {}
    for name, make in MODELS.items():
        torch.manual_seed(args.seed)
        start = time.perf_counter()
        models[name] = make()
        train(models[name], data, args.epochs)
        print(f"{name}: {args.epochs} epochs in {time.perf_counter() - start:.1f} s", flush=True)
    compare(models, data)
    if args.record:
        command = f"python examples/digits.py --epochs {args.epochs} --seed {args.seed} --record {args.record.name}"
        save_routing(args.record, record(models, data, command))
        print(f"\nrouting of {RECORDED_IMAGES} images written to {args.record}")


if __name__ == "__main__":
    main()
