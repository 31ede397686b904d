// A stable counting sort of items by group, which is what making a plan comes to: slots are the items, sorted by group,
// and the inverse map is where a row's items went. Two launches: the first counts the groups of each tile; in the
// second each block adds up the counts of the tiles before its own and places its items. The counts are read from L2
// by every block, which costs less than a third launch. One chunk of items is done in one launch.
#pragma once
#include "cuda/common/block.h"
#include "cuda/common/launch.h"
#include "cuda/common/tiling.h"

namespace dyncore::cuda {

constexpr int kSortWarps = kSortThreads / kWarp;
constexpr int kNoSlot = 0x7fffffff;

// What a sort writes; each but `offsets` may be null. `capacity` bounds the slots: later ones are dropped.
struct Placement {
  int32_t* rows;         // [capacity] row of each slot
  int32_t* sources;      // [capacity] what keys.source gives for each slot
  int32_t* offsets;      // [groups+1]
  int32_t* row_offsets;  // [rows+1]
  int32_t* row_slots;    // [capacity]
  int64_t capacity;
  bool ascending;                  // the items of a row come in the order of their groups
  const float* weights = nullptr;  // [items], which go to
  float* scale = nullptr;          // [capacity] of the slots
};

// A block's shared memory: see place_items.
struct SortMemory {
  int* next;         // [groups] the slot of the group's next item
  int* earlier;      // [groups] its items in earlier tiles
  int* slots;        // [kChunk] the slot of each item of the chunk, kNoSlot where it has none
  int* first;        // [kChunk] row_offsets of each row of the chunk
  int* kept;         // [kSortWarps] items of each warp that have a slot
  uint16_t* counts;  // [kSortWarps + 1][groups] of each warp's earlier warps; the last of the chunk

