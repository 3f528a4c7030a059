// Linear attention in CUDA C++, forward and backward: what is launched, and how often.
//
//   tiles.h           every choice of tile, warps and stages
//   half.cuh          half precision on tensor cores: what a block does, and the numerics
//   half_kernels.cuh  its kernels
//   float32.cuh       float32 on the FMA units
//   problem.cuh       what kernels are given; how splits of a sum over tokens are added up
//
// A forward is one launch where a block a key/value head is enough (one_launch), else three: the state
// of every split of the keys, its reduction, out of every split of the queries. A backward likewise is
// one launch, or four: dq and partial dS of every split of the queries, their reduction, dk and dv; and
// before these, where the state was not kept, the forward's first two. Half precision reads each of
// q, k, v, dout and writes each of out, dq, dk, dv once (k and v twice where several launches make the
// state again); float32 too up to D = 64.
//
// A backward of which nothing but dq is asked for leaves out the launches that make dk and dv, and what
// only they read. Any other makes all three gradients: the operator drops those not asked for.
//
// phi(x) = [relu(x), relu(-x)] is formed in registers from x, never in memory. No atomics: results
// repeat bit for bit. Nothing is allocated or waited for, so CUDA graphs take all of it.
//
// Letters as in the formulas: D head dimension, S (2D x D) and z (2D) the state, g = dout,
// a = S g, and the prefix d for a gradient.
#include "cuda.h"

#include <cstdio>

#include "float32.cuh"
#include "half_kernels.cuh"

namespace {

using Arguments = LinearAttentionArguments;

// ---- what is launched ------------------------------------------------------------------------------

constexpr int64_t kAnyNumber = int64_t{1} << 60;  // of tokens

// Blocks that share `tokens` tokens of each of `states` states: at most `blocks` in all, which is what
// the GPU runs at once, but so that none takes more than `most` tokens, nor is hardly worth it.
int64_t splits_of(const Arguments& p, int64_t tokens, int64_t blocks, int64_t most) {
  if (p.num_splits > 0) return p.num_splits;
  const int64_t states = p.batch * p.kv_heads;
  if (states == 0 || tokens == 0) return 1;
  const int64_t wanted = blocks / states > 1 ? blocks / states : 1;
  const int64_t worth = ceil_div(tokens, kFewestTokensPerSplit), fewest = ceil_div(tokens, most);
  const int64_t splits = wanted < worth ? wanted : worth;
  return splits > fewest ? splits : fewest;
}

// The query gradient's splits, more of them where its blocks then come in fuller waves. What binds that
// kernel is instructions (bench static: on compute capability 9.0 four fifths of its memory time if every
// slot is used, and kernels use two thirds), so that multiprocessors without a block cost time; the other
// kernels' memory is kept busy by half of them. 96 heads on 132 multiprocessors are one wave, a quarter
// of it empty, and in four splits each three waves, nearly full. By the figures below, that saves 3 of
// 12 us at 1,024 tokens and 48 of 193 at 16,384; partial sums and their launch cost 13, two more waves 8.
//
// All of it in bytes that a copy would move meanwhile; the partial sums count twice, since nobody has
// measured them.
int64_t splits_in_full_waves(const Arguments& p, int64_t splits, int64_t tokens,
                             int64_t tile_tokens, int64_t blocks) {
  constexpr int64_t kLaunch = 13 << 20;  // 3 us at 4.3 TB/s
  constexpr int64_t kWave = 17 << 20;    // a block's first and last 4 us, of which S takes the most
  constexpr int64_t kMostWaves = 4;
  const int64_t states = p.batch * p.kv_heads, tiles = ceil_div(tokens, tile_tokens);
  const int64_t tile_bytes = 3 * 2 * p.head_dim * tile_tokens;  // of q, dout, dq
  const int64_t state_bytes = 8 * p.head_dim * p.head_dim;
  // Up to an eighth of the blocks a head, one wave is nearly full.
  if (p.num_splits > 0 || 8 * states <= blocks) return splits;
  // GPUs with no more shared memory than that have slow memory, and bytes bind (30 % on 8.6).
  if (most_shared_memory() <= kSharedLimit) return splits;
  auto cost = [&](int64_t s) {
    const int64_t waves = ceil_div(states * s, blocks);
    const int64_t work = waves * (blocks * ceil_div(tiles, s) * tile_bytes + kWave);
    // Partial sums are written and read, S is read.
    return work + (s > 1 ? 2 * ((3 * s + 1) * states * state_bytes + kLaunch) : 0);
  };
  int64_t best = splits;
  for (int64_t s = splits + 1; states * s <= kMostWaves * blocks && s * kFewestTokensPerSplit <= tokens;
       ++s) {
    if (cost(s) < cost(best)) best = s;
  }
  return best;
}

struct Plan {
  bool half, stay, one_launch;
  int64_t states, S_size, z_size, mean_size;
  int64_t state, apply, query_gradient, key_value_gradient;  // splits
  bool rows;  // float32 beyond D = 64: two floats a query row between two kernels

