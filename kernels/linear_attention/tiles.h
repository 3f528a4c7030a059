// Every choice of tile, warps and stages that linear attention's CUDA kernels make, by head
// dimension D and element type: retune here. Plain numbers, checked where they are used.
//
// Half precision (tensor cores), blocks of eight warps:
//   tokens          of a tile, a multiple of 16, where one launch does all of a short sequence
//   feature_warps   the warps of a sum over tokens (S, dS) as a grid over its D features (both halves
//   column_warps    of phi go with a feature) and D columns; what is left of the eight warps share the
//                   tile's tokens, and are added up at the end
//   stages          tiles in shared memory of a kernel that reads two tensors and holds the state
//   blocks          a multiprocessor is to hold at once: caps registers at 65536 / (256 blocks). Not of
//                   the state's kernel, of which there is one, so that there are few partial sums
//   gradient_blocks likewise of the kernels that have dq and dS in one
//   long_tokens     of the other launches: with 128 a warp has rows of its own, whose phi nobody else
//   long_stages     forms too, and a tile's fixed costs are shared by more tokens
//
// float32 (FMA), blocks of 16 x 16 threads:
//   tokens          of a tile that meets the state, a multiple of 16
//   sum_tokens      of a tile of the key-value sum
//   sum_columns     of S that one block of the key-value sum owns: k is read D / sum_columns times
#pragma once

struct HalfTile {
  int head_dim, tokens, feature_warps, column_warps, stages, blocks, gradient_blocks, long_tokens,
      long_stages;
};

struct FloatTile {
  int head_dim, tokens, sum_tokens, sum_columns;
};

constexpr HalfTile kHalfTiles[] = {
    // D, tokens, feature_warps, column_warps, stages, blocks, gradient_blocks, long_tokens, long_stages
    {16, 128, 1, 1, 3, 2, 2, 128, 3},
    {32, 64, 2, 2, 3, 2, 2, 128, 3},
    {48, 128, 1, 2, 2, 1, 1, 128, 2},  // three 16-feature tiles: no grid of eight warps fits better
    {64, 64, 4, 2, 3, 2, 1, 128, 2},   // 16 x 32 x 2 of S a warp: 32 registers a thread
    {96, 64, 2, 4, 2, 1, 1, 64, 2},    // the state is 40 KB of shared memory
    {128, 32, 4, 2, 2, 1, 1, 32, 2},   // the state is 64 KB, and 128 registers a thread
};

constexpr FloatTile kFloatTiles[] = {
    // D, tokens, sum_tokens, sum_columns
    {16, 128, 32, 16}, {32, 128, 32, 32}, {48, 128, 32, 48},
    {64, 128, 32, 64}, {96, 64, 32, 48},  {128, 64, 32, 64},
};

template <typename Tile, int kCount>
constexpr Tile tile_of(const Tile (&table)[kCount], int head_dim) {
  for (const Tile& tile : table) {
    if (tile.head_dim == head_dim) return tile;
  }
  return table[0];
}

// Half precision: up to so many tokens are summed in one chain of tensor-core additions, sixteen at a
// time, which round toward zero: the sum of n of them is off by up to n 2^-29 of its size. (S itself is
// summed in two levels: half_state_kernel.) float32: by FMA, in chunks of 256, whose number counts.
constexpr int kMostTokensPerSplit = 16 * 1024;
constexpr int kMostFloatTokensPerSplit = 64 * 1024;
// Fewer tokens than that are not worth a block of their own.
constexpr int kFewestTokensPerSplit = 256;