  static int64_t bytes(int64_t groups) {
    return (2 * groups + 2 * kChunk + kSortWarps) * int64_t{sizeof(int)} +
           (kSortWarps + 1) * groups * int64_t{sizeof(uint16_t)};
  }
  __device__ explicit SortMemory(int groups) {
    next = shared_memory<int>();
    earlier = next + groups;
    slots = earlier + groups;
    first = slots + kChunk;
    kept = first + kChunk;
    counts = reinterpret_cast<uint16_t*>(kept + kSortWarps);
  }
};

// Keys: unsigned operator()(int64_t item, int column), `groups` or more for "nowhere"; int source(int64_t item).

// table[g][tile] = how many of the tile's items go to group g.
template <class Keys>
__global__ void __launch_bounds__(kSortThreads, 4) count_items(Keys keys, Tiling t, int groups, int32_t* table) {
  int* const counts = shared_memory<int>();
  const int thread = static_cast<int>(threadIdx.x), tile = static_cast<int>(blockIdx.x);
  for (int g = thread; g < groups; g += kSortThreads) counts[g] = 0;
  __syncthreads();
  for (int64_t c = 0; c < t.chunks_per_tile; ++c) {
    const int64_t row0 = (tile * t.chunks_per_tile + c) * t.rows_per_chunk;
    const int items = static_cast<int>(min(int64_t{t.rows_per_chunk}, t.rows - row0)) * t.width;  // or negative
    unsigned keys_here[kItemsPerThread];  // all loaded before the first is counted
#pragma unroll
    for (int i = 0; i < kItemsPerThread; ++i) {
      const int item = i * kSortThreads + thread;
      keys_here[i] = item < items ? keys(row0 * t.width + item, item % t.width) : groups;
    }
#pragma unroll
    for (int i = 0; i < kItemsPerThread; ++i)
      if (keys_here[i] < static_cast<unsigned>(groups)) atomicAdd(counts + keys_here[i], 1);
  }
  __syncthreads();
  for (int g = thread; g < groups; g += kSortThreads) table[int64_t{g} * t.tiles + tile] = counts[g];
}

// From the totals of the groups in m.next and their items in earlier tiles: m.next becomes the slot of each group's
// first item here. Returns the live slots, and in *row_base those that the rows of earlier tiles have.
__device__ inline int64_t open_groups(const SortMemory& m, int groups, const Placement& to, int64_t* row_base) {
  const int thread = static_cast<int>(threadIdx.x);
  const bool writes = blockIdx.x == 0;
  int64_t end = 0, kept = 0;
  for (int g0 = 0; g0 < groups; g0 += kSortThreads) {
    const int g = g0 + thread;
    int64_t total;
    const int64_t offset = end + sum_before_thread<int64_t>(g < groups ? m.next[g] : 0, &total);
    end += total;
    if (g < groups) {
      const int64_t begins = min(offset, to.capacity), start = min(offset + m.earlier[g], to.capacity);
      m.next[g] = static_cast<int>(start);
      kept += start - begins;
      if (writes) to.offsets[g] = static_cast<int32_t>(begins);
    }
  }
  const int64_t live = min(end, to.capacity);
  if (writes && thread == 0) to.offsets[groups] = static_cast<int32_t>(live);
  sum_before_thread(kept, row_base);
  return live;
}

// Ranks the chunk's items among those of their group that this warp holds; m.counts becomes what its earlier warps
// hold.
__device__ inline void rank_items(const SortMemory& m, int groups, const unsigned (&keys)[kItemsPerThread],
                                  int (&ranks)[kItemsPerThread]) {
  for (int g = static_cast<int>(threadIdx.x); g < groups; g += kSortThreads)
    for (int w = 0; w <= kSortWarps; ++w) m.counts[w * groups + g] = 0;
  __syncthreads();
  uint16_t* const mine = m.counts + warp() * groups;
#pragma unroll
  for (int i = 0; i < kItemsPerThread; ++i) {
    const unsigned peers = __match_any_sync(kAllLanes, keys[i]);
    const bool goes = keys[i] < static_cast<unsigned>(groups);
    const int before = goes ? mine[keys[i]] : 0;
    ranks[i] = before + __popc(peers & lanes_below());
    __syncwarp();
    if (goes && (peers & lanes_below()) == 0) mine[keys[i]] = static_cast<uint16_t>(before + __popc(peers));
    __syncwarp();
  }
  __syncthreads();
  for (int g = static_cast<int>(threadIdx.x); g < groups; g += kSortThreads) {
    int sum = 0;
    for (int w = 0; w <= kSortWarps; ++w) {
      const int count = m.counts[w * groups + g];
      m.counts[w * groups + g] = static_cast<uint16_t>(sum);
      sum += count;
    }
  }
}

template <class Keys>
__global__ void __launch_bounds__(kSortThreads, 4)
    place_items(Keys keys, Tiling t, int groups, const int32_t* table, Placement to) {
  const SortMemory m(groups);
  const int thread = static_cast<int>(threadIdx.x), tile = static_cast<int>(blockIdx.x);
  int64_t row_base = 0, live = 0;
  if (t.counts_first) {
    constexpr int kAtOnce = 4;  // groups of a warp: their loads overlap
    for (int g0 = warp() * kAtOnce; g0 < groups; g0 += kSortWarps * kAtOnce) {
      int total[kAtOnce] = {}, before[kAtOnce] = {};
      for (int i = lane(); i < t.tiles; i += kWarp) {
#pragma unroll
        for (int j = 0; j < kAtOnce; ++j) {
          const int count = g0 + j < groups ? table[int64_t{g0 + j} * t.tiles + i] : 0;
          total[j] += count;
          before[j] += i < tile ? count : 0;
        }
      }
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j) {
        total[j] = __reduce_add_sync(kAllLanes, total[j]);
        before[j] = __reduce_add_sync(kAllLanes, before[j]);
        if (lane() == 0 && g0 + j < groups) {
          m.next[g0 + j] = total[j];
          m.earlier[g0 + j] = before[j];
        }
      }
    }
    __syncthreads();
    live = open_groups(m, groups, to, &row_base);
  }

