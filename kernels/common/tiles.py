"""From a program's number to its tile of slots, by the plan's offsets read on the device: no host knows the counts.
Floor 0, shared by the grouped kernels.

Group g takes the tile numbers from s(g) = offsets[g] // BM + g on. Those are enough for its slots, since
ceil((b - a) / BM) <= b // BM - a // BM + 1, and s is strictly increasing, so a tile finds its group by counting
the s(g) not above it: one vector of loads, no scan. At most G tiles in all are idle. The padding behind
offsets[G] counts as group G, so that whoever must write zeros there finds it in the same way.
"""

import triton
import triton.language as tl

BLOCK_G = 128  # groups looked at in one load


def num_tiles(num_slots: int, num_groups: int, block_m: int) -> int:
    """Tiles to launch for a plan of this capacity, whatever its offsets: an upper bound known on the host."""
    return num_slots // block_m + num_groups + 1


@triton.jit
def find_tile(tile, offsets, num_slots, num_groups, BM: tl.constexpr, BLOCK_G: tl.constexpr):
    """(group, first slot, end slot) of a tile number: first >= end is an idle tile, group num_groups the padding."""
    before = 0
    for start in range(0, num_groups + 1, BLOCK_G):
        g = start + tl.arange(0, BLOCK_G)  # [BLOCK_G]
        begins = tl.load(offsets + g, mask=g <= num_groups, other=0) // BM + g
        before += tl.sum(((g <= num_groups) & (begins <= tile)).to(tl.int32))
    group = before - 1
    begin = tl.load(offsets + group)
    end = tl.load(offsets + group + 1, mask=group < num_groups, other=num_slots)
    first = begin.to(tl.int64) + (tile - (begin // BM + group)).to(tl.int64) * BM
    return group, first, end


@triton.jit
def swizzle(pid, tiles_m, tiles_n, GROUP_M: tl.constexpr):
    """(tile_m, tile_n) of a program: GROUP_M row tiles walk the columns together, so that a strip of weights read
    from memory serves them all out of L2."""
    per_strip = GROUP_M * tiles_n
    first_m = pid // per_strip * GROUP_M
    height = min(tiles_m - first_m, GROUP_M)
    inside = pid % per_strip
    return first_m + inside % height, inside // height
