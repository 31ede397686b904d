// How the items of a counting sort (counting_sort.h) are shared out among blocks. Host code alone.
#pragma once
#include <algorithm>
#include <cstdint>

namespace dyncore::cuda {

constexpr int kSortThreads = 256;
constexpr int kItemsPerThread = 4;
constexpr int kChunk = kSortThreads * kItemsPerThread;  // items that a block ranks at a time
// A block reads the counts of all tiles, so there are about two tiles a multiprocessor, and fewer of many groups.
constexpr int64_t kMostTiles = 256;
constexpr int64_t kFewestTiles = 16;
constexpr int64_t kMostCounts = 32768;

// Items are rows of `width` each. A chunk is whole rows, a tile is consecutive chunks: a block's.
struct Tiling {
  int64_t rows;
  int width;
  int rows_per_chunk;
  int64_t chunks;
  int64_t chunks_per_tile;
  int tiles;
  bool counts_first;  // one chunk needs no counts beforehand

  int64_t workspace(int64_t groups) const { return counts_first ? groups * tiles : 0; }
};

// 1 <= width <= kChunk.
inline Tiling tile(int64_t rows, int64_t width, int64_t groups) {
  Tiling t{};
  t.rows = rows;
  t.width = static_cast<int>(width);
  t.rows_per_chunk = kChunk / t.width;
  t.chunks = std::max<int64_t>(1, (rows + t.rows_per_chunk - 1) / t.rows_per_chunk);
  t.counts_first = t.chunks > 1;
  const int64_t most = std::max(kFewestTiles, std::min(kMostTiles, kMostCounts / groups));
  t.chunks_per_tile = (t.chunks + most - 1) / most;
  t.tiles = static_cast<int>((t.chunks + t.chunks_per_tile - 1) / t.chunks_per_tile);
  return t;
}

}  // namespace dyncore::cuda
