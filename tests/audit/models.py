"""Models to be audited, as their makers write them."""

import dataclasses

import torch
import torch.nn.functional as F
from torch import nn

import dyncore as dc
from dyncore.execution import mode


def mlp(act, dim=64, hidden=256):
    return nn.Sequential(nn.Linear(dim, hidden), act, nn.Linear(hidden, dim))


class Loop(nn.Module):
    """A mixture of experts as most code has it."""

    def __init__(self, top_k=2, normalize=True, pair=False, sigmoid=False):
        super().__init__()
        self.experts = nn.ModuleList(mlp(nn.SiLU()) for _ in range(4))
        self.router = nn.Linear(64, 4)
        self.top_k, self.normalize, self.pair, self.sigmoid = top_k, normalize, pair, sigmoid

    def forward(self, x):
        logits = self.router(x)
        p = logits.sigmoid() if self.sigmoid else logits.softmax(-1)
        weight, index = p.topk(self.top_k, -1)
        if self.normalize:
            weight = weight / weight.sum(-1, keepdim=True)
        out = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            taken = (index == e).any(-1)
            if taken.any():
                out[taken] += expert(x[taken]) * weight[index == e][:, None]
        return (out, logits) if self.pair else out


class Masked(nn.Module):
    """Computes everything and multiplies by 0 or 1."""

    def __init__(self, how="mul"):
        super().__init__()
        self.block = mlp(nn.GELU())
        self.how = how

    def forward(self, x):
        keep = (torch.arange(x.shape[0]) % 4 == 0)[:, None]
        if self.how == "mul":
            return x + keep.float() * self.block(x)
        if self.how == "where":
            return torch.where(keep, self.block(x), x)
        return self.block(x).masked_fill(~keep, 0)


class Everyone(nn.Module):
    """Each expert computes every row, and is masked."""

    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList(mlp(nn.GELU(), hidden=64) for _ in range(3))

    def forward(self, x):
        taken = torch.arange(x.shape[0]) % 3
        return sum((taken == e)[:, None].float() * expert(x) for e, expert in enumerate(self.experts))


class Stacked(nn.Module):
    def __init__(self):
        super().__init__()
        self.w_in = nn.Parameter(torch.randn(4, 64, 32))
        self.w_out = nn.Parameter(torch.randn(4, 32, 64))

    def forward(self, x):
        return torch.einsum("th,ehi,eio->to", x, self.w_in, self.w_out)


class Whole(nn.Module):
    """Each kind once; the ReLU's biases make most activations zero."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.relu = mlp(nn.ReLU())
        nn.init.constant_(self.relu[0].bias, -1.5)
        self.gelu = mlp(nn.GELU())
        self.moe = Loop()
        self.masked = Masked()
        self.skip = dc.nn.Skip(mlp(nn.GELU()), lambda x: torch.arange(x.shape[0]) % 2 == 0)
        self.unused = mlp(nn.ReLU())

    def forward(self, x):
        return self.skip(self.masked(self.moe(self.gelu(self.relu(x)))))


@dataclasses.dataclass
class Output:
    logits: torch.Tensor
    hidden: tuple


class Structured(nn.Module):
    def __init__(self):
        super().__init__()
        self.relu = mlp(nn.ReLU())

    def forward(self, x, scale=None):
        y = self.relu(x)
        return Output(y if scale is None else y * scale, (x, y))


class Tokens(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(50, 64)
        self.relu = mlp(nn.ReLU())

    def forward(self, ids, mask=None):
        return F.relu(self.relu(self.embed(ids)))


class Wrong(dc.nn.DynamicLayer):
    """Its modes disagree."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(64, 64)

    def forward(self, x):
        return self.linear(x) * (2 if mode() == "masked" else 1)


class Fake(dc.nn.DynamicLayer):
    """A dynamic layer that skips nothing."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(64, 64)

    def forward(self, x):
        mask = torch.arange(x.shape[0]) % 2 == 0
        plan = dc.select(mask)
        self.record(plan, lambda: mask.float())
        return self.linear(x) * mask[:, None]


class Uncopyable(nn.Module):
    def __init__(self):
        super().__init__()
        self.relu = mlp(nn.ReLU())

    def __deepcopy__(self, memo):
        raise RuntimeError("there is one of me")

    def forward(self, x):
        return self.relu(x)


def with_inputs():
    return Whole(), torch.randn(64, 64)


def fails():
    raise OSError("no such weights")


def needs_a_gpu():
    return nn.Linear(4, 4).cuda()


number = 3
instance = Tokens()


def a_string():
    return "model"
