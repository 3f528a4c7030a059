// Linear attention's kernels in half precision, made of half.cuh's pieces. One block of eight warps
// works for one key/value head: its state is put into shared memory once, and meets tile after tile.
//
//   forward              one launch: state of all keys, then out of all queries of the group
//   backward             one launch, up to D = 96: the state (given, or made again from keys and values
//                        that stay in shared memory), dq and dS of all queries, then dk and dv
//   state                S and z of a split's keys and values
//   apply                out of a split's queries
//   query_gradient       dq, and dS and dz' of a split's queries
//   key_value_gradient   dk and dv of a split's keys and values
//
// Each reads every element of q, k, v and dout that it needs once, and writes its results once; in a
// sequence of launches no tensor is read by two of them, but k and v where the backward has to make
// the state again.
#pragma once

#include "half.cuh"
#include "problem.cuh"

namespace {

constexpr size_t kSharedLimit = 99 * 1024;  // of a block, on compute capability 8.6

// ---- shared memory of each kernel --------------------------------------------------------------------

template <typename T, int D>
struct StateShared {
  static constexpr int kStages = 3;
  TokenTile<T, D> tile[kStages][2];
};

template <typename T, int D>
struct ApplyShared {
  static constexpr int kStages = 3;
  State<T, D> state;
  TokenTile<T, D> tile[kStages];
};

template <typename T, int D>
struct GradientShared {
  static constexpr int kStages = Half<D>::kTile.stages;
  State<T, D> state;
  TokenTile<T, D> tile[kStages][2];
};

template <typename T, int D>
struct ForwardShared {
  static constexpr int kStages = Half<D>::kTile.stages - 1, kQueryStages = 2;
  State<T, D> state;
  TokenTile<T, D> query[kQueryStages];
  TokenTile<T, D> tile[kStages][2];
};

// With keys and values that stay, as many tiles of them as there are follow.
template <typename T, int D, bool kStay>
struct BackwardShared {
  static constexpr int kStages = kStay ? 1 : Half<D>::kTile.stages;
  State<T, D> state;
  TokenTile<T, D> tile[kStages][2];

