// Softmax attention in CUDA C++: three kernels, one forward and two backward. No N x M matrix in
// memory.
//
//   forward             out and lse; keys and values pass by, with a running maximum and sum
//   query_gradient      dq and delta = rowsum(dout * out); keys and values pass by
//   key_value_gradient  dk, dv; the rows of q and dout pass by, the query heads of a group in turn
//
// Formulas: FlashAttention-2, algorithms 1 and 2 (arXiv:2307.08691). Backward, P is recomputed from
// lse. Logarithms are to base 2 inside, natural in lse. No atomics: results repeat bit for bit.
//
// Where keys are masked the first two have variants (kMasked), in which such a key has no weight; the
// third makes gradients of masked keys, too, which nobody reads.
//
// A block owns rows of one side of one head; the other side passes by a tile at a time.
//
//   rows owned / passed by        float32               float16, bfloat16
//   forward                       64 / 32 (D=128: 32)   128 / 64 up to D = 64, then 64 / 32
//   query_gradient                64 / 32 (D=128: 32)   64 / 32
//   key_value_gradient            64 / 32 (D=128: 32)   64 / 32
//
// Traffic: what a block owns is read once, results are written once; the other side is read once per
// block of its head, by blocks that are neighbours and so for the most part from the L2 cache. Forward
// adds 4 bytes a query (lse), backward 20: lse twice, delta written and read.
#include "cuda.h"

#include <cstdio>

#include "float32.cuh"
#include "half.cuh"

namespace {

// dS is about 1 / key_tokens, and must not underflow float16. The scale grows as slowly as accuracy
// allows: what the inputs leave to overflow is not known.
template <typename T>
float dscore_scale(int64_t key_tokens) {
  float scale = 1.0f;
  if constexpr (std::is_same_v<T, __half>) {
    for (; key_tokens > 2047; key_tokens /= 2) scale *= 2.0f;
  }
  return scale;
}

}  // namespace

extern "C" cudaError_t softmax_attention_forward(const SoftmaxForwardArguments* arguments,
                                                 cudaStream_t stream) {
  const SoftmaxForwardArguments& p = *arguments;
  return for_element_type_and_head_dim(p.element, p.head_dim, [&](auto type, auto head_dim) {
    using T = typename decltype(type)::type;
    constexpr int D = decltype(head_dim)::value;
    const Forward<T> forward{rows_of<const T>(p.q), rows_of<const T>(p.k), rows_of<const T>(p.v),
                             rows_of<T>(p.out),     p.heads,               p.group,
                             p.query_tokens,        p.key_tokens,          p.key_mask,
                             p.lse,                 p.scale};
    const int64_t heads = p.batch * p.heads;
    if constexpr (std::is_same_v<T, float>) {
      using namespace float32;
      return launch(p.key_mask ? forward_kernel<D, true> : forward_kernel<D, false>,
                    heads * ceil_div(p.query_tokens, Block<D>::kRows), sizeof(ForwardShared<D>),
                    stream, forward);
    } else {
      using namespace half_precision;
      using Tile = ForwardTile<D>;
      return launch(p.key_mask ? forward_kernel<D, T, true> : forward_kernel<D, T, false>,
                    heads * ceil_div(p.query_tokens, Tile::kOwned), Tile::kSharedBytes, stream,
                    forward, kBlockThreads);
    }
  });
}

extern "C" cudaError_t softmax_attention_backward(const SoftmaxBackwardArguments* arguments,
                                                  cudaStream_t stream) {
  const SoftmaxBackwardArguments& p = *arguments;
  return for_element_type_and_head_dim(p.element, p.head_dim, [&](auto type, auto head_dim) {
    using T = typename decltype(type)::type;
    constexpr int D = decltype(head_dim)::value;
    const Backward<T> backward{rows_of<const T>(p.dout),
                               rows_of<const T>(p.q),
                               rows_of<const T>(p.k),
                               rows_of<const T>(p.v),
                               rows_of<const T>(p.out),
                               rows_of<T>(p.dq),
                               rows_of<T>(p.dk),
                               rows_of<T>(p.dv),
                               p.heads,
                               p.group,
                               p.query_tokens,
                               p.key_tokens,
                               p.key_mask,
                               p.lse,
                               p.delta,
                               p.scale,
                               dscore_scale<T>(p.key_tokens)};
    const int64_t heads = p.batch * p.heads, kv_heads = heads / p.group;
    const bool queries = (p.wanted & 3) != 0, keys = (p.wanted & 6) != 0;  // dk needs delta
    if constexpr (std::is_same_v<T, float>) {
      using namespace float32;
      const cudaError_t error =
          queries ? launch(p.key_mask ? query_gradient_kernel<D, true>
                                      : query_gradient_kernel<D, false>,
                           heads * ceil_div(p.query_tokens, Block<D>::kRows),
                           sizeof(QueryGradientShared<D>), stream, backward)
                  : cudaSuccess;
      if (error != cudaSuccess || !keys) return error;
      return launch(key_value_gradient_kernel<D>,
                    kv_heads * ceil_div(p.key_tokens, Block<D>::kRows),
                    sizeof(KeyValueGradientShared<D>), stream, backward);
    } else {
      using namespace half_precision;
      using Tile = BackwardTile<D>;
      const cudaError_t error =
          queries ? launch(p.key_mask ? query_gradient_kernel<D, T, true>
                                      : query_gradient_kernel<D, T, false>,
                           heads * ceil_div(p.query_tokens, Tile::kOwned), Tile::kSharedBytes,
                           stream, backward, kBlockThreads)
                  : cudaSuccess;
      if (error != cudaSuccess || !keys) return error;
      return launch(key_value_gradient_kernel<D, T>,
                    kv_heads * ceil_div(p.key_tokens, Tile::kOwned),
                    Tile::kSharedBytes + Tile::kStatistics, stream, backward, kBlockThreads);
    }
  });
}

extern "C" void softmax_attention_describe(int32_t element, int32_t head_dim, char* line,
                                           size_t size) {
  if (size != 0) line[0] = '\0';
  for_element_type_and_head_dim(element, head_dim, [&](auto type, auto dim) {
    using T = typename decltype(type)::type;
    constexpr int D = decltype(dim)::value;
    if constexpr (std::is_same_v<T, float>) {
      std::snprintf(line, size, "float32 FMA, %d x %d rows, %d threads", float32::Block<D>::kRows,
                    float32::kTile, kThreads);
    } else {
      using namespace half_precision;
      std::snprintf(line, size, "mma.sync m16n8k16, %d x %d rows forward, %d x %d backward, %d threads",
                    ForwardTile<D>::kOwned, ForwardTile<D>::kPassed, BackwardTile<D>::kOwned,
                    BackwardTile<D>::kPassed, kBlockThreads);
    }
    return cudaSuccess;
  });
}
