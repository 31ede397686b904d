"""The tilings of the grouped products, by architecture, arithmetic and rows a group, and how many programs to launch.
Floor 0, shared by the kernels. Static facts alone choose, since the live count stays on the device; where `dyncore
tune` has measured the device, its table goes before the tilings here.

Every line is compiled for its architecture by tests/kernels, which looks at registers, shared memory and instructions.
None has been timed on a GPU yet: the reasons given are counts of bytes and cycles.
"""

import bisect
import functools
from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

import torch
import triton

from .tiles import num_tiles


class Config(NamedTuple):
    """A program computes BM x BN results in steps of BK, num_stages steps in flight; a multiprocessor holds `resident`
    such programs."""

    BM: int
    BN: int
    BK: int
    num_warps: int
    num_stages: int
    resident: int

    def options(self) -> dict[str, int | None]:
        """Of a launch: the registers of a thread are held to what lets `resident` programs in."""
        registers = 65536 // (32 * self.num_warps * self.resident) // 8 * 8
        maxnreg = registers if registers < 256 else None
        return {"num_warps": self.num_warps, "num_stages": self.num_stages, "maxnreg": maxnreg}


# What a tiling is chosen by: a kernel, an arithmetic, and the buckets that a launch's sizes fall into; never the sizes
# themselves, or each number of tokens would compile kernels of its own. A bucket is named by its least size.
# "half" is bf16 and fp16, "tf32" fp32 on tensor cores, "ieee" fp32 on the FMA units.
PRODUCTS = ("product", "product_gated", "product_transposed")  # the last by weights stored [G, K, N]
KERNELS = (*PRODUCTS, "product_backward", "weight_gradient")
ARITHMETICS = ("half", "tf32", "ieee")
FEW, SOME, MANY = 16, 96, 2**31  # most rows a group of the tables below
DEEP = 1536
ROWS = (1, FEW + 1, SOME + 1, 513)  # a group
DEPTHS = (1, 513, DEEP)  # of the contraction; of a weight's gradient, its narrower side


class Key(NamedTuple):
    """A kernel and the least sizes of a bucket of ROWS and of one of DEPTHS."""

    kernel: str
    arithmetic: str
    rows: int
    depth: int


def key_of(kernel: str, arithmetic: str, num_slots: int, num_groups: int, depth: int) -> Key:
    rows = ROWS[max(bisect.bisect(ROWS, triton.cdiv(num_slots, num_groups)) - 1, 0)]
    return Key(kernel, arithmetic, rows, DEPTHS[max(bisect.bisect(DEPTHS, depth) - 1, 0)])


# Products of slots by weights: architecture -> arithmetic -> (most rows a group, tiling) by rising rows.
# Architectures differ in shared memory (86 stands for all that have 99 KB: 8.6, 8.9, 12.x) and in the shape of their
# tensor-core instruction.
# Up to 16 rows a group the weights are streamed once: no wider BM is paid for, a long BK in several stages keeps many
# bytes in flight (three programs on Hopper have 144 KB), and programs hide one another's starts and ends. In between
# BM = 64 is the smallest tile of Hopper's wgmma. Above, two programs of 128 x 128 share a multiprocessor where they
# can, so that one's epilogue hides behind the other's products.
Table = list[tuple[int, Config]]
IEEE: Table = [(FEW, Config(16, 64, 32, 4, 3, 4)), (MANY, Config(64, 64, 16, 8, 3, 2))]
CONFIGS: dict[int, dict[str, Table]] = {
    80: {
        "half": [
            (FEW, Config(16, 64, 128, 4, 4, 2)),
            (SOME, Config(64, 128, 64, 4, 3, 2)),
            (MANY, Config(128, 128, 64, 8, 4, 1)),
        ],
        "tf32": [
            (FEW, Config(16, 64, 64, 4, 4, 2)),
            (SOME, Config(64, 128, 32, 4, 3, 2)),
            (MANY, Config(128, 128, 32, 8, 4, 1)),
        ],
        "ieee": IEEE,
    },
    86: {
        "half": [(FEW, Config(16, 64, 64, 4, 4, 2)), (MANY, Config(64, 128, 32, 4, 4, 2))],
        "tf32": [(FEW, Config(16, 64, 32, 4, 4, 2)), (MANY, Config(64, 128, 32, 4, 3, 2))],
        "ieee": IEEE,
    },
    90: {
        "half": [
            (FEW, Config(16, 64, 128, 4, 4, 3)),
            (SOME, Config(64, 128, 64, 4, 4, 2)),
            (MANY, Config(128, 128, 64, 4, 3, 2)),
        ],
        "tf32": [
            (FEW, Config(16, 64, 64, 4, 4, 3)),
            (SOME, Config(64, 128, 32, 4, 4, 2)),
            (MANY, Config(128, 128, 32, 4, 3, 2)),
        ],
        "ieee": IEEE,
    },
    100: {
        "half": [
            (FEW, Config(16, 64, 128, 4, 4, 3)),
            (SOME, Config(64, 128, 64, 4, 4, 2)),
            (MANY, Config(128, 128, 64, 4, 3, 2)),
        ],
        "tf32": [
            (FEW, Config(16, 64, 64, 4, 4, 3)),
            (SOME, Config(64, 64, 32, 4, 4, 2)),
            (MANY, Config(128, 128, 32, 4, 3, 2)),
        ],
        "ieee": IEEE,
    },
}
# Buckets that have a tiling of their own; measured ones belong here too (docs/triton.md). Many rows of at least DEEP
# elements: shared memory bounds the tile of 128 x 128 (for 64 steps of depth it is written 32 KB and read 48 KB in 512
# cycles of wgmma, where it has 128 bytes a cycle); 128 x 256 moves a fifth less a product. It has a multiprocessor to
# itself and hides no epilogue (about 4000 cycles): worth it where a tile takes many more.
_MANY_DEEP = [Key(kernel, "half", rows, DEEP) for kernel in PRODUCTS for rows in ROWS if rows > SOME]
SPECIAL: dict[int, dict[Key, Config]] = {
    90: dict.fromkeys(_MANY_DEEP, Config(128, 256, 64, 8, 4, 1)),
    100: dict.fromkeys(_MANY_DEEP, Config(128, 256, 64, 8, 4, 1)),
}
# Where rows do not start at whole 16 bytes, every element is a load with a pointer of its own, on any architecture:
# a smaller tile keeps those pointers in registers.
UNALIGNED: Table = [(FEW, Config(16, 64, 32, 4, 3, 2)), (MANY, Config(64, 128, 32, 8, 3, 1))]
# Row tiles that share a strip of weights in L2. 132 tiles of 128 x 256 at a time read least as 16 by 8: 2048 rows and
# 2112 columns, where 8 by 16 would read 1024 and 4224.
GROUP_M = 16


