"""KeyValueCache: what a block remembers of the tokens that went through it, for decoding step by step."""

from __future__ import annotations

import torch
from torch import Tensor


class KeyValueCache:
    """Keys and values of one block's attention, with the positions of the tokens they belong to.

    Tokens that a layer skipped have none (with `attention="all_keys"` every token has). Make one for each block and
    pass it with every call: `block(x, cache=cache)`, where x [B, S, D] are the tokens that follow those seen before.
    For inference: gradients do not flow into it.

    Attributes:
        seen: how many tokens of each sequence have been given, skipped ones included: the position of the next.
    """

    def __init__(self) -> None:
        self.seen = 0
        self._length = 0
        self._buffers: list[Tensor] = []  # keys and values [B, heads, C, d], positions and live [B, C], C >= the length

    @property
    def positions(self) -> Tensor | None:
        """int [B, M]: the place of each key's token in its sequence; None before the first call."""
        return self._buffers[2][:, : self._length] if self._buffers else None

    @property
    def live(self) -> Tensor | None:
        """bool [B, M]: False for filling, to which nothing attends; None before the first call."""
        return self._buffers[3][:, : self._length] if self._buffers else None

    def __len__(self) -> int:
        """M, the number of keys kept of each sequence, filling included."""
        return self._length

    def append(
        self, keys: Tensor, values: Tensor, positions: Tensor, live: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """All keys and values [B, heads, M, d], positions and live [B, M], after those given [..., N, ...] were added.

        Raises ValueError where the batch is not that of earlier calls.
        """
        batch, count = keys.shape[0], keys.shape[2]
        positions = positions.expand(batch, count)
        live = torch.ones_like(positions, dtype=torch.bool) if live is None else live
        added = [keys.detach(), values.detach(), positions, live]
        if self._buffers and self._buffers[0].shape[0] != batch:
            raise ValueError(f"cache: expected the batch of earlier calls, {self._buffers[0].shape[0]}, got {batch}")
        total = self._length + count
        # inference tensors can't be written to outside of inference mode
        frozen = bool(self._buffers) and self._buffers[0].is_inference() and not torch.is_inference_mode_enabled()
        if frozen or not self._buffers or total > self._buffers[2].shape[1]:  # twice as long: a step copies little
            self._buffers = [
                torch.cat(
                    [*([old.narrow(_dim(t), 0, self._length)] if old is not None else []), t, _room(t, total)], _dim(t)
                )
                for t, old in zip(added, self._buffers or [None] * 4, strict=True)
            ]
        else:
            for buffer, t in zip(self._buffers, added, strict=True):
                buffer.narrow(_dim(t), self._length, count).copy_(t)
        self._length = total
        keys, values, positions, live = (t.narrow(_dim(t), 0, total) for t in self._buffers)
        return keys, values, positions, live


def _dim(t: Tensor) -> int:
    """Along which tokens stand."""
    return 2 if t.dim() == 4 else 1


def _room(t: Tensor, count: int) -> Tensor:
    shape = list(t.shape)
    shape[_dim(t)] = count
    return t.new_zeros(shape)
