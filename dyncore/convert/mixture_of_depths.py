"""mixture_of_depths: every other block of a trained transformer computed for the tokens alone that a router chooses."""

from __future__ import annotations

import dataclasses
import inspect
import weakref
from collections.abc import Callable
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn

from dyncore.nn.base import expect_choice, expect_like, expect_size, linked
from dyncore.nn.tokens import INFERENCE, ROUTER_WEIGHTS, MixtureOfDepths

_PROTOCOL = {"positions", "live"}
_ALREADY = "mixes depths already"


@dataclasses.dataclass(frozen=True)
class Mixed:
    """One block that some tokens pass by now: its name within the model, its class and its width."""

    name: str
    was: str
    dim: int


@dataclasses.dataclass(frozen=True)
class Kept:
    """One block that was to be changed and was left as it is: its name, its class, and why."""

    name: str
    kind: str
    reason: str


@dataclasses.dataclass(frozen=True, repr=False)
class Report:
    """What mixture_of_depths did.

    Attributes:
        mixed: the blocks that a share of the tokens goes through.
        dense: names of the blocks in between, which every token goes through.
        kept: those whose turn it was, and why they stayed.
        capacity: the share, or count, of a sequence's tokens.
        notes: what else was changed.
    """

    mixed: tuple[Mixed, ...]
    dense: tuple[str, ...]
    kept: tuple[Kept, ...]
    capacity: float | int
    notes: tuple[str, ...] = ()

    def __repr__(self) -> str:
        lines = [f"{len(self.mixed)} blocks with capacity {self.capacity}, {len(self.dense)} dense"]
        if not self.mixed and not self.kept:
            lines.append("  no list of transformer blocks was recognised: nn.TransformerEncoderLayer, blocks that take")
            lines.append("  positions= and live=, or layers of transformers (hidden_states, attention_mask)")
        lines += [f"  {m.name}: {m.was} -> MixtureOfDepths, D={m.dim}" for m in self.mixed]
        lines += [f"  {k.name}: {k.kind} kept: {k.reason}" for k in self.kept]
        return "\n".join([*lines, *(f"  {note}" for note in self.notes)])


def _names(block: nn.Module) -> tuple[str, ...]:
    """The arguments of the block's forward."""
    return tuple(inspect.signature(block.forward).parameters)


def _at(t: Tensor, index: Tensor) -> Tensor:
    """t [B or 1, S, ...] at index [B, N] of its second dimension."""
    t = t.expand(index.shape[0], *t.shape[1:])
    index = index.view(*index.shape, *(1,) * (t.dim() - 2)).expand(*index.shape, *t.shape[2:])
    return t.gather(1, index)


