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

// ---- shared memory of each kernel --------------------------------------------------------------------

template <typename T, typename H>
struct StateShared {
  static constexpr int kStages = 3;
  TokenTile<T, H> tile[kStages][2];
};

template <typename T, typename H>
struct ApplyShared {
  static constexpr int kStages = 3;
  State<T, H> state;
  TokenTile<T, H> tile[kStages];
};

template <typename T, typename H>
struct GradientShared {
  static constexpr int kStages = H::kTile.long_stages;
  State<T, H> state;
  TokenTile<T, H> tile[kStages][2];
};

template <typename T, typename H>
struct ForwardShared {
  static constexpr int kStages = H::kTile.stages - 1, kQueryStages = 2;
  State<T, H> state;
  TokenTile<T, H> query[kQueryStages];
  TokenTile<T, H> tile[kStages][2];
};

// With keys and values that stay, a second tile of queries follows if there is room, and then as many
// tiles of them as there are.
template <typename T, typename H, bool kStay>
struct BackwardShared {
  static constexpr int kStages = kStay ? 1 : H::kTile.stages;
  State<T, H> state;
  TokenTile<T, H> tile[kStages][2];

  __device__ TokenTile<T, H>* pair(int index) { return &tile[0][0] + 2 * index; }
};

// One launch for a backward: at D = 128 it would spill, in float16 on compute capability 9.0.
constexpr bool backward_in_one(int64_t head_dim) { return head_dim <= 96; }

// How many key tokens can stay.
template <typename T, typename H>
constexpr int64_t staying_keys() {
  if (!backward_in_one(H::D)) return 0;
  return (kSharedLimit - sizeof(BackwardShared<T, H, true>)) / (2 * sizeof(TokenTile<T, H>)) *
         H::kTokens;
}

// The rows of a tensor that are at a place.
template <typename T>
__device__ TileRows<T> rows_at(const Rows<T>& tensor, const Part& part, const TilePlace& place) {
  return {tensor.at(part.batch, place.head, 0), tensor.stride[2], place.first, place.valid,
          tensor.wide};
}

// Begins to copy them.
template <typename T, typename H>
__device__ void copy(TokenTile<T, H>& target, const Rows<const T>& source, const Part& part,
                     const TilePlace& place) {
  copy_tile(target, rows_at(source, part, place));
}

// Where a block's first tile of queries, or of keys, is.
template <typename H, typename T>
__device__ TilePlace first_queries(const Problem<T>& p, const Part& part) {
  return TilePlace(part.begin, part.kv_head * p.group, p.queries, H::kTokens);
}
template <typename H, typename T>
__device__ TilePlace first_keys(const Problem<T>& p, const Part& part) {
  return TilePlace(part.begin, part.kv_head, p.keys, H::kTokens);
}

// ---- what more than one kernel does ------------------------------------------------------------------

template <typename T, typename H>
__device__ void apply_one(const Problem<T>& p, const Part& part, const State<T, H>& state,
                          TokenTile<T, H>& q, const TilePlace& place) {
  apply_tile(state, q, p.eps, rows_at(p.out, part, place));
}

template <typename T, typename H>
__device__ void query_gradient_one(const Problem<T>& p, const Part& part, State<T, H>& state,
                                   TokenTile<T, H>* tile, Sums<H>& sums,
                                   const TilePlace& place) {
  query_gradient_tile(state, sums, tile[0], tile[1], p.eps, rows_at(p.dq, part, place));
}

template <typename T, typename H>
__device__ void key_value_gradient_one(const Problem<T>& p, const Part& part,
                                       const State<T, H>& state, TokenTile<T, H>& k,
                                       TokenTile<T, H>& v, const TilePlace& place) {
  key_value_gradient_tile(state, k, v, rows_at(p.dk, part, place), rows_at(p.dv, part, place));
}

template <typename T, typename H>
__device__ float* scratch_of(TokenTile<T, H>& tile) {
  return reinterpret_cast<float*>(tile.rows);
}

