"""Attention by position: what a block needs so that tokens may be left out of a sequence and keep their places.

The token protocol, which `TokenSkip` and `MixtureOfDepths` speak and `Attention` and `TransformerBlock` understand:
block(x, positions=, live=, context=, cache=) with

    x          [B, N, D]  tokens of each sequence, in ascending order of position
    positions  [B, N]     int, the place of each in its sequence; None for 0..N-1
    live       [B, N]     bool: a token that is not live is filling: nothing attends to it, its result is not used;
                          None: all are live
    context    [B, S, D]  attend to these tokens, whose positions are 0..S-1, rather than to x; None for x
    cache      a `KeyValueCache`, where x follows tokens of earlier calls: attend to those that it holds, too, and add
               the new ones. Positions None, and those of the context, then begin at cache.seen
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dyncore.nn.cache import KeyValueCache
from dyncore.nn.inputs import called, expect_sequences
from dyncore.nn.mlp import MLP
from dyncore.ops import attention


def rotate(x: Tensor, positions: Tensor, base: float = 10000.0) -> Tensor:
    """Rotary position embedding (RoFormer, Su 2021) of x [B, heads, N, d] at integer positions [B, N] (or [1, N]).

    The first half of the head's width is paired with the second (the Llama layout).
    """
    half = x.shape[-1] // 2
    wide = torch.promote_types(x.dtype, torch.float32)
    rate = base ** (torch.arange(half, device=x.device, dtype=wide) / -half)
    angle = positions[:, None, :, None].to(wide) * rate
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    first, second = x[..., :half], x[..., half:]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


class Attention(nn.Module):
    """Multi-head attention on tokens that carry their positions, by `dyncore.attention`.

    Args:
        dim: D; num_heads: divides D, into an even head width where `rotary`.
        causal: a token attends to positions up to its own.
        rotary: rotate queries and keys by their positions; without it positions serve the causal mask alone.
        num_kv_heads: heads of keys and values, a divisor of num_heads (GQA, Ainslie 2023); as many if None.

    Takes the token protocol of this module and returns [B, N, D]. Raises ValueError on sizes that do not divide.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        causal: bool = True,
        rotary: bool = True,
        rotary_base: float = 10000.0,
        bias: bool = False,
        num_kv_heads: int | None = None,
    ) -> None:
        super().__init__()
        if num_heads < 1 or dim % num_heads:
            raise ValueError(f"num_heads: expected a divisor of dim={dim}, got {num_heads}")
        if rotary and dim // num_heads % 2:
            raise ValueError(f"num_heads: expected an even head width for rotary, got {dim // num_heads}")
        kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        if kv_heads < 1 or num_heads % kv_heads:
            raise ValueError(f"num_kv_heads: expected a divisor of num_heads={num_heads}, got {num_kv_heads}")
        self.num_heads = num_heads
        self.num_kv_heads = kv_heads
        self.causal = causal
        self.rotary = rotary
        self.rotary_base = rotary_base
        self.q: nn.Linear = nn.Linear(dim, dim, bias=bias)
        self.kv: nn.Linear = nn.Linear(dim, 2 * kv_heads * (dim // num_heads), bias=bias)
        self.out: nn.Linear = nn.Linear(dim, dim, bias=bias)

    def forward(
        self,
        x: Tensor,
        positions: Tensor | None = None,
        live: Tensor | None = None,
        context: Tensor | None = None,
        cache: KeyValueCache | None = None,
        sizes: Tensor | None = None,
    ) -> Tensor:
        """Tokens x [B, N, D] to [B, N, D]; the other arguments are those of the token protocol, and sizes [B, N]: how
        many tokens each stands for (see `TokenMerge`)."""
        source = x if context is None else context
        expect_sequences(x)
        q = called("q", self.q, x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        k, v = (t.unflatten(-1, (self.num_kv_heads, -1)).transpose(1, 2) for t in self.kv(source).chunk(2, dim=-1))
        start = 0 if cache is None else cache.seen
        at = _places(x, start) if positions is None else positions
        places = at if context is None else _places(context, start)
        if self.rotary:
            q, k = rotate(q, at, self.rotary_base), rotate(k, places, self.rotary_base)
        k_live = live if context is None else None
        if cache is not None:
            if sizes is not None:
                raise ValueError("sizes: expected None with a cache, got a Tensor")
            if positions is None:
                cache.seen += x.shape[1]
            k, v, places, k_live = cache.append(k, v, places, k_live)
        elif context is None:  # ascending positions: causal by place is causal by index
            at = places = None
        y = attention(
            q,
            k,
            v,
            q_positions=at,
            k_positions=places,
            causal=self.causal,
            q_live=live,
            k_live=k_live,
            k_sizes=sizes,
        )
        return self.out(y.transpose(1, 2).flatten(2))

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, causal={self.causal}, rotary={self.rotary}"


def _places(x: Tensor, start: int = 0) -> Tensor:
    """[1, N]: the positions of tokens none of which was left out."""
    return torch.arange(start, start + x.shape[1], device=x.device)[None]


class TransformerBlock(nn.Module):
    """Pre-norm block: h = x + attention(norm(x)); h + mlp(norm(h)), on tokens that carry their positions.

    Args:
        dim, num_heads, causal, rotary, num_kv_heads: as in `Attention`.
        hidden_dim: width of the MLP, 4 * dim if None.
        activation, bias: of the MLP, as in `MLP`.
        mlp: any module on [B, N, D] instead, such as a `MoE`.

    Takes the token protocol of this module; a context is normalised as x is.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        hidden_dim: int | None = None,
        *,
        causal: bool = True,
        rotary: bool = True,
        activation: str = "gelu",
        bias: bool = True,
        mlp: nn.Module | None = None,
        num_kv_heads: int | None = None,
    ) -> None:
        super().__init__()
        self.dim = dim
        self.norm_attention: nn.LayerNorm = nn.LayerNorm(dim)
        self.attention: Attention = Attention(dim, num_heads, causal=causal, rotary=rotary, num_kv_heads=num_kv_heads)
        self.norm_mlp: nn.LayerNorm = nn.LayerNorm(dim)
        if mlp is None:  # an empty Sequential is False
            mlp = MLP(dim, hidden_dim or 4 * dim, activation=activation, bias=bias)
        self.mlp: nn.Module = mlp

    def forward(
        self,
        x: Tensor,
        positions: Tensor | None = None,
        live: Tensor | None = None,
        context: Tensor | None = None,
        cache: KeyValueCache | None = None,
        sizes: Tensor | None = None,
    ) -> Tensor:
        """Tokens x [B, N, D] to [B, N, D]; the other arguments are those of the token protocol and of `Attention`."""
        expect_sequences(x, self.dim)
        if context is not None:
            context = self.norm_attention(context)
        normed = called("norm_attention", self.norm_attention, x)
        h = x + self.attention(normed, positions, live, context, cache, sizes)
        return h + self.mlp(self.norm_mlp(h))