  Plan(const Arguments& p, LinearAttentionPass pass) {
    half = p.element != kFloat32;
    states = p.batch * p.kv_heads;
    S_size = states * 2 * p.head_dim * p.head_dim;
    z_size = states * 2 * p.head_dim;
    mean_size = states * p.head_dim;
    const int64_t queries = p.group * p.queries;
    const HalfTile tile = tile_of(kHalfTiles, p.head_dim);
    const int64_t blocks = (half ? tile.blocks : 2) * p.multiprocessors;
    const int64_t gradient_blocks = (half ? tile.gradient_blocks : 2) * p.multiprocessors;
    const int64_t most = half ? kMostTokensPerSplit : kMostFloatTokensPerSplit;
    // Partial sums are traffic: in half precision one block of k and v keeps a multiprocessor busy, and
    // so it does of q and dout where heads alone nearly fill the GPU.
    const bool nearly = half && 2 * states > p.multiprocessors;
    state = splits_of(p, p.keys, half ? p.multiprocessors : blocks, most);
    const int64_t query_blocks = nearly ? p.multiprocessors : gradient_blocks;
    query_gradient = splits_of(p, queries, query_blocks, most);
    if (half) {
      query_gradient = splits_in_full_waves(p, query_gradient, queries, tile.long_tokens, query_blocks);
    }
    apply = splits_of(p, queries, blocks, kAnyNumber);
    key_value_gradient = splits_of(p, p.keys, blocks, kAnyNumber);
    rows = !half && p.head_dim > 64;

    // A block a key/value head: of short sequences, where there are enough heads, or so short ones that
    // a launch is dearer than a GPU half empty. In the backward, keys and values stay in shared memory
    // if the state was not kept and has to come from them; else the state is read once.
    const bool shorter = p.keys <= 1024 && queries <= 4096 && states >= p.multiprocessors;
    const bool tiny = p.keys <= 256 && queries <= 1024;
    stay = p.S == nullptr;
    one_launch = half && p.num_splits == 0 && (shorter || tiny);
    if (pass == kBackward) {
      one_launch = one_launch && backward_in_one(p.head_dim) && (!stay || p.keys <= staying(p));
    }
    if (pass != kForward && pass != kBackward) one_launch = false;
  }

  static int64_t staying(const Arguments& p) {
    int64_t keys = 0;
    for_element_type_and_head_dim(p.element, p.head_dim, [&](auto type, auto head_dim) {
      using T = typename decltype(type)::type;
      if constexpr (!std::is_same_v<T, float>) {
        keys = staying_keys<T, Short<decltype(head_dim)::value>>();
      }
      return cudaSuccess;
    });
    return keys;
  }

  int64_t state_size() const { return S_size + z_size; }
  int64_t partials(int64_t splits) const { return splits > 1 ? splits * state_size() : 0; }
};

// Hands out a workspace. Every size but the last is a multiple of four floats.
struct Workspace {
  float* next;

