"""AdaptiveDepth: each row takes as many steps as its halting scores ask for; rows are samples, tokens or positions.

Rows that blocks treat one by one are carried in a list that shrinks as they halt. Where blocks look across rows
(attention between tokens, convolutions that take a mask) the state stays whole and a block is told which are live.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dyncore.execution import mode
from dyncore.nn import losses
from dyncore.nn.base import DynamicLayer, expect_callable, expect_choice, expect_like, expect_size, linked
from dyncore.nn.choices import share, shares
from dyncore.nn.gates import Gate, Movable, expect_share, scalar, shown
from dyncore.nn.halting_steps import Outcome, attend, by_compaction, every_step, in_place, looks_across, over
from dyncore.nn.inputs import called, expect_input
from dyncore.plan import countable, is_eager_cpu, route_mask

HALTING = ("act", "ponder")
# Positions in a line of the map that 1x1 convolutions see: 16384 positions of 128 channels through 512 and back take
# 24.8 ms in lines of 32, 32.7 in one line (2 threads of Zen 4, oneDNN); 7168 take 11.3 and 14.7, 1024 1.7 and 2.6.
_LINE = 32
ATTENTION = ("selected", "all_keys")
# what states of so many dimensions, whose first is the batch, may have been meant to be
_ROWS = {
    3: "where x is [B, S, D], tokens=True lets tokens halt, pool=gates.pool_tokens whole samples",
    4: "where x is [B, C, H, W], spatial=True lets positions halt, pool=gates.pool_spatial whole samples",
}


class FeatureScore(nn.Module):
    """Halting logits [..., 1] = scale * x[..., index] + bias: a feature of the state itself says when to halt, which
    adds two parameters and next to no compute (A-ViT, Yin 2022)."""

    def __init__(self, index: int = 0, scale: float = 5.0, bias: float = -10.0) -> None:
        super().__init__()
        self.index = index
        self.scale: nn.Parameter = nn.Parameter(torch.tensor(float(scale)))
        self.bias: nn.Parameter = nn.Parameter(torch.tensor(float(bias)))

    def forward(self, x: Tensor) -> Tensor:
        """Logits of the rows of x [..., D]."""
        return self.scale * x[..., self.index, None] + self.bias


def _cost(mask: Tensor, remainder: Tensor | None, costs: Sequence[float]) -> Tensor:
    """The share of the steps that each row took, with the gradient of its remainder, which weighs a mean step."""
    cost = share(mask, None, costs)
    return cost if remainder is None else cost + (remainder - remainder.detach()) / len(costs)


class AdaptiveDepth(Movable, DynamicLayer):
    """Steps until a row has halted: adaptive computation time (Graves 2016; ResNets, Figurnov 2017; A-ViT, Yin 2022).

    x_n = block_n(x_{n-1}) and h_n = sigmoid(halt(x_n)). A row takes N = min{n : h_1 + ... + h_n >= 1 - epsilon} steps,
    or all K; with the remainder R = 1 - (h_1 + ... + h_{N-1}) it becomes h_1 x_1 + ... + h_{N-1} x_{N-1} + R x_N. No
    step after N is computed for it. Halting at once gives x_1; never halting, with h = 0, gives the last state.

    Args:
        blocks: K modules that keep the shape of their input, or one, repeated `max_steps` times (IamNN, Leroux 2018).
        halt: the score: the width D, for a linear one, or a module that maps (pooled) states to logits [..., 1]; or a
            list of K - 1 of these, one for each step but the last.
        halting: "act": as above. "ponder" (PonderNet, Banino 2021): h_n is the probability of halting at step n, having
            come there. Training computes all steps and returns the states [K, ...]; `last_halting` [K, ...] has the
            probability of each, for `losses.expected`. Evaluation returns the state in which the probability of having
            halted reaches 1 - epsilon or, with `sample`, a uniform random number: a sample of the halting step.
        epsilon: a buffer in 0..1: at 1 all rows halt after one step, at 0 only those whose scores add up to 1. None:
            0.01 for "act", 0.5 for "ponder" (the median).
        tokens: x is [B, S, D] and tokens halt. Blocks that take the token protocol (`dyncore.nn.attention`) attend by
            original positions; others see tokens [A, D] and must treat each by itself.
        attention: "selected": halted tokens are not attended to. "all_keys": they are, as they were when they halted
            (CALM, Schuster 2022).
        spatial: x is [B, C, H, W] and positions halt (SACT, Figurnov 2017). A block whose forward takes mask= sees the
            map and mask [B, H, W]; others see the live positions as a map of any height and width [1, C, ...],
            where there are many in evaluation with up to 31 zeros at its end, and must treat each by itself (1x1
            convolutions). The score sees [..., C].
        pool: applied to states before the score, for samples: `gates.pool_spatial`, `gates.pool_tokens`.
        prior: halting probability of one step, for the KL divergence of "ponder".
        costs: what each step costs; equal if None.

    `last_cost` is the share of the steps taken, with the gradient of R; `losses()` has "ponder", the mean of N + R, or
    "ponder_kl" in training. Under torch.compile, and on accelerators but in `execution(wait=True)`, every
    step is computed for every row. Raises ValueError or TypeError where x, a block or a score does not fit.
    """

    _checks = {"epsilon": expect_share}  # noqa: RUF012
    _transient = (*DynamicLayer._transient, "last_halting", "_steps", "_remainder")
    last_halting: Tensor | None = None
    _steps: Tensor | None = None
    _remainder: Tensor | None = None
    epsilon: Tensor

    def __init__(
        self,
        blocks: nn.Module | Sequence[nn.Module],
        halt: int | nn.Module | Sequence[int | nn.Module],
        max_steps: int | None = None,
        *,
        halting: str = "act",
        epsilon: float | None = None,
        tokens: bool = False,
        attention: str = "selected",
        spatial: bool = False,
        pool: Callable[[Tensor], Tensor] | None = None,
        prior: float = 0.2,
        sample: bool = False,
        costs: Iterable[float] | None = None,
    ) -> None:
        super().__init__()
        chain = list(blocks) if isinstance(blocks, (Sequence, nn.ModuleList)) else [blocks]
        if isinstance(blocks, (Sequence, nn.ModuleList)) == (max_steps is not None):
            raise ValueError(f"max_steps: expected a number for one repeated block alone, got {max_steps}")
        if not chain:
            raise ValueError("blocks: expected at least one module, got none")
        for i, block in enumerate(chain):
            expect_callable(f"blocks[{i}]", block)
        if max_steps is not None:
            expect_size("max_steps", max_steps)
        if tokens and spatial:
            raise ValueError("spatial: expected rows that are tokens or positions, got both")
        epsilon = (0.01 if halting == "act" else 0.5) if epsilon is None else epsilon
        if not 0.0 < prior < 1.0:
            raise ValueError(f"prior: expected a number in 0..1 (both excluded), got {prior}")
        self.num_steps: int = max_steps or len(chain)
        halts = list(halt) if isinstance(halt, (Sequence, nn.ModuleList)) else [halt]
        if len(halts) not in (1, self.num_steps - 1):
            raise ValueError(f"halt: expected one score or {self.num_steps - 1} of them, got {len(halts)}")
        self.blocks: nn.ModuleList = nn.ModuleList(chain)
        self.halt: nn.ModuleList = nn.ModuleList(Gate(score, weight="none", pool=pool) for score in halts)
        self.halting: str = expect_choice("halting", halting, HALTING)
        self.attention: str = expect_choice("attention", attention, ATTENTION)
        self.tokens = tokens
        self.spatial = spatial
        self.prior = prior
        self.sample = sample
        self._joint: bool = looks_across(chain, tokens, spatial, attention)
        self.register_buffer("epsilon", scalar(expect_share("epsilon", epsilon)))
        self.costs: tuple[float, ...] = shares(costs, self.num_steps)

    def forward(self, x: Tensor) -> Tensor:
        """x after the steps of each row, in the shape and dtype of x; all states [K, ...] for "ponder" in training."""
        lead_dims = 3 if self.spatial else 2 if self.tokens else 1
        wanted = "[B, C, H, W]" if self.spatial else "[B, S, D]" if self.tokens else "[B, ...]"
        expect_input(x)
        if x.device != self.epsilon.device:
            raise ValueError(f"x: expected a tensor on {self.epsilon.device}, as the layer is, got one on {x.device}")
        if x.dim() <= lead_dims or (lead_dims > 1 and x.dim() != lead_dims + 1):
            raise ValueError(f"x: expected shape {wanted}, got {list(x.shape)}")
        whole = x.permute(0, 2, 3, 1) if self.spatial else x
        lead, row = whole.shape[:lead_dims], whole.shape[lead_dims:]
        state = whole if self._joint else whole.reshape(math.prod(lead), *row)
        dtype = torch.promote_types(x.dtype, torch.float32)
        bound = (1 - self.epsilon.clamp(0, 1)).to(dtype).expand(state.shape[: state.dim() - len(row)])
        if self.halting == "ponder" and self.training:
            out, halting = every_step(state, bound, self.num_steps, self._step, self._rule)
            taken = torch.ones(*lead, self.num_steps, dtype=torch.bool, device=x.device)
            self._keep(taken, None, halting.view(-1, *lead))
            out = out.view(self.num_steps, *whole.shape)
        else:
            done = self._run(state, torch.rand_like(bound) if self.sample and self.halting == "ponder" else bound)
            steps = done.steps.view(lead)
            taken = torch.arange(self.num_steps, device=x.device) < steps[..., None]
            remainder = linked(done.remainder.view(lead), self.halt) if self.halting == "act" else None
            self._keep(taken, remainder, None)
            out = done.out.to(x.dtype).view(whole.shape)
            halts = self.halt[done.computed :] if self.halting == "act" else ()
            for part in (*self.blocks[done.computed :], *halts):
                out = linked(out, part)
        return out.movedim(-1, -3) if self.spatial else out

    def _run(self, state: Tensor, bound: Tensor) -> Outcome:
        compacting = not self._joint and mode() != "masked" and countable(state) and bound.numel() > 0
        return (by_compaction if compacting else in_place)(
            state, bound, self.num_steps, self._step, self._rule, self.halting == "act"
        )

    def _keep(self, taken: Tensor, remainder: Tensor | None, halting: Tensor | None) -> None:
        plan = route_mask(taken.view(-1, self.num_steps))
        steps = None if remainder is None else taken.sum(-1)
        cost = functools.partial(_cost, taken, remainder, self.costs)
        self.record(plan, cost, last_halting=halting, _steps=steps, _remainder=remainder)

    def _step(self, n: int, x: Tensor, live: Tensor | None) -> Tensor:
        """States x after step n, where live (all if None); other rows may become anything."""
        i = min(n, len(self.blocks) - 1)
        block, name = self.blocks[i], f"blocks[{i}]"
        if not x.numel():  # many modules refuse an empty batch
            return linked(x, block)
        if self._joint and live is not None:
            if self.tokens:
                return expect_like(name, attend(block, x, live, self.attention == "all_keys"), x)
            image = x.movedim(-1, 1)
            return expect_like(name, called(name, block, image, mask=live), image).movedim(1, -1)
        if live is not None:
            x = torch.where(over(live, x), x, 0)
        if self.spatial:
            return self._positions(name, block, x)
        return expect_like(name, called(name, block, x), x)

    def _positions(self, name: str, block: nn.Module, x: Tensor) -> Tensor:
        """Positions x [A, C] after a block that treats each by itself, seen as a map of lines of `_LINE`."""
        count, width = x.shape
        spare = -count % _LINE
        if not is_eager_cpu(x) or count < 8 * _LINE or (spare and self.training):  # statistics must not see the spare
            image = x.t()[None, :, :, None]
        else:
            lines = F.pad(x, (0, 0, 0, spare)) if spare else x
            image = lines.view(1, -1, _LINE, width).permute(0, 3, 1, 2)
        y = expect_like(name, called(name, block, image), image)
        return y.permute(0, 2, 3, 1).reshape(-1, width)[:count]

    def _rule(self, n: int, x: Tensor, total: Tensor, bound: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(share of step n in the mean, or its probability; who halts; total of the shares so far) for states x."""
        if n == self.num_steps - 1:
            return 1 - total, torch.ones_like(total, dtype=torch.bool), total
        logits: Tensor = self.halt[min(n, len(self.halt) - 1)].logits(x)  # type: ignore[operator]
        if logits.shape != total.shape:
            how = _ROWS.get(
                x.dim() if total.dim() == 1 else 0, "rows that are tokens or positions: tokens= or spatial=True"
            )
            raise ValueError(f"halt: expected logits {[*total.shape, 1]}, got {[*logits.shape, 1]} ({how})")
        share = torch.sigmoid(logits).to(total.dtype)
        if self.halting == "ponder":
            share = share * (1 - total)
        passed = total + share
        halted = passed >= bound
        return torch.where(halted, 1 - total, share), halted, passed

    def losses(self) -> dict[str, Tensor]:
        """Of the latest forward: "ponder", mean of N + R ("act"), or "ponder_kl" ("ponder" in training), unweighted."""
        if self._steps is not None and self._remainder is not None:
            return {"ponder": losses.ponder(self._steps, self._remainder)}
        if self.last_halting is not None:
            return {"ponder_kl": losses.ponder_kl(self.last_halting, self.prior)}
        return {}

    def extra_repr(self) -> str:
        rows = "tokens" if self.tokens else "positions" if self.spatial else "samples"
        return f"num_steps={self.num_steps}, halting={self.halting}, epsilon={shown(self.epsilon)}, rows={rows}"