  __device__ TokenTile<T, D>* staying(int tile_index) {
    return &tile[kStages][0] + 2 * tile_index;
  }
};

// One launch for a backward: at D = 128 it would spill, in float16 on compute capability 9.0.
constexpr bool backward_in_one(int64_t head_dim) { return head_dim <= 96; }

// How many key tokens can stay.
template <typename T, int D>
constexpr int64_t staying_keys() {
  if (!backward_in_one(D)) return 0;
  return (kSharedLimit - sizeof(BackwardShared<T, D, true>)) / (2 * sizeof(TokenTile<T, D>)) *
         Half<D>::kTokens;
}

template <typename Shared>
__device__ Shared& shared() {
  return *reinterpret_cast<Shared*>(shared_memory());
}

// Begins to copy the tile of a tensor that is at a place.
template <typename T, int D>
__device__ void copy(TokenTile<T, D>& target, const Rows<const T>& source, const Part& part,
                     const TilePlace& place) {
  copy_tile(target, source.at(part.batch, place.head, place.first), source.stride[2], place.valid,
            source.wide);
}

// Where a block's first tile of queries, or of keys, is.
template <int D, typename T>
__device__ TilePlace first_queries(const Problem<T>& p, const Part& part) {
  return TilePlace(part.begin, part.kv_head * p.group, p.queries, Half<D>::kTokens);
}
template <int D, typename T>
__device__ TilePlace first_keys(const Problem<T>& p, const Part& part) {
  return TilePlace(part.begin, part.kv_head, p.keys, Half<D>::kTokens);
}

// ---- what more than one kernel does ------------------------------------------------------------------

template <typename T, int D>
__device__ void apply_one(const Problem<T>& p, const Part& part, const State<T, D>& state,
                          const TokenTile<T, D>& q, const TilePlace& place) {
  apply_tile(state, q, p.eps, p.out.at(part.batch, place.head, place.first), p.out.stride[2],
             place.valid, p.out.wide);
}

template <typename T, int D>
__device__ void query_gradient_one(const Problem<T>& p, const Part& part, State<T, D>& state,
                                   TokenTile<T, D> (&tile)[2], Sums<D>& sums,
                                   const TilePlace& place) {
  query_gradient_tile(state, sums, tile[0], tile[1], p.eps,
                      p.dq.at(part.batch, place.head, place.first), p.dq.stride[2], place.valid,
                      p.dq.wide);
}

template <typename T, int D>
__device__ void key_value_gradient_one(const Problem<T>& p, const Part& part,
                                       const State<T, D>& state, const TokenTile<T, D>& k,
                                       const TokenTile<T, D>& v, const TilePlace& place) {
  key_value_gradient_tile(state, k, v, p.dk.at(part.batch, place.head, place.first),
                          p.dk.stride[2], p.dk.wide,
                          p.dv.at(part.batch, place.head, place.first), p.dv.stride[2],
                          p.dv.wide, place.valid);
}

// After the last query of dS's sums.
template <typename T, int D>
__device__ void finish_gradient(Sums<D>& sums, const State<T, D>& state, float* scratch) {
  sums.combine(scratch);
  const float of_S = 1.0f / state.dS_scale;
  sums.rescale(of_S, of_S / state.weight_scale);
}

template <typename T, int D>
__device__ float* scratch_of(TokenTile<T, D>& tile) {
  return reinterpret_cast<float*>(tile.rows);
}

// ---- state, apply --------------------------------------------------------------------------------------

// S and z are results too, held to float32's accuracy: tensor cores add up 256 tokens, whose sums are
// then added up rounding to nearest. At D = 128 there are no registers for both (on sm_100a, where the
// same code takes more, not at 96 either), and a sum over 16,384 tokens is off by about 3e-5 of its size
// at worst.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
constexpr int kWidestOfTwoLevels = 64;
#else
constexpr int kWidestOfTwoLevels = 96;
#endif

template <int D, typename T>
__global__ void __launch_bounds__(kThreads, 1) half_state_kernel(Problem<T> p) {
  using Shared = StateShared<T, D>;
  constexpr bool kTwoLevels = D <= kWidestOfTwoLevels;
  constexpr int kChunk = 256 / Half<D>::kTokens;
  Shared& s = shared<Shared>();
  const Part part(p.kv_heads, p.num_splits, tiles_of(1, p.keys, Half<D>::kTokens));
  TilePlace coming = first_keys<D>(p, part);
  const auto tiles = stream<Shared::kStages>(part.begin, part.end, [&](int stage) {
    copy(s.tile[stage][0], p.k, part, coming);
    copy(s.tile[stage][1], p.v, part, coming);
    coming.next();
  });
  tiles.start();
  Sums<D> sums, total;
  sums.clear();
  total.clear();
  int in_sums = 0;  // tiles
  tiles.run([&](int stage) {
    sums.add_keys(s.tile[stage][0], s.tile[stage][1]);
    if constexpr (kTwoLevels) {
      if (++in_sums == kChunk) {
        total.add(sums);
        sums.clear();
        in_sums = 0;
      }
    }
  });
  if constexpr (kTwoLevels) sums.add(total);
  sums.combine(scratch_of(s.tile[0][0]));
  const int64_t index = part.split * p.states + part.state;
  sums.store(p.S_out + index * 2 * D * D, p.z_out + index * 2 * D);
}

template <int D, typename T>
__global__ void __launch_bounds__(kThreads, Half<D>::kTile.blocks) half_apply_kernel(Problem<T> p) {
  using Shared = ApplyShared<T, D>;
  Shared& s = shared<Shared>();
  const Part part(p.kv_heads, p.num_splits, tiles_of(p.group, p.queries, Half<D>::kTokens));
  TilePlace coming = first_queries<D>(p, part), place = coming;
  const auto tiles = stream<Shared::kStages>(part.begin, part.end, [&](int stage) {
    copy(s.tile[stage], p.q, part, coming);
    coming.next();
  });
  tiles.start();
  s.state.load_centred(p.S + part.state * 2 * D * D, p.z + part.state * 2 * D,
                       scratch_of(s.tile[Shared::kStages - 1]));
  tiles.run([&](int stage) {
    apply_one(p, part, s.state, s.tile[stage], place);
    place.next();
  });
}

// ---- forward in one launch -----------------------------------------------------------------------------

template <int D, typename T>
__global__ void __launch_bounds__(kThreads, Half<D>::kTile.blocks)
    half_forward_kernel(Problem<T> p) {
  using Shared = ForwardShared<T, D>;
  using H = Half<D>;
  Shared& s = shared<Shared>();
  const Part part(p.kv_heads, 1, 0);
  TilePlace coming = first_queries<D>(p, part), place = coming, coming_keys = first_keys<D>(p, part);
  const auto queries = stream<Shared::kQueryStages>(
      0, static_cast<int>(tiles_of(p.group, p.queries, H::kTokens)), [&](int stage) {
        copy(s.query[stage], p.q, part, coming);
        coming.next();
      });
  const auto keys = stream<Shared::kStages>(
      0, static_cast<int>(tiles_of(1, p.keys, H::kTokens)), [&](int stage) {
        copy(s.tile[stage][0], p.k, part, coming_keys);
        copy(s.tile[stage][1], p.v, part, coming_keys);
        coming_keys.next();
      });
  queries.start();
  keys.start();
  Sums<D> sums;
  sums.clear();
  keys.run([&](int stage) { sums.add_keys(s.tile[stage][0], s.tile[stage][1]); });
  sums.combine(scratch_of(s.tile[0][0]));
  if (p.S_out) sums.store(p.S_out + part.state * 2 * D * D, p.z_out + part.state * 2 * D);
  s.state.take_centred(sums, scratch_of(s.tile[0][0]));
  queries.run([&](int stage) {
    apply_one(p, part, s.state, s.query[stage], place);
    place.next();
  });
}

// ---- backward, by steps --------------------------------------------------------------------------------

template <int D, typename T>
__global__ void __launch_bounds__(kThreads, Half<D>::kTile.gradient_blocks)
    half_query_gradient_kernel(Problem<T> p) {
  using Shared = GradientShared<T, D>;
  Shared& s = shared<Shared>();
  const Part part(p.kv_heads, p.num_splits, tiles_of(p.group, p.queries, Half<D>::kTokens));
  TilePlace coming = first_queries<D>(p, part), place = coming;
  const auto tiles = stream<Shared::kStages>(part.begin, part.end, [&](int stage) {
    copy(s.tile[stage][0], p.q, part, coming);
    copy(s.tile[stage][1], p.dout, part, coming);
    coming.next();
  });
  tiles.start();
  s.state.load_centred(p.S + part.state * 2 * D * D, p.z + part.state * 2 * D,
                       scratch_of(s.tile[Shared::kStages - 1][0]));
  if (part.split == 0 && threadIdx.x < D) {
    store_global(p.mean_out + part.state * D + threadIdx.x, s.state.mean[threadIdx.x]);
  }
  Sums<D> sums;
  sums.clear();
  tiles.run([&](int stage) {
    query_gradient_one(p, part, s.state, s.tile[stage], sums, place);
    place.next();
  });
  finish_gradient(sums, s.state, scratch_of(s.tile[0][0]));
  const int64_t index = part.split * p.states + part.state;
  sums.store(p.S_out + index * 2 * D * D, p.z_out + index * 2 * D);
}

template <int D, typename T>
__global__ void __launch_bounds__(kThreads, Half<D>::kTile.blocks)
    half_key_value_gradient_kernel(Problem<T> p) {
  using Shared = GradientShared<T, D>;
  Shared& s = shared<Shared>();
  const Part part(p.kv_heads, p.num_splits, tiles_of(1, p.keys, Half<D>::kTokens));
  TilePlace coming = first_keys<D>(p, part), place = coming;
  const auto tiles = stream<Shared::kStages>(part.begin, part.end, [&](int stage) {
    copy(s.tile[stage][0], p.k, part, coming);
    copy(s.tile[stage][1], p.v, part, coming);
    coming.next();
  });
  tiles.start();
  if (!p.mean) {
    const bool any = part.begin < part.end;
    ptx::cp_async_wait<Shared::kStages - 2>();
    __syncthreads();  // the first tile is here
    s.state.take_mean(s.tile[0][1], any ? place.valid : 0);
  }
  s.state.load_gradient(p.dS + part.state * 2 * D * D, p.dz + part.state * 2 * D,
                        p.mean ? p.mean + part.state * D : nullptr);
  tiles.run([&](int stage) {
    key_value_gradient_one(p, part, s.state, s.tile[stage][0], s.tile[stage][1], place);
    place.next();
  });
}

// ---- backward in one launch ----------------------------------------------------------------------------

template <int D, bool kStay, typename T>
__global__ void __launch_bounds__(kThreads, Half<D>::kTile.gradient_blocks)
    half_backward_kernel(Problem<T> p) {
  using Shared = BackwardShared<T, D, kStay>;
  using H = Half<D>;
  Shared& s = shared<Shared>();
  const Part part(p.kv_heads, 1, 0);
  const int key_tiles = static_cast<int>(tiles_of(1, p.keys, H::kTokens));
  const int query_tiles = static_cast<int>(tiles_of(p.group, p.queries, H::kTokens));
  float* const scratch = scratch_of(s.tile[Shared::kStages - 1][0]);
  Sums<D> sums;

  TilePlace coming = first_queries<D>(p, part), place = coming;
  const auto queries = stream<Shared::kStages>(0, query_tiles, [&](int stage) {
    copy(s.tile[stage][0], p.q, part, coming);
    copy(s.tile[stage][1], p.dout, part, coming);
    coming.next();
  });
  if constexpr (kStay) {
    TilePlace keys = first_keys<D>(p, part);
    for (int tile = 0; tile < key_tiles; ++tile, keys.next()) {
      copy(s.staying(tile)[0], p.k, part, keys);
      copy(s.staying(tile)[1], p.v, part, keys);
    }
    ptx::cp_async_commit();
    ptx::cp_async_wait<0>();
    __syncthreads();  // every key and value is here
    sums.clear();
    for (int tile = 0; tile < key_tiles; ++tile) {
      sums.add_keys(s.staying(tile)[0], s.staying(tile)[1]);
    }
    sums.combine(scratch);
    s.state.take_centred(sums, scratch);
  } else {
    queries.start();
    s.state.load_centred(p.S + part.state * 2 * D * D, p.z + part.state * 2 * D, scratch);
  }

  sums.clear();
  queries.run([&](int stage) {
    query_gradient_one(p, part, s.state, s.tile[stage], sums, place);
    place.next();
  });
  coming = place = first_keys<D>(p, part);
  const auto keys = stream<Shared::kStages>(0, key_tiles, [&](int stage) {
    copy(s.tile[stage][0], p.k, part, coming);
    copy(s.tile[stage][1], p.v, part, coming);
    coming.next();
  });
  finish_gradient(sums, s.state, scratch);
  s.state.take_gradient(sums);
  if constexpr (kStay) {
    __syncthreads();  // dS is there
    for (int tile = 0; tile < key_tiles; ++tile, place.next()) {
      key_value_gradient_one(p, part, s.state, s.staying(tile)[0], s.staying(tile)[1], place);
    }
  } else {
    keys.start();
    keys.run([&](int stage) {
      key_value_gradient_one(p, part, s.state, s.tile[stage][0], s.tile[stage][1], place);
      place.next();
    });
  }
}

}  // namespace
