"""Recorded routing: which rows and which experts a trained model chose on real input, in a small JSON file.

    {"schema": "dyncore.routing/1", "source": str, "command": str, "width": H, "expert_width": I, "layers": [...]}

A layer holds its name, rows T, and either "selected" (hex of the bits of the mask, row 0 the highest bit of the first
byte) or "groups", "top_k" and "expert" (hex, one byte for each row and choice). examples/digits.py --record writes it;
the file shipped with the package is what that gave.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

SCHEMA = "dyncore.routing/1"
SHIPPED = Path(__file__).with_name("digits_routing.json")


@dataclasses.dataclass(frozen=True)
class Layer:
    """Choices of one layer: a mask bool [T] (token skipping) or experts int64 [T, K] out of num_groups."""

    name: str
    mask: Tensor | None = None
    expert: Tensor | None = None
    num_groups: int = 1


@dataclasses.dataclass(frozen=True)
class Routing:
    """Recorded choices of a model of width H, whose experts have the hidden width I."""

    source: str
    command: str
    width: int
    expert_width: int
    layers: list[Layer]


def _pack_bits(mask: Tensor) -> str:
    bits = "".join("1" if kept else "0" for kept in mask.tolist())
    bits += "0" * (-len(bits) % 8)
    return bytes(int(bits[i : i + 8], 2) for i in range(0, len(bits), 8)).hex()


def _unpack_bits(text: str, rows: int) -> Tensor:
    bits = "".join(f"{byte:08b}" for byte in bytes.fromhex(text))
    if not rows <= len(bits) < rows + 8:
        raise ValueError(f"selected: expected the bits of {rows} rows, got {len(bits)}")
    return torch.tensor([bit == "1" for bit in bits[:rows]])


def _layer_record(layer: Layer) -> dict[str, Any]:
    if layer.mask is not None:
        return {"name": layer.name, "rows": layer.mask.shape[0], "selected": _pack_bits(layer.mask)}
    if layer.expert is None or layer.num_groups > 256:
        raise ValueError(f"layer: expected a mask, or experts out of at most 256, got {layer.num_groups} groups")
    rows, top_k = layer.expert.shape
    text = bytes(layer.expert.reshape(-1).tolist()).hex()
    return {"name": layer.name, "rows": rows, "groups": layer.num_groups, "top_k": top_k, "expert": text}


def _layer(record: dict[str, Any]) -> Layer:
    if "selected" in record:
        return Layer(record["name"], mask=_unpack_bits(record["selected"], record["rows"]))
    expert = torch.tensor(list(bytes.fromhex(record["expert"])), dtype=torch.int64)
    if expert.numel() != record["rows"] * record["top_k"] or (expert >= record["groups"]).any():
        raise ValueError(f"expert: expected {record['rows']} x {record['top_k']} indices below {record['groups']}")
    return Layer(record["name"], expert=expert.view(record["rows"], record["top_k"]), num_groups=record["groups"])


def save_routing(path: str | os.PathLike[str], routing: Routing) -> None:
    document = {
        "schema": SCHEMA,
        "source": routing.source,
        "command": routing.command,
        "width": routing.width,
        "expert_width": routing.expert_width,
        "layers": [_layer_record(layer) for layer in routing.layers],
    }
    Path(path).write_text(json.dumps(document, indent=1) + "\n")


def load_routing(path: str | os.PathLike[str]) -> Routing:
    """Raises ValueError where the file holds no routing of this schema."""
    document = json.loads(Path(path).read_text())
    schema = document.get("schema") if isinstance(document, dict) else None
    if schema != SCHEMA:
        raise ValueError(f"path: expected a routing of schema {SCHEMA}, {path} has {schema!r}")
    layers = [_layer(record) for record in document["layers"]]
    return Routing(document["source"], document["command"], document["width"], document["expert_width"], layers)


@functools.cache
def recorded() -> Routing:
    """The routing of examples/digits.py that is shipped with the package."""
    return load_routing(SHIPPED)