  float* take(int64_t floats) {
    float* const taken = next;
    next += floats;
    return taken;
  }
};

template <typename T>
Problem<T> problem_of(const Arguments& p) {
  Problem<T> problem{};
  problem.q = rows_of<const T>(p.q), problem.k = rows_of<const T>(p.k);
  problem.v = rows_of<const T>(p.v), problem.dout = rows_of<const T>(p.dout);
  problem.out = rows_of<T>(p.out), problem.dq = rows_of<T>(p.dq);
  problem.dk = rows_of<T>(p.dk), problem.dv = rows_of<T>(p.dv);
  problem.kv_heads = p.kv_heads, problem.group = p.group;
  problem.queries = p.queries, problem.keys = p.keys;
  problem.states = p.batch * p.kv_heads, problem.eps = p.eps;
  problem.S = p.S, problem.z = p.z, problem.dS = p.dS, problem.dz = p.dz;
  return problem;
}

// Runs sum(S, z) for the `splits` parts of a sum over tokens, then their reduction, unless nobody reads
// it.
template <typename Sum>
cudaError_t sum_splits(const Plan& plan, int64_t splits, float* S, float* z, float* partials,
                       cudaStream_t stream, Sum sum, bool unread = false) {
  if (splits == 1) return sum(S, z);
  float* const z_partials = partials + splits * plan.S_size;
  const cudaError_t error = sum(partials, z_partials);
  if (error != cudaSuccess || unread) return error;
  return launch(reduce_kernel, ceil_div(plan.state_size(), 4 * Reduce::kQuads),
                kThreads * sizeof(float4), stream,
                Reduce{partials, z_partials, S, z, plan.S_size, plan.z_size, splits});
}

// ---- single steps ------------------------------------------------------------------------------------

// S, z of k, v.
template <int D, typename T>
cudaError_t run_state(const Arguments& p, const Plan& plan, float* S, float* z, float* partials,
                      cudaStream_t stream) {
  return sum_splits(plan, plan.state, S, z, partials, stream, [&](float* S_out, float* z_out) {
    if constexpr (std::is_same_v<T, float>) {
      return launch_float_sum<D>(p.k, p.v, p.kv_heads, 1, p.keys, plan.states, plan.state, nullptr,
                                 nullptr, S_out, z_out, stream);
    } else {
      Problem<T> problem = problem_of<T>(p);
      problem.num_splits = plan.state, problem.S_out = S_out, problem.z_out = z_out;
      return launch(half_state_kernel<D, T>, plan.states * plan.state, sizeof(StateShared<T, Long<D>>),
                    stream, problem);
    }
  });
}

template <int D, typename T>
cudaError_t run_apply(const Arguments& p, const Plan& plan, const float* S, const float* z,
                      cudaStream_t stream) {
  Problem<T> problem = problem_of<T>(p);
  problem.S = S, problem.z = z;
  if constexpr (std::is_same_v<T, float>) {
    const int64_t heads = p.kv_heads * p.group;
    return launch(float_apply_kernel<D>, row_blocks<D>(p.batch, heads, p.queries),
                  sizeof(FloatApplyShared<D>), stream,
                  FloatApply{problem.q, problem.out, heads, p.group, p.queries, S, z, p.eps});
  } else {
    if (p.queries == 0) return cudaSuccess;
    problem.num_splits = plan.apply;
    return launch(half_apply_kernel<D, T>, plan.states * plan.apply, sizeof(ApplyShared<T, Long<D>>),
                  stream, problem);
  }
}

// dq, dS, dz; and m, by which half precision's dz is centred. `rest`: what is left of the workspace.
template <int D, typename T>
cudaError_t run_query_gradient(const Arguments& p, const Plan& plan, const float* S, const float* z,
                               float* dS, float* dz, float* mean, Workspace rest,
                               cudaStream_t stream) {
  float* const partials = rest.take(plan.partials(plan.query_gradient));
  Problem<T> problem = problem_of<T>(p);
  problem.S = S, problem.z = z, problem.num_splits = plan.query_gradient;
  if constexpr (std::is_same_v<T, float> && D > 64) {
    const int64_t heads = p.kv_heads * p.group, rows = p.batch * heads * p.queries;
    float* const scale = rest.take(rows);
    float* const weight = rest.take(rows);
    const cudaError_t error = launch(
        float_query_gradient_kernel<D>, row_blocks<D>(p.batch, heads, p.queries),
        sizeof(FloatQueryGradientShared<D>), stream,
        FloatQueryGradient{problem.dout, problem.q, problem.dq, heads, p.group, p.queries, S, z,
                           p.eps, scale, weight});
    if (error != cudaSuccess || p.only_dq) return error;
    return sum_splits(plan, plan.query_gradient, dS, dz, partials, stream,
                      [&](float* S_out, float* z_out) {
                        return launch_float_sum<D>(p.q, p.dout, p.kv_heads, p.group, p.queries,
                                                   plan.states, plan.query_gradient, scale, weight,
                                                   S_out, z_out, stream);
                      });
  } else {
    return sum_splits(plan, plan.query_gradient, dS, dz, partials, stream,
                      [&](float* S_out, float* z_out) {
                        problem.S_out = S_out, problem.z_out = z_out, problem.mean_out = mean;
                        if constexpr (std::is_same_v<T, float>) {
                          return launch(float_query_gradient_sum_kernel<D>,
                                        plan.states * plan.query_gradient,
                                        sizeof(FloatQuerySumShared<D>), stream, problem);
                        } else {
                          return launch(half_query_gradient_kernel<D, T>,
                                        plan.states * plan.query_gradient,
                                        sizeof(GradientShared<T, Long<D>>), stream, problem);
                        }
                      },
                      p.only_dq != 0);
  }
}

template <int D, typename T>
cudaError_t run_key_value_gradient(const Arguments& p, const Plan& plan, const float* dS,
                                   const float* dz, const float* mean, cudaStream_t stream) {
  Problem<T> problem = problem_of<T>(p);
  problem.dS = dS, problem.dz = dz, problem.mean = mean;
  if constexpr (std::is_same_v<T, float>) {
    return launch(float_key_value_gradient_kernel<D>, row_blocks<D>(p.batch, p.kv_heads, p.keys),
                  sizeof(FloatKeyValueGradientShared<D>), stream,
                  FloatKeyValueGradient{problem.k, problem.v, problem.dk, problem.dv, p.kv_heads,
                                        p.keys, dS, dz});
  } else {
    if (p.keys == 0) return cudaSuccess;
    problem.num_splits = plan.key_value_gradient;
    return launch(half_key_value_gradient_kernel<D, T>, plan.states * plan.key_value_gradient,
                  sizeof(GradientShared<T, Long<D>>), stream, problem);
  }
}

// ---- whole passes --------------------------------------------------------------------------------------

template <int D, typename T>
cudaError_t run_forward(const Arguments& p, cudaStream_t stream) {
  const Plan plan(p, kForward);
  if constexpr (!std::is_same_v<T, float>) {
    if (plan.one_launch) {
      Problem<T> problem = problem_of<T>(p);
      problem.num_splits = 1, problem.S_out = p.S, problem.z_out = p.z;
      return launch(half_forward_kernel<D, T>, plan.states, sizeof(ForwardShared<T, Short<D>>), stream,
                    problem);
    }
  }
  Workspace workspace{p.workspace};
  float* const S = p.S ? p.S : workspace.take(plan.S_size);
  float* const z = p.S ? p.z : workspace.take(plan.z_size);
  const cudaError_t error = run_state<D, T>(p, plan, S, z, workspace.next, stream);
  return error == cudaSuccess ? run_apply<D, T>(p, plan, S, z, stream) : error;
}

template <int D, typename T>
cudaError_t run_backward(const Arguments& p, cudaStream_t stream) {
  const Plan plan(p, kBackward);
  if constexpr (!std::is_same_v<T, float> && backward_in_one(D)) {
    if (plan.one_launch) {
      Problem<T> problem = problem_of<T>(p);
      problem.num_splits = 1;
      if (!plan.stay) {
        return launch(half_backward_kernel<D, false, T>, plan.states,
                      sizeof(BackwardShared<T, Short<D>, false>), stream, problem);
      }
      using H = Short<D>;
      if constexpr (staying_keys<T, H>() > 0) {
        // A second tile of queries, where there is one and room.
        const int64_t query_tiles = p.group * ceil_div(p.queries, H::kTokens);
        const size_t pair = 2 * sizeof(TokenTile<T, H>);
        size_t bytes = sizeof(BackwardShared<T, H, true>) + ceil_div(p.keys, H::kTokens) * pair;
        problem.query_stages = query_tiles > 1 && bytes + pair <= most_shared_memory() ? 2 : 1;
        if (problem.query_stages == 2) bytes += pair;
        return launch(half_backward_kernel<D, true, T>, plan.states, bytes, stream, problem);
      }
    }
  }
  Workspace workspace{p.workspace};
  float* const mean = plan.half ? workspace.take(plan.mean_size) : nullptr;
  float* const dS = workspace.take(plan.S_size);
  float* const dz = workspace.take(plan.z_size);
  const float* S = p.S;
  const float* z = p.z;
  if (!S) {
    float* const S_again = workspace.take(plan.S_size);
    float* const z_again = workspace.take(plan.z_size);
    const cudaError_t error =
        run_state<D, T>(p, plan, S_again, z_again, workspace.next, stream);
    if (error != cudaSuccess) return error;
    S = S_again, z = z_again;
  }
  const cudaError_t error =
      run_query_gradient<D, T>(p, plan, S, z, dS, dz, mean, workspace, stream);
  if (error != cudaSuccess || p.only_dq) return error;
  return run_key_value_gradient<D, T>(p, plan, dS, dz, mean, stream);
}

template <int D, typename T>
cudaError_t run_apply_backward(const Arguments& p, cudaStream_t stream) {
  const Plan plan(p, kApplyBackward);
  Workspace workspace{p.workspace};
  float* const mean = plan.half ? workspace.take(plan.mean_size) : nullptr;
  const cudaError_t error =
      run_query_gradient<D, T>(p, plan, p.S, p.z, p.dS, p.dz, mean, workspace, stream);
  if (error != cudaSuccess || !plan.half || p.only_dq) return error;
  return launch(uncentre_kernel, ceil_div(plan.z_size * 32, kThreads), 0, stream,
                Uncentre{p.dS, mean, p.dz, plan.z_size, D});
}

// function(std::integral_constant<int, D>{}, Type<T>{}).
template <typename Function>
cudaError_t dispatched(const Arguments& p, Function function) {
  return for_element_type_and_head_dim(
      p.element, p.head_dim, [&](auto type, auto head_dim) { return function(head_dim, type); });
}

}  // namespace