// After the last query of dS's sums; with two tiles' memory.
template <typename T, typename H>
__device__ void finish_gradient(Sums<H>& sums, const State<T, H>& state, TokenTile<T, H>* tile) {
  sums.template combine<2 * sizeof(TokenTile<T, H>)>(scratch_of(tile[0]));
  const float of_S = 1.0f / state.dS_scale;
  sums.rescale(of_S, of_S / state.weight_scale, std::is_same_v<T, __half>);
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
  using H = Long<D>;
  using Shared = StateShared<T, H>;
  constexpr bool kTwoLevels = D <= kWidestOfTwoLevels;
  constexpr int kChunk = 256 / H::kTokens;
  Shared& s = shared_memory_as<Shared>();
  const Part part(p.kv_heads, p.num_splits, tiles_of(1, p.keys, H::kTokens));
  TilePlace coming = first_keys<H>(p, part), place = coming;
  const auto tiles = stream<Shared::kStages>(part.begin, part.end, [&](int stage) {
    copy(s.tile[stage][0], p.k, part, coming);
    copy(s.tile[stage][1], p.v, part, coming);
    coming.next();
  });
  tiles.start();
  Sums<H> sums, total;
  sums.clear();
  total.clear();
  int in_sums = 0;  // tiles
  tiles.run([&](int stage) {
    sums.add_keys(s.tile[stage][0], s.tile[stage][1], place.valid);
    place.next();
    if constexpr (kTwoLevels) {
      if (++in_sums == kChunk) {
        total.add(sums);
        sums.clear();
        in_sums = 0;
      }
    }
  });
  if constexpr (kTwoLevels) sums.add(total);
  sums.template combine<sizeof(s.tile[0])>(scratch_of(s.tile[0][0]));
  const int64_t index = part.split * p.states + part.state;
  sums.store(p.S_out + index * 2 * D * D, p.z_out + index * 2 * D);
}

// A multiprocessor has room for another block than the tiles' table asks for, where heads alone are more
// blocks than that: registers are not to be what keeps it out.
constexpr int apply_blocks(int head_dim) {
  return head_dim == 32 ? 3 : head_dim == 96 ? 2 : tile_of(kHalfTiles, head_dim).blocks;
}

template <int D, typename T>
__global__ void __launch_bounds__(kThreads, apply_blocks(D)) half_apply_kernel(Problem<T> p) {
  using H = Long<D>;
  using Shared = ApplyShared<T, H>;
  Shared& s = shared_memory_as<Shared>();
  const Part part(p.kv_heads, p.num_splits, tiles_of(p.group, p.queries, H::kTokens));
  TilePlace coming = first_queries<H>(p, part), place = coming;
  const auto tiles = stream<Shared::kStages>(part.begin, part.end, [&](int stage) {
    copy(s.tile[stage], p.q, part, coming);
    coming.next();
  });
  tiles.start();
  s.state.load_centred(p.S + part.state * 2 * D * D, p.z + part.state * 2 * D,
                       scratch_of(s.tile[Shared::kStages - 1]), true);
  tiles.run([&](int stage) {
    apply_one(p, part, s.state, s.tile[stage], place);
    place.next();
  });
}

// ---- forward in one launch -----------------------------------------------------------------------------

template <int D, typename T>
__global__ void __launch_bounds__(kThreads, Long<D>::kTile.blocks)
    half_forward_kernel(Problem<T> p) {
  using H = Short<D>;
  using Shared = ForwardShared<T, H>;
  Shared& s = shared_memory_as<Shared>();
  const Part part(p.kv_heads, 1, 0);
  TilePlace coming = first_queries<H>(p, part), place = coming;
  TilePlace coming_keys = first_keys<H>(p, part), key_place = coming_keys;
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
  Sums<H> sums;
  sums.clear();
  keys.run([&](int stage) {
    sums.add_keys(s.tile[stage][0], s.tile[stage][1], key_place.valid);
    key_place.next();
  });
  sums.template combine<sizeof(s.tile[0])>(scratch_of(s.tile[0][0]));
  if (p.S_out) sums.store(p.S_out + part.state * 2 * D * D, p.z_out + part.state * 2 * D);
  s.state.take_centred(sums, scratch_of(s.tile[0][0]), true);
  queries.run([&](int stage) {
    apply_one(p, part, s.state, s.query[stage], place);
    place.next();
  });
}

// ---- backward, by steps --------------------------------------------------------------------------------

template <int D, typename T>
__global__ void __launch_bounds__(kThreads, Long<D>::kTile.gradient_blocks)
    half_query_gradient_kernel(Problem<T> p) {
  using H = Long<D>;
  using Shared = GradientShared<T, H>;
  Shared& s = shared_memory_as<Shared>();
  const Part part(p.kv_heads, p.num_splits, tiles_of(p.group, p.queries, H::kTokens));
  TilePlace coming = first_queries<H>(p, part), place = coming;
  const auto tiles = stream<Shared::kStages>(part.begin, part.end, [&](int stage) {
    copy(s.tile[stage][0], p.q, part, coming);
    copy(s.tile[stage][1], p.dout, part, coming);
    coming.next();
  });
  tiles.start();
  s.state.load_centred(p.S + part.state * 2 * D * D, p.z + part.state * 2 * D,
                       scratch_of(s.tile[Shared::kStages - 1][0]), false);
  if (part.split == 0 && threadIdx.x < D) {
    store_global(p.mean_out + part.state * D + threadIdx.x, s.state.mean[threadIdx.x]);
  }
  Sums<H> sums;
  sums.clear();
  tiles.run([&](int stage) {
    query_gradient_one(p, part, s.state, s.tile[stage], sums, place);
    place.next();
  });
  finish_gradient(sums, s.state, s.tile[0]);
  const int64_t index = part.split * p.states + part.state;
  sums.store(p.S_out + index * 2 * D * D, p.z_out + index * 2 * D);
}

