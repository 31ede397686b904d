"""From a program's number to its tile of slots, by the plan's offsets read on the device: no host knows the counts.
Floor 0, shared by the grouped kernels.

A tile is BM slots of one group, the last of a group fewer; tiles are numbered through the groups without gaps. Launches
are as wide as the device: each program walks the tiles in steps of the grid, so a plan with few live slots costs what
its live tiles cost.
"""

import triton
import triton.language as tl


def num_tiles(num_slots: int, num_groups: int, block_m: int) -> int:
    """The most tiles that a plan of this capacity can have, whatever its offsets."""
    groups = min(num_groups, num_slots)  # of which all but one hold a slot alone
    return groups + (num_slots - groups) // block_m


def block_of_groups(num_groups: int) -> int:
    """Groups that a kernel looks at in one load."""
    return min(1024, max(32, triton.next_power_of_2(num_groups)))


@triton.jit
def tiles_of(g, offsets, num_groups, BM: tl.constexpr):
    """Tiles of the groups g, 0 from num_groups on."""
    begin = tl.load(offsets + g, mask=g < num_groups, other=0)
    end = tl.load(offsets + g + 1, mask=g < num_groups, other=0)
    return tl.cdiv(end - begin, BM)


@triton.jit
def first_tile(group, offsets, BM: tl.constexpr, BLOCK_G: tl.constexpr):
    """The number of a group's first tile."""
    total = 0
    for start in range(0, group, BLOCK_G):
        total += tl.sum(tiles_of(start + tl.arange(0, BLOCK_G), offsets, group, BM))
    return total


@triton.jit
def count_tiles(offsets, num_groups, BM: tl.constexpr, BLOCK_G: tl.constexpr):
    """Tiles of all groups."""
    return first_tile(num_groups, offsets, BM, BLOCK_G)


@triton.jit
def find_tile(tile, offsets, num_groups, BM: tl.constexpr, BLOCK_G: tl.constexpr):
    """(group, first slot, end slot of the group) of a tile number."""
    group = 0
    before = 0  # tiles of the groups before it
    seen = 0
    for start in range(0, num_groups, BLOCK_G):
        g = start + tl.arange(0, BLOCK_G)  # [BLOCK_G]
        tiles = tiles_of(g, offsets, num_groups, BM)
        passed = (g < num_groups) & (seen + tl.cumsum(tiles) <= tile)
        group += tl.sum(passed.to(tl.int32))
        before += tl.sum(tl.where(passed, tiles, 0))
        seen += tl.sum(tiles)
    begin = tl.load(offsets + group)
    end = tl.load(offsets + group + 1)
    return group, begin.to(tl.int64) + (tile - before).to(tl.int64) * BM, end


@triton.jit
def swizzle(number, tiles_m, tiles_n, GROUP_M: tl.constexpr):
    """(tile_m, tile_n) of a number: GROUP_M row tiles walk the columns together, so that a strip of weights read
    from memory serves them all out of L2."""
    per_strip = GROUP_M * tiles_n
    first_m = number // per_strip * GROUP_M
    height = min(tiles_m - first_m, GROUP_M)
    inside = number % per_strip
    return first_m + inside % height, inside // height