// ---- launchers -------------------------------------------------------------------------------------

extern "C" cudaError_t linear_attention_forward(const Arguments* p, cudaStream_t stream) {
  return dispatched(*p, [&](auto D, auto type) {
    return run_forward<decltype(D)::value, typename decltype(type)::type>(*p, stream);
  });
}

extern "C" cudaError_t linear_attention_backward(const Arguments* p, cudaStream_t stream) {
  return dispatched(*p, [&](auto D, auto type) {
    return run_backward<decltype(D)::value, typename decltype(type)::type>(*p, stream);
  });
}

extern "C" cudaError_t linear_attention_state(const Arguments* p, cudaStream_t stream) {
  return dispatched(*p, [&](auto D, auto type) {
    return run_state<decltype(D)::value, typename decltype(type)::type>(
        *p, Plan(*p, kState), p->S, p->z, p->workspace, stream);
  });
}

extern "C" cudaError_t linear_attention_state_backward(const Arguments* p, cudaStream_t stream) {
  return dispatched(*p, [&](auto D, auto type) {
    return run_key_value_gradient<decltype(D)::value, typename decltype(type)::type>(
        *p, Plan(*p, kStateBackward), p->dS, p->dz, nullptr, stream);
  });
}

extern "C" cudaError_t linear_attention_apply(const Arguments* p, cudaStream_t stream) {
  return dispatched(*p, [&](auto D, auto type) {
    return run_apply<decltype(D)::value, typename decltype(type)::type>(*p, Plan(*p, kApply), p->S,
                                                                        p->z, stream);
  });
}