def architecture(capability: tuple[int, int]) -> int:
    """The key of CONFIGS for a CUDA compute capability."""
    major, minor = capability
    if major in (9, 10):
        return major * 10
    return 80 if (major, minor) in ((8, 0), (8, 7)) else 86


class Target(NamedTuple):
    """What a launch knows of its device: a key of CONFIGS, the multiprocessors, whether float32 products may be tf32,
    and the tilings that were measured on it."""

    arch: int
    processors: int
    tf32: bool
    tuned: Mapping[Key, Config] = MappingProxyType({})

    def arithmetic(self, dtype: torch.dtype) -> str:
        return "half" if dtype != torch.float32 else "tf32" if self.tf32 else "ieee"

    def precision(self, dtype: torch.dtype) -> str:
        """input_precision of tl.dot."""
        return "tf32" if self.arithmetic(dtype) == "tf32" else "ieee"

    def special(self, key: Key) -> Config | None:
        """The tiling of a bucket: measured on this device, or else one of its architecture's own."""
        return self.tuned.get(key) or SPECIAL.get(self.arch, {}).get(key)


@functools.cache
def device_facts(index: int) -> tuple[int, int]:
    """(architecture, multiprocessors) of a CUDA device."""
    return (
        architecture(torch.cuda.get_device_capability(index)),
        torch.cuda.get_device_properties(index).multi_processor_count,
    )


def fits_wide_loads(rows: torch.Tensor) -> bool:
    """Whether Triton sees (by its specialisation on multiples of 16) that rows [., K] can be read 16 bytes a load."""
    wide = rows.stride(1) == 1 and rows.stride(0) % 16 == 0 and rows.shape[1] % 16 == 0
    return wide and rows.data_ptr() % 16 == 0


def aligned(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether Triton sees that x [., K] and weight [G, N, K] can be read 16 bytes a load, along K or along N."""
    n = weight.shape[1]
    stride_g, stride_n, stride_k = weight.stride()
    by_rows = stride_k == 1 and stride_n % 16 == 0
    by_columns = stride_n == 1 and stride_k % 16 == 0 and n % 16 == 0
    weight_fits = (by_rows or by_columns) and stride_g % 16 == 0 and weight.data_ptr() % 16 == 0
    return fits_wide_loads(x) and weight_fits


def choose_config(target: Target, key: Key, aligned: bool) -> Config:
    """The tiling of a product of slots by weights."""
    if not aligned:
        return usual(UNALIGNED, key)
    return target.special(key) or usual(CONFIGS[target.arch][key.arithmetic], key)


def usual(table: Table, key: Key) -> Config:
    """A table's tiling for the rows of a bucket, each of which lies within one of its lines."""
    return next(config for most, config in table if key.rows <= most)


def num_programs(target: Target, config: Config, num_slots: int, num_groups: int, tiles_n: int) -> int:
    """Programs that fill the device, no more than there can be tiles."""
    return min(target.processors * config.resident, num_tiles(num_slots, num_groups, config.BM) * tiles_n)