template <int D, typename T>
__global__ void __launch_bounds__(kThreads, Long<D>::kTile.blocks)
    half_key_value_gradient_kernel(Problem<T> p) {
  using H = Long<D>;
  using Shared = GradientShared<T, H>;
  Shared& s = shared_memory_as<Shared>();
  const Part part(p.kv_heads, p.num_splits, tiles_of(1, p.keys, H::kTokens));
  TilePlace coming = first_keys<H>(p, part), place = coming;
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
__global__ void __launch_bounds__(kThreads, Short<D>::kTile.gradient_blocks)
    half_backward_kernel(Problem<T> p) {
  using H = Short<D>;
  using Shared = BackwardShared<T, H, kStay>;
  Shared& s = shared_memory_as<Shared>();
  const Part part(p.kv_heads, 1, 0);
  const int key_tiles = static_cast<int>(tiles_of(1, p.keys, H::kTokens));
  const int query_tiles = static_cast<int>(tiles_of(p.group, p.queries, H::kTokens));
  Sums<H> sums;

  TilePlace coming = first_queries<H>(p, part), place = coming;
  const auto load_queries = [&](int stage) {
    copy(s.pair(stage)[0], p.q, part, coming);
    copy(s.pair(stage)[1], p.dout, part, coming);
    coming.next();
  };
  const auto differentiate = [&](int stage) {
    query_gradient_one(p, part, s.state, s.pair(stage), sums, place);
    place.next();
  };
  if constexpr (kStay) {
    TokenTile<T, H>* const staying = s.pair(p.query_stages);
    TilePlace keys = first_keys<H>(p, part);
    for (int tile = 0; tile < key_tiles; ++tile, keys.next()) {
      copy(staying[2 * tile], p.k, part, keys);
      copy(staying[2 * tile + 1], p.v, part, keys);
    }
    ptx::cp_async_commit();
    const auto queries = short_stream(query_tiles, p.query_stages, load_queries);
    queries.start();
    ptx::cp_async_wait<1>();
    __syncthreads();  // every key and value is here
    sums.clear();
    keys = first_keys<H>(p, part);
    for (int tile = 0; tile < key_tiles; ++tile, keys.next()) {
      sums.add_keys(staying[2 * tile], staying[2 * tile + 1], keys.valid);
    }
    // There is no S' yet.
    auto* const scratch = reinterpret_cast<float*>(s.state.rows);
    sums.template combine<sizeof(s.state.rows)>(scratch);
    s.state.take_centred(sums, scratch, false);
    sums.clear();
    queries.run(differentiate);
    finish_gradient(sums, s.state, s.pair(0));
    s.state.take_gradient(sums);
    __syncthreads();  // dS is there
    keys = first_keys<H>(p, part);
    for (int tile = 0; tile < key_tiles; ++tile, keys.next()) {
      key_value_gradient_one(p, part, s.state, staying[2 * tile], staying[2 * tile + 1], keys);
    }
  } else {
    TokenTile<T, H>* const last = s.tile[Shared::kStages - 1];
    const auto queries = stream<Shared::kStages>(0, query_tiles, load_queries);
    queries.start();
    s.state.load_centred(p.S + part.state * 2 * D * D, p.z + part.state * 2 * D,
                         scratch_of(last[0]), false);
    sums.clear();
    queries.run(differentiate);
    coming = place = first_keys<H>(p, part);
    const auto keys = stream<Shared::kStages>(0, key_tiles, [&](int stage) {
      copy(s.tile[stage][0], p.k, part, coming);
      copy(s.tile[stage][1], p.v, part, coming);
      coming.next();
    });
    __syncthreads();  // the last queries have been read
    keys.start();
    finish_gradient(sums, s.state, last);
    s.state.take_gradient(sums);
    keys.run([&](int stage) {
      key_value_gradient_one(p, part, s.state, s.tile[stage][0], s.tile[stage][1], place);
      place.next();
    });
  }
}

}  // namespace