extern "C" cudaError_t linear_attention_apply_backward(const Arguments* p, cudaStream_t stream) {
  return dispatched(*p, [&](auto D, auto type) {
    return run_apply_backward<decltype(D)::value, typename decltype(type)::type>(*p, stream);
  });
}

// ---- what a pass costs beside its tensors ------------------------------------------------------------

extern "C" int64_t linear_attention_workspace(const Arguments* arguments,
                                              LinearAttentionPass pass) {
  const Arguments& p = *arguments;
  const Plan plan(p, pass);
  if (plan.one_launch) return 0;
  const int64_t rows = plan.rows ? 2 * p.batch * p.kv_heads * p.group * p.queries : 0;
  const int64_t mean = plan.half ? plan.mean_size : 0;
  const int64_t kept = p.S ? 0 : plan.state_size();
  const int64_t of_state = plan.partials(plan.state);
  const int64_t of_queries = plan.partials(plan.query_gradient) + rows;
  switch (pass) {
    case kForward:
      return kept + of_state;
    case kBackward:
      return mean + plan.state_size() + kept +
             (!p.S && of_state > of_queries ? of_state : of_queries);
    case kState:
      return of_state;
    case kApplyBackward:
      return mean + of_queries;
    default:
      return 0;
  }
}

extern "C" int64_t linear_attention_launches(const Arguments* arguments,
                                             LinearAttentionPass pass) {
  const Plan plan(*arguments, pass);
  if (plan.one_launch) return 1;
  const int64_t state = plan.state > 1 ? 2 : 1;
  const int64_t sums = plan.query_gradient > 1 ? 2 : 1;
  const int64_t queries = arguments->only_dq ? 1 : sums + plan.rows;
  switch (pass) {
    case kForward:
      return state + 1;
    case kBackward:
      return (arguments->S ? 0 : state) + queries + !arguments->only_dq;
    case kState:
      return state;
    case kApplyBackward:
      return queries + (plan.half && !arguments->only_dq);
    default:
      return 1;
  }
}