def _pairs(mask: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """mask [B or 1, h, S, K] at rows [B, N] and columns [B, M]."""
    mask = mask.expand(rows.shape[0], *mask.shape[1:])
    mask = mask.gather(2, rows[:, None, :, None].expand(-1, mask.shape[1], -1, mask.shape[3]))
    return mask.gather(3, columns[:, None, None, :].expand(*mask.shape[:3], -1))


def _only(mask: Tensor, live: Tensor, keys: Tensor) -> Tensor:
    """mask [B, h, N, M], bool or added to the scores, with the keys [B, M] alone; filling attends to anything, so that
    no row is empty."""
    keys, filling = keys[:, None, None, :], ~live[:, None, :, None]
    if mask.dtype == torch.bool:
        return (mask & keys) | filling
    return mask.masked_fill(~keys, torch.finfo(mask.dtype).min).masked_fill(filling, 0)


class _Converted(MixtureOfDepths):
    """A MixtureOfDepths that is called as its block was. What it does not have, the block has."""

    _adapts = True

    def __init__(self, block: nn.Module, capacity: float | int, **options: Any) -> None:
        super().__init__(block, capacity, **options)
        self._arguments = _names(block)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "block" or name.startswith("__"):
                raise
            return getattr(super().__getattr__("block"), name)

    def _named(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        return {**dict(zip(self._arguments[1:], args, strict=False)), **kwargs}


class MixedEncoderLayer(_Converted):
    """`MixtureOfDepths` in the place of a torch.nn.TransformerEncoderLayer; takes the same arguments."""

    def forward(self, src: Tensor, *args: Any, **kwargs: Any) -> Tensor:  # type: ignore[override]
        """src with the chosen tokens through the layer, the others as they are."""
        given = self._named(args, kwargs)
        attention: Any = self.block.self_attn
        first, heads = attention.batch_first, attention.num_heads

        def call(tokens: Tensor, positions: Tensor | None, live: Tensor | None, context: Tensor | None) -> Tensor:
            if not tokens.numel():
                return linked(tokens, self.block)
            options = given
            if positions is not None or live is not None:
                batch, count = tokens.shape[:2]
                index = torch.arange(count, device=tokens.device).expand(batch, -1) if positions is None else positions
                options = _encoder_masks(given, index, live, heads)
            y = self.block(tokens if first else tokens.transpose(0, 1), **options)
            return expect_like("block", y if first else y.transpose(0, 1), tokens)

        x = src if first else src.transpose(0, 1)
        y = self._mix(x, call)
        return y if first else y.transpose(0, 1)


def _encoder_masks(given: dict[str, Any], index: Tensor, live: Tensor | None, heads: int) -> dict[str, Any]:
    """src_mask [S, S] or [B heads, S, S] and src_key_padding_mask [B, S] of the tokens at index [B, N]."""
    mask, padding, causal = (given.get(n) for n in ("src_mask", "src_key_padding_mask", "is_causal"))
    count = index.shape[1]
    padding = None if padding is None else _at(padding, index)
    if live is None and (mask is None or (causal and mask.dim() == 2)):  # ascending: causal by place is by index
        mask = None if mask is None else mask[:count, :count]
        return {**given, "src_mask": mask, "src_key_padding_mask": padding}
    if mask is None:
        mask = torch.zeros(count, count, dtype=torch.bool, device=index.device)[None, None]
    else:
        mask = mask[None, None] if mask.dim() == 2 else mask.unflatten(0, (-1, heads))
        mask = _pairs(mask, index, index)
    if live is not None:
        if mask.dtype == torch.bool:  # torch's masks say what is left out
            mask = ~_only(~mask, live, live)
        else:
            mask = _only(mask, live, live)
    mask = mask.expand(index.shape[0], heads, count, count).flatten(0, 1)
    return {**given, "src_mask": mask, "src_key_padding_mask": padding, "is_causal": False}


class _Seen:
    """What a layer's cache holds: how many tokens came, and of its keys [B, M] the places, and which are no filling."""

    def __init__(self) -> None:
        self.count = 0
        self.places: Tensor | None = None
        self.live: Tensor | None = None

    def add(self, places: Tensor, live: Tensor | None) -> tuple[Tensor, Tensor]:
        live = torch.ones_like(places, dtype=torch.bool) if live is None else live
        if self.places is not None and self.live is not None:
            places, live = torch.cat([self.places, places], 1), torch.cat([self.live, live], 1)
        self.places, self.live = places, live
        return places, live


class MixedDecoderLayer(_Converted):
    """`MixtureOfDepths` in the place of a layer of transformers; takes the same arguments.

    Position embeddings, position ids and masks are those of the chosen tokens. A cache of keys and values holds the
    chosen tokens alone (with `inference` "predictor" or "threshold"; reordering and cropping it is refused).
    """

    _transient = (*MixtureOfDepths._transient, "_caches")
    _caches: weakref.WeakKeyDictionary[Any, _Seen] | None = None

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:  # type: ignore[override]
        """hidden_states with the chosen tokens through the layer, the others as they are."""
        given = self._named(args, kwargs)
        cache = given.get("past_key_values")
        if cache is None or self.training:  # training compares with later tokens: nothing is to be kept
            if cache is not None:
                given = {**given, "past_key_values": None}
            return self._mix(hidden_states, self._with(given, hidden_states.shape[1], None))
        seen = self._expect_cache(cache)
        y = self._mix(hidden_states, self._with(given, hidden_states.shape[1], seen))
        seen.count += hidden_states.shape[1]
        return y

    def _expect_cache(self, cache: Any) -> _Seen:
        index = next((m.layer_idx for m in self.block.modules() if hasattr(m, "layer_idx")), None)
        if self.inference == "topk":
            raise ValueError(
                "past_key_values: expected None (use_cache=False) with inference='topk', which compares tokens with "
                f"later ones, got {type(cache).__name__}; 'predictor' and 'threshold' decode step by step"
            )
        if index in (None, 0):
            raise ValueError("past_key_values: expected None where the first block mixes depths, got a cache")
        if self._caches is None:
            self._caches = weakref.WeakKeyDictionary()
        seen = self._caches.setdefault(cache, _Seen())
        held, known = cache.get_seq_length(index), 0 if seen.places is None else seen.places.shape[1]
        if held != known:
            raise ValueError(
                f"past_key_values: expected a cache that this layer alone has filled, with {known} keys, got {held}"
            )
        return seen

    def _with(self, given: dict[str, Any], seq: int, seen: _Seen | None) -> Callable[..., Tensor]:
        """The block with the arguments `given` for `seq` tokens, at those that it is called with."""
        block = self.block

        def call(tokens: Tensor, positions: Tensor | None, live: Tensor | None, context: Tensor | None) -> Tensor:
            if not tokens.numel():
                return linked(tokens, block)
            options = given
            if positions is not None or live is not None or seen is not None:
                batch, count = tokens.shape[:2]
                index = torch.arange(count, device=tokens.device).expand(batch, -1) if positions is None else positions
                options = _decoder_arguments(given, index, live, seq, seen, _is_causal(block))
            return expect_like("block", block(tokens, **options), tokens)

        return call


def _is_causal(block: nn.Module) -> bool:
    return next((bool(m.is_causal) for m in block.modules() if hasattr(m, "is_causal")), True)


def _decoder_arguments(
    given: dict[str, Any], index: Tensor, live: Tensor | None, seq: int, seen: _Seen | None, causal: bool
) -> dict[str, Any]:
    """The arguments of a transformers layer at index [B, N] of its `seq` tokens."""
    options = dict(given)
    for name, value in given.items():
        if name in ("position_ids", "position_embeddings"):
            options[name] = pytree.tree_map_only(Tensor, lambda t: _at(t, index), value)
        elif name not in ("hidden_states", "attention_mask", "cache_position", "past_key_values"):
            if isinstance(value, Tensor) and value.dim() > 1 and value.shape[1] == seq:
                raise ValueError(f"{name}: expected no tensor of all {seq} tokens that is unknown here, got one")
    columns, keys = index, live
    start = 0
    if seen is not None:
        start = seen.count
        columns, keys = seen.add(index + start, live)
    mask = given.get("attention_mask")
    if isinstance(mask, Tensor) and mask.dim() == 2:
        mask = _at(mask, columns)
        mask = mask if keys is None else mask * keys
    elif isinstance(mask, Tensor) and mask.dim() == 4:
        mask = _pairs(mask, index, columns)
    elif mask is not None:
        raise ValueError(f"attention_mask: expected None or a tensor of 2 or 4 dimensions, got {type(mask).__name__}")
    elif live is not None or seen is not None:
        mask = columns[:, None, None, :] <= (index + start)[:, None, :, None] if causal else columns[:, None, None] >= 0
        mask = mask.expand(-1, -1, index.shape[1], -1)
    if mask is not None and mask.dim() == 4 and keys is not None:
        mask = _only(mask, torch.ones_like(index, dtype=torch.bool) if live is None else live, keys)
    if "attention_mask" in given or mask is not None:
        options["attention_mask"] = mask
    return options


def _kind(block: nn.Module) -> type[MixtureOfDepths] | str | None:
    """What takes the block's place; a reason where it looks like one and nothing does; None where it is no block."""
    names = _names(block)
    if isinstance(block, MixtureOfDepths):
        return _ALREADY
    if isinstance(block, nn.TransformerEncoderLayer):
        return MixedEncoderLayer
    if _PROTOCOL <= set(names):
        return MixtureOfDepths
    if names and names[0] == "hidden_states" and any("att" in name for name, _ in block.named_children()):
        return "expected no position_bias between tokens, got one" if "position_bias" in names else MixedDecoderLayer
    return None


def _dim(model: nn.Module, block: nn.Module) -> int:
    for value in (
        getattr(block, "dim", None),
        getattr(getattr(block, "self_attn", None), "embed_dim", None),
        getattr(getattr(model, "config", None), "hidden_size", None),
    ):
        if isinstance(value, int):
            return value
    raise ValueError("expected a width: dim of the block, embed_dim of its self_attn or hidden_size of model.config")


def mixture_of_depths(
    model: nn.Module,
    every: int = 2,
    capacity: float | int = 0.125,
    *,
    weight: str = "hard",
    inference: str = "topk",
) -> Report:
    """Let the tokens that a router chooses alone go through every `every`-th block of a trained model, in place
    (Mixture-of-Depths, Raposo 2024).

    Args:
        model: any module with a list (ModuleList, Sequential, TransformerEncoder) of transformer blocks: those of
            torch.nn, of dyncore.nn or others that take positions= and live=, and of transformers (Llama, Qwen, Mistral,
            GPT-2 and their kin, with eager or sdpa attention).
        every: of each `every` blocks in a row the last is changed (2, as in the paper: every other one; 1: all).
        capacity: tokens of each sequence that it computes; a float is a ratio, an int a count.
        weight: as for nn.MixtureOfDepths. "hard": a chosen token comes out as before, so that at capacity=1.0 the
            model is the dense one, exactly; the router learns by the straight-through gradient. "linear" is the
            paper's, for training from the beginning.
        inference: how tokens are chosen in evaluation, as for nn.MixtureOfDepths. "predictor" and "threshold" are
            causal and decode step by step with the model's own cache, after training (they learn by `losses()`).

    Weights stay the same Parameters, the block's names gain ".block"; the routers (".router", ".predictor") are new and
    trainable: a dense model that was not trained for it loses quality until it is fine-tuned. Convert before wrapping
    the model (torch.compile, DistributedDataParallel) and give the optimizer the new Parameters. Layers are
    `nn.MixtureOfDepths`: `capacity` may be moved at run time, and `nn.collect_costs(model)` says what was computed.
    output_hidden_states of transformers sees the chosen tokens alone in these layers. Routers see no padding mask: in a
    padded batch filling competes for the capacity.

    Returns a Report of what was done. Raises TypeError or ValueError on arguments out of range, such as an `every`
    above the number of blocks.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a module, got {type(model).__name__}")
    expect_size("every", every)
    expect_choice("weight", weight, tuple(ROUTER_WEIGHTS))
    expect_choice("inference", inference, INFERENCE)
    mixed: list[Mixed] = []
    dense: list[str] = []
    kept: list[Kept] = []
    options: dict[str, Any] = {"weight": weight, "inference": inference}
    longest = ("", 0)  # of the lists of blocks
    for path, parent in list(model.named_modules()):
        if not isinstance(parent, (nn.ModuleList, nn.Sequential)):
            continue
        blocks = [(name, block, _kind(block)) for name, block in parent.named_children()]
        blocks = [(name, block, kind) for name, block, kind in blocks if kind is not None]
        if len(blocks) > longest[1]:
            longest = (path, len(blocks))
        entries = sum(any(module is block for _, block, _ in blocks) for module in parent)
        for i, (name, block, kind) in enumerate(blocks):
            full = f"{path}.{name}" if path else name
            if i % every != every - 1:
                if kind == _ALREADY:
                    kept.append(Kept(full, type(block).__name__, _ALREADY))
                else:
                    dense.append(full)
                continue
            try:
                if isinstance(kind, str):
                    raise ValueError(kind)
                if entries != len(blocks):
                    raise ValueError("expected blocks of their own, got one in several places")
                dim = _dim(model, block)
                layer = kind(block, capacity, dim=dim, **options)
            except ValueError as error:
                if str(error).startswith("capacity"):
                    raise
                kept.append(Kept(full, type(block).__name__, str(error)))
                continue
            like = next(block.parameters(), torch.empty(0))
            for part in (layer.router, layer.predictor):
                if part is not None:
                    part.to(device=like.device, dtype=like.dtype)
            layer.register_buffer("threshold", layer.threshold.to(like.device))
            layer.train(block.training)
            parent._modules[name] = layer
            mixed.append(Mixed(full, type(block).__name__, dim))
    if 0 < longest[1] < every:
        raise ValueError(
            f"every: expected at most {longest[1]}, the number of blocks in {longest[0] or 'the model'}, got {every}"
        )
    return Report(tuple(mixed), tuple(dense), tuple(kept), capacity, tuple(_adapt(model, mixed, inference)))


def _adapt(model: nn.Module, mixed: list[Mixed], inference: str) -> list[str]:
    """Settings of the whole model that would not fit any more; what was changed."""
    notes: list[str] = []
    if not mixed:
        return notes
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoder) and any(isinstance(m, _Converted) for m in module.layers):
            module.use_nested_tensor = False  # its layers would be given nested tensors, for the fused path alone
    config = getattr(model, "config", None)
    if inference == "topk" and getattr(config, "use_cache", False):
        for part in (config, getattr(model, "generation_config", None)):
            if part is not None:
                part.use_cache = False
        notes.append("use_cache = False: the top k of a sequence compares with later tokens")
    return notes