  for (int64_t c = 0; c < t.chunks_per_tile; ++c) {
    const int64_t row0 = (tile * t.chunks_per_tile + c) * t.rows_per_chunk;
    if (c > 0 && row0 >= t.rows) break;
    const int items = static_cast<int>(min(int64_t{t.rows_per_chunk}, t.rows - row0)) * t.width;
    unsigned key[kItemsPerThread], kept[kItemsPerThread];
    int rank[kItemsPerThread], slot[kItemsPerThread];
    const int item0 = warp() * kWarp * kItemsPerThread + lane();  // of item i: item0 + i * kWarp
#pragma unroll
    for (int i = 0; i < kItemsPerThread; ++i) {
      const int item = item0 + i * kWarp;
      key[i] = item < items ? keys(row0 * t.width + item, item % t.width) : groups;
    }
    rank_items(m, groups, key, rank);
    if (!t.counts_first) {
      for (int g = thread; g < groups; g += kSortThreads) {
        m.next[g] = m.counts[kSortWarps * groups + g];
        m.earlier[g] = 0;
      }
      live = open_groups(m, groups, to, &row_base);
    }
    __syncthreads();

    int kept_of_warp = 0;
#pragma unroll
    for (int i = 0; i < kItemsPerThread; ++i) {
      const int item = item0 + i * kWarp;
      const bool goes = key[i] < static_cast<unsigned>(groups);
      const int64_t place = goes ? int64_t{m.next[key[i]]} + m.counts[warp() * groups + key[i]] + rank[i] : kNoSlot;
      const bool keeps = goes && place < to.capacity;
      slot[i] = keeps ? static_cast<int>(place) : kNoSlot;
      m.slots[item] = slot[i];
      if (keeps && to.rows) to.rows[place] = static_cast<int32_t>(row0 + item / t.width);
      if (keeps && to.sources) to.sources[place] = keys.source(row0 * t.width + item);
      if (keeps && to.scale) to.scale[place] = to.weights[row0 * t.width + item];
      kept[i] = __ballot_sync(kAllLanes, keeps);
      kept_of_warp += __popc(kept[i]);
    }
    if (lane() == 0) m.kept[warp()] = kept_of_warp;
    __syncthreads();

    int64_t position = row_base;  // in row_slots
    for (int w = 0; w < kSortWarps; ++w) {
      position += w < warp() ? m.kept[w] : 0;
      row_base += m.kept[w];
    }
    if (to.row_offsets) {
#pragma unroll
      for (int i = 0; i < kItemsPerThread; ++i) {
        const int item = item0 + i * kWarp;
        const int32_t at = static_cast<int32_t>(position + __popc(kept[i] & lanes_below()));
        position += __popc(kept[i]);
        if (item < items && item % t.width == 0) {
          to.row_offsets[row0 + item / t.width] = at;
          m.first[item / t.width] = at;
        }
        if (to.ascending && slot[i] != kNoSlot) to.row_slots[at] = slot[i];
      }
      if (!to.ascending) {
        __syncthreads();
#pragma unroll
        for (int i = 0; i < kItemsPerThread; ++i) {
          if (slot[i] == kNoSlot) continue;
          const int row = (item0 + i * kWarp) / t.width;
          int before = 0;
          for (int j = 0; j < t.width; ++j) before += m.slots[row * t.width + j] < slot[i];
          to.row_slots[m.first[row] + before] = slot[i];
        }
      }
    }
    for (int g = thread; g < groups; g += kSortThreads)
      m.next[g] = static_cast<int>(min(int64_t{m.next[g]} + m.counts[kSortWarps * groups + g], to.capacity));
  }

  if (to.row_offsets && tile == 0 && thread == 0) to.row_offsets[t.rows] = static_cast<int32_t>(live);
  for (int64_t a = live + tile * kSortThreads + thread; a < to.capacity; a += int64_t{t.tiles} * kSortThreads) {
    if (to.rows) to.rows[a] = 0;
    if (to.sources) to.sources[a] = 0;
    if (to.row_slots) to.row_slots[a] = 0;
  }
}

template <class Keys>
void place(const char* name, const Keys& keys, const Tiling& t, int64_t groups, const int32_t* table,
           const Placement& to, Stream stream) {
  launch(name, stream, t.tiles, kSortThreads, SortMemory::bytes(groups), place_items<Keys>, keys, t,
         static_cast<int>(groups), table, to);
}

template <class Keys>
void sort_items(const char* name, const Keys& keys, const Tiling& t, int64_t groups, int32_t* workspace,
                const Placement& to, Stream stream) {
  if (t.counts_first)
    launch(name, stream, t.tiles, kSortThreads, groups * int64_t{sizeof(int)}, count_items<Keys>, keys, t,
           static_cast<int>(groups), workspace);
  place(name, keys, t, groups, workspace, to, stream);
}

}  // namespace dyncore::cuda