extern "C" int64_t linear_attention_workspace_bytes(const Arguments* arguments,
                                                    LinearAttentionPass pass) {
  const Arguments& p = *arguments;
  const Plan plan(p, pass);
  if (!plan.half) return -1;  // its states come through the cache tile by tile: not counted here
  const int64_t one = plan.state_size();
  if (plan.one_launch) return 4 * (p.S ? one : 0);
  // Partial sums are written and read, their sum written.
  auto summed = [&](int64_t splits) { return (splits > 1 ? 2 * splits + 1 : 1) * one; };
  const int64_t state = summed(plan.state), apply = plan.apply * one;
  const int64_t queries =
      plan.query_gradient * one + plan.mean_size + summed(plan.query_gradient);
  const int64_t keys = plan.key_value_gradient * one;
  switch (pass) {
    case kForward:
      return 4 * (state + apply);
    case kBackward:
      return 4 * ((p.S ? 0 : state) + queries + keys + plan.key_value_gradient * plan.mean_size);
    case kState:
      return 4 * state;
    case kStateBackward:  // dS twice, the second time to tell how far off it is rounded
      return 4 * (keys + plan.key_value_gradient * plan.S_size);
    case kApply:
      return 4 * apply;
    default:  // dz' is read and written again, with dS and m
      return 4 * (queries + one + plan.z_size + plan.z_size * p.head_dim);
  }
}

extern "C" const char* linear_attention_describe(int32_t element, int32_t head_dim) {
  static thread_local char line[160];
  if (element == kFloat32) {
    const FloatTile tile = tile_of(kFloatTiles, head_dim);
    std::snprintf(line, sizeof(line), "D=%d float32: %d tokens, sums of %d tokens x %d columns, FMA",
                  tile.head_dim, tile.tokens, tile.sum_tokens, tile.sum_columns);
  } else {
    const HalfTile tile = tile_of(kHalfTiles, head_dim);
    std::snprintf(line, sizeof(line),
                  "D=%d half: %d (long %d) tokens, 8 warps (sums %d x %d), %d (%d) stages, "
                  "%d (%d) blocks, mma.sync",
                  tile.head_dim, tile.tokens, tile.long_tokens, tile.feature_warps,
                  tile.column_warps, tile.stages, tile.long_stages, tile.blocks,
                  tile.gradient_blocks);
  }
  return line;
}
