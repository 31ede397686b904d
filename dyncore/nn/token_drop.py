"""Layers after which a sequence has fewer tokens: TokenDrop leaves some out, TokenMerge makes one of several.

The count is fixed by the length, so shapes are static on every device, and whatever follows, attention and MLPs of any
make, runs on fewer tokens in any execution mode: there is no masked form of it.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor, nn

from dyncore.nn.base import DynamicLayer, executed
from dyncore.nn.gates import Capacity, Gate
from dyncore.nn.inputs import expect_sequences
from dyncore.ops import compact, expand, scatter_rows
from dyncore.ops.autograd import wants_grad
from dyncore.plan import Plan, select, select_topk


def _amount(name: str, value: float | int) -> Capacity:
    """A ratio or a count of tokens; errors call it `name`."""
    amount = Capacity()
    try:
        amount.capacity = value
    except (TypeError, ValueError) as error:
        raise type(error)(str(error).replace("capacity", name, 1)) from None
    return amount


def _expect_first(keep_first: int) -> int:
    if not isinstance(keep_first, int) or isinstance(keep_first, bool):
        raise TypeError(f"keep_first: expected an int >= 0, got {type(keep_first).__name__}")
    if keep_first < 0:
        raise ValueError(f"keep_first: expected an int >= 0, got {keep_first}")
    return keep_first


class LocalGlobalScore(nn.Module):
    """DynamicViT's score of a token by itself and by the mean of all (Rao 2021): [B, S, dim] to logits [B, S, 1]."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        half = max(dim // 2, 1)
        self.embed: nn.Module = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, 2 * half), nn.GELU())
        self.head: nn.Module = nn.Sequential(nn.Linear(2 * half, half), nn.GELU(), nn.Linear(half, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Logits [B, S, 1] of tokens x [B, S, dim]."""
        local, everywhere = self.embed(x).chunk(2, dim=-1)
        everywhere = everywhere.mean(-2, keepdim=True).expand_as(local)
        return self.head(torch.cat([local, everywhere], dim=-1))


class TokenDrop(DynamicLayer, Gate):
    """Keeps the tokens of highest score for all layers that follow (DynamicViT, Rao 2021): [B, S, D] to [B, K, D].

    Args:
        keep: of each sequence, without the first tokens; a float is a ratio (1.0: all), an int a count. May be moved.
        score: D, for a linear score of each token, or a module [B, S, D] -> logits [B, S, 1] (`LocalGlobalScore`, as in
            the paper). Linear scores are computed in float32.
        keep_first: this many tokens at the front (a class token) are always kept, unweighted.
        weight: what a kept token is multiplied with: "hard": 1, with the gradient of p = sigmoid(logit), so that the
            task teaches the score; "soft": p; "none": 1, without a gradient.

    In training Gumbel noise is added to the logits, so that tokens are drawn without replacement (Gumbel top-k, Kool
    2019) and a token that is left out today has its chance; in evaluation there is none. A token whose score is NaN is
    the last to be kept. The order of the tokens stays. The paper trains with all tokens and a masked attention; here
    dropped tokens cost nothing in training, too.

    `last_cost` is 1 for a token that goes on and 0 for others. `gather` picks the same tokens of other tensors (their
    positions, for rotary attention), `restore` puts the kept ones back among all. Raises TypeError or ValueError on
    arguments and shapes that do not fit.
    """

    def __init__(self, keep: float | int, score: int | nn.Module, *, keep_first: int = 1, weight: str = "hard") -> None:
        super().__init__(score, weight=weight)
        self.keep = keep
        self.keep_first: int = _expect_first(keep_first)

    @property
    def keep(self) -> float | int:
        """Tokens of each sequence that are kept beside the first ones: a float is a ratio, an int a count."""
        return self._amount.capacity

    @keep.setter
    def keep(self, keep: float | int) -> None:
        self._amount = _amount("keep", keep)

    def forward(self, x: Tensor) -> Tensor:
        """The kept tokens [B, K, D] of x [B, S, D]."""
        expect_sequences(x)
        batch, seq = x.shape[:2]
        first, count = self._counts(seq)
        logits = self.logits(x)
        rank = logits.detach()
        if self.training:
            rank = rank - torch.empty_like(rank).exponential_().log()  # Gumbel noise
        place = torch.arange(seq, device=x.device)
        rank = torch.where(place < first, torch.inf, torch.nan_to_num(rank, nan=-torch.inf, posinf=3e38))
        scale = None
        if self.weight == "soft" or (self.weight == "hard" and wants_grad(logits)):
            p = torch.sigmoid(logits)
            scale = p if self.weight == "soft" else 1 + (p - p.detach())
            scale = torch.where(place < first, 1.0, scale)
        plan = select_topk(rank, count, scale)
        self.record(plan, functools.partial(executed, plan, logits.shape, scale, dtype=logits.dtype))
        kept = compact(x.reshape(batch * seq, x.shape[2]), plan)
        if plan.scale is not None:
            kept = (kept * plan.scale[:, None]).to(x.dtype)
        return kept.view(batch, count, x.shape[2])

    def _counts(self, seq: int) -> tuple[int, int]:
        """(tokens at the front, all that are kept)."""
        first = min(self.keep_first, seq)
        return first, first + self._amount.kept(seq - first)

    def gather(self, t: Tensor) -> Tensor:
        """The same tokens of another tensor: [B, S, ...] to [B, K, ...], of any dtype."""
        plan = self._latest()
        batch, seq = t.shape[:2]
        kept = compact(t.reshape(batch * seq, *t.shape[2:]), plan)
        return kept.view(batch, plan.num_slots // batch if batch else self._counts(seq)[1], *t.shape[2:])

    def restore(self, y: Tensor, base: Tensor) -> Tensor:
        """base [B, S, ...] with y [B, K, ...] in the places of the kept tokens."""
        flat = expand(y.flatten(0, 1), self._latest(), base.flatten(0, 1))
        return flat.view(base.shape)

    def _latest(self) -> Plan:
        if self.last_plan is None:
            raise ValueError("TokenDrop: expected a forward before, which chooses the tokens, got none")
        return self.last_plan

    def extra_repr(self) -> str:
        return f"keep={self.keep}, keep_first={self.keep_first}, {super().extra_repr()}"


class Merged(NamedTuple):
    """What `TokenMerge.merge` returns.

    Attributes:
        tokens: [B, S - r, D].
        sizes: float [B, S - r], how many tokens each stands for.
        source: int64 [B, S], the place of each token of before among them.
    """

    tokens: Tensor
    sizes: Tensor
    source: Tensor


class TokenMerge(DynamicLayer):
    """Makes one token of similar ones, for all layers that follow (ToMe, Bolya 2023): [B, S, D] to [B, S - r, D].

    Args:
        r: pairs merged in each sequence: a float is a ratio of its tokens, an int a count; never more than half of the
            tokens. May be moved.
        keep_first: this many tokens at the front (a class token) are merged with none.

    Bipartite soft matching: tokens in even places look for the most similar one in an odd place (cosine of `metric`),
    and the r best pairs are merged, to means weighted by how many tokens each stands for. The order of the tokens that
    stay is kept; which merge depends on all of them, so it is not causal. Nothing is learned: it serves trained models
    as it is, and gradients go through the means.

    After a forward `last_sizes` [B, S - r] says how many tokens each stands for: pass it on to the next
    `TokenMerge(x, sizes)` and to attention (`TransformerBlock(x, sizes=)`, the paper's proportional attention).
    `last_source` int [B, S] says where each token went; `unmerge` copies results back to there. `merge` returns the
    three together (under torch.export, which keeps no record, too). `last_cost` is 1 for a token that goes on and 0 for
    one that was merged into another. Raises TypeError or ValueError on what does not fit.
    """

    _transient = (*DynamicLayer._transient, "last_sizes", "last_source")
    last_sizes: Tensor | None = None
    last_source: Tensor | None = None

    def __init__(self, r: float | int, *, keep_first: int = 1) -> None:
        super().__init__()
        self.r = r
        self.keep_first: int = _expect_first(keep_first)

    @property
    def r(self) -> float | int:
        """Pairs merged in each sequence: a float is a ratio of its tokens, an int a count."""
        return self._amount.capacity

    @r.setter
    def r(self, r: float | int) -> None:
        self._amount = _amount("r", r)

    def forward(self, x: Tensor, sizes: Tensor | None = None, metric: Tensor | None = None) -> Tensor:
        """The tokens [B, S - r, D] that stand for x [B, S, D]; see `merge`."""
        return self.merge(x, sizes, metric).tokens

    def merge(self, x: Tensor, sizes: Tensor | None = None, metric: Tensor | None = None) -> Merged:
        """The tokens that stand for x [B, S, D], their sizes, and where each of x went.

        sizes [B, S] is how many tokens each of x stands for (1 if None), metric [B, S, C] what to compare (the paper
        takes the keys of the attention before; x if None).
        """
        expect_sequences(x)
        batch, seq = x.shape[:2]
        for name, t, dims in (("sizes", sizes, 2), ("metric", metric, 3)):
            if t is not None and (t.dim() != dims or t.shape[:2] != x.shape[:2]):
                shape = f"[{batch}, {seq}" + (", C]" if dims == 3 else "]")
                raise ValueError(f"{name}: expected shape {shape}, got {list(t.shape)}")
        wide = torch.promote_types(x.dtype, torch.float32)
        sizes = x.new_ones(batch, seq, dtype=wide) if sizes is None else sizes.detach().to(wide)
        first = min(self.keep_first, seq)
        count = min(self._amount.kept(seq), (seq + 1) // 2 - (first + 1) // 2)
        count = 0 if first // 2 == seq // 2 else count  # no odd place that may be merged into
        kept, source = self._match((x if metric is None else metric).detach(), first, count)
        rows = (source + (seq - count) * torch.arange(batch, device=x.device)[:, None]).reshape(-1)
        total = sizes.new_zeros(batch * (seq - count)).index_add(0, rows, sizes.reshape(-1))  # whole numbers: exact
        merged = total.view(batch, seq - count)
        plan = select(kept)
        self.record(plan, functools.partial(executed, plan, kept.shape), last_sizes=merged, last_source=source)
        if not count:
            return Merged(x, merged, source)
        order = rows.argsort(stable=True)
        share = sizes.reshape(-1) / total.index_select(0, rows)
        offsets = torch.arange(2, device=x.device) * order.shape[0]
        into = Plan.from_slots(
            rows.index_select(0, order), offsets, num_rows=total.shape[0], scale=share.index_select(0, order)
        )
        out = scatter_rows(x.reshape(batch * seq, x.shape[2]).index_select(0, order), into)
        return Merged(out.view(batch, seq - count, x.shape[2]), merged, source)

    @staticmethod
    def _match(metric: Tensor, first: int, count: int) -> tuple[Tensor, Tensor]:
        """(bool [B, S]: who stays, int64 [B, S]: where each goes among those)."""
        batch, seq, _ = metric.shape
        kept = torch.ones(batch, seq, dtype=torch.bool, device=metric.device)
        target = torch.arange(seq, device=metric.device).expand(batch, seq)
        if count:
            unit = nn.functional.normalize(metric.float(), dim=-1)
            similarity = unit[:, ::2] @ unit[:, 1::2].transpose(1, 2)
            similarity[:, :, : first // 2] = -torch.inf
            best, partner = similarity.max(2)
            best[:, : (first + 1) // 2] = -torch.inf
            merged = 2 * best.topk(count, dim=1).indices
            kept = kept.scatter(1, merged, False)
            target = target.scatter(1, merged, 2 * partner.gather(1, merged // 2) + 1)
        return kept, (kept.cumsum(1) - 1).gather(1, target)

    def unmerge(self, y: Tensor, source: Tensor | None = None) -> Tensor:
        """What became of each token before the merge (the latest if `source` is None): [B, S - r, ...] to
        [B, S, ...]."""
        source = self.last_source if source is None else source
        if source is None:
            raise ValueError("TokenMerge: expected a forward before, which merges tokens, got none")
        batch, count = y.shape[:2]
        rows = source + count * torch.arange(batch, device=y.device)[:, None]
        flat = y.reshape(batch * count, *y.shape[2:]).index_select(0, rows.reshape(-1))
        return flat.view(*source.shape, *y.shape[2:])

    def extra_repr(self) -> str:
        return f"r={self.r}, keep_first={self.keep_first}"
