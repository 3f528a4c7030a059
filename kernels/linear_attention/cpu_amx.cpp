// Linear attention for the CPU in bfloat16 on the matrix unit (AMX): what cpu.cpp calls.
//
// A token is read once, and written once: φ of keys is transposed from rows into tiles of 128 tokens, φ of
// queries is a tile as it lies; S stays in the L1 and L2 caches (cpu_amx_sums.h, cpu_amx_apply.h,
// cpu_amx_gradients.h). Against the row-by-row kernels of cpu_simd.cpp this does twice the FLOP, since half
// of φ is zeros, on a unit that has 16 times as many.
//
// The unit takes subnormals for zeros. Rows so small that this could be seen in a result (below 2^-40 all
// of them, or with a normaliser below 2^-64) are left to cpu_simd.cpp's kernels. (AMX-FP16, for float16, is
// of newer processors.)
#include "cpu_amx_gradients.h"

namespace {

#if defined(LINEAR_VIT_AVX512)
const LinearAttentionKernels& exact = linear_attention_avx512;
#else
const LinearAttentionKernels& exact = linear_attention_portable;
#endif

// ---- memory --------------------------------------------------------------------------------------

int64_t state_floats(int64_t head_dim) {
  const int64_t padded = (head_dim + 31) / 32 * 32;
  return 2 * padded * padded + 3 * padded + 16;
}

// All scratch memory, one after the other, each part from a cache line on.
struct Scratch {
  SumScratch sums;
  ApplyScratch apply;
  GradientScratch gradient;
  int64_t bytes = 0;

  template <class D>
  Scratch(const D& d, float* memory) {
    char* const base = (char*)memory;
    const int64_t p = d.padded(), chunks = d.chunks(), row = p * sizeof(BF16);
    const auto take = [&](auto*& to, int64_t size) {
      to = (std::remove_reference_t<decltype(to)>)(base + bytes);
      bytes += (size + 63) / 64 * 64;
    };
    take(sums.phi, kGroups * 2048);
    take(sums.y, 2 * kGroups * chunks * 1024);
    take(sums.weights, kGroups * 1024);
    take(sums.z, chunks * 2048);
    take(sums.x, kTokens * row);
    take(sums.rows, kTokens * row);
    take(gradient.tiles, chunks * (chunks + 1) * 1024);
    take(gradient.phi, chunks * 1024);
    take(apply.phi[1], chunks * 1024);
    for (int i = 0; i < 2; ++i) take(gradient.c[i], 2 * chunks * 1024);
    for (int i = 0; i < 2; ++i) take(gradient.e[i], (chunks + 1) * 1024);
    take(gradient.exchanged, 2 * d.w() * chunks * 1024);
    take(gradient.m, p * sizeof(float));
    take(gradient.m_tiles, p * sizeof(float));
    take(gradient.bias, 2 * p * sizeof(float));
    take(gradient.x, 32 * row);
    take(gradient.y, kTokens * row);
    take(gradient.to, 16 * row);
    take(gradient.to_too, 16 * row);
    take(gradient.scaled, 2 * kTokens * row);
    apply.tiles = gradient.tiles, apply.phi[0] = gradient.phi;
    for (int i = 0; i < 2; ++i) apply.c[i] = gradient.e[i];
    apply.in = gradient.x, apply.out = gradient.to;
  }
};

int64_t scratch_floats(int64_t head_dim) {
  alignas(64) static float nothing[16];
  return with_dim(head_dim, [&](auto d) { return Scratch(d, nothing).bytes / 4; });
}

struct FloatArray {  // (no std::vector: what this file instantiates may be linked for all)
  float* p;
  explicit FloatArray(int64_t count) : p(new float[count]) {}
  ~FloatArray() { delete[] p; }
  FloatArray(const FloatArray&) = delete;
  FloatArray& operator=(const FloatArray&) = delete;
};

// ---- states --------------------------------------------------------------------------------------

void clear(int64_t head_dim, float* state) {
  with_dim(head_dim, [&](auto d) {
    const State to(d, state);
    *to.empty = 1, *to.centred = 0;
  });
}

// Zeros, if nothing has been summed.
template <class D>
void fill(const State<D>& state) {
  if (*state.empty == 0) return;
  __builtin_memset(state.S, 0, (state.d.s_floats() + 2 * state.d.padded()) * sizeof(float));
  *state.empty = 0;
}

void add(int64_t head_dim, int64_t partials, int64_t stride, float* first) {
  with_dim(head_dim, [&](auto d) {
    const State state(d, first);
    fill(state);
    for (int64_t i = 1; i < partials; ++i) {
      const State other(d, first + i * stride);
      if (*other.empty != 0) continue;
      if (*other.centred != *state.centred) settle(other), settle(state);
      for (float *to = state.S, *from = other.S; to < state.m; to += 16, from += 16) {
        store_wide(to, load_wide(to) + load_wide(from));
      }
    }
  });
}

// The tiles' sums need no help: 0 · NaN is NaN there. What others are given does.
void spread_nan(int64_t, float*) {}

// `count` floats and zeros.
INLINE Wide load_some(const float* from, int64_t count) {
  if (count >= 16) return load_wide(from);
  float some[16] = {};
  for (int64_t i = 0; i < count; ++i) some[i] = from[i];
  return load_wide(some);
}
INLINE void store_some(float* to, int64_t count, Wide x) {
  if (count >= 16) return store_wide(to, x);
  float some[16];
  store_wide(some, x);
  for (int64_t i = 0; i < count; ++i) to[i] = some[i];
}

void load_state(int64_t head_dim, const float* S, const float* z, float* data) {
  with_dim(head_dim, [&](auto d) {
    const State state(d, data);
    for (int row = 0; row < 2 * d.padded(); ++row) {
      const int sign = row / d.padded(), f = row % d.padded();
      const int64_t there = f < head_dim ? head_dim : 0;
      const float* from = S + (sign * head_dim + (there != 0 ? f : 0)) * head_dim;
      for (int h = 0; h < d.padded(); h += 32) {
        float* to = state.tile(f / 16, sign, h / 16) + f % 16 * 16;
        Wide x, y;
        to_tile_order(load_some(from + h, there - h), load_some(from + h + 16, there - h - 16), x, y);
        store_wide(to, x), store_wide(to + 256, y);
      }
      state.z[row] = there != 0 ? z[sign * head_dim + f] : 0.0f;
    }
    *state.empty = 0, *state.centred = 0;
  });
}

void store_state(int64_t head_dim, const float* data, float* S, float* z) {
  with_dim(head_dim, [&](auto d) {
    const State state(d, const_cast<float*>(data));
    for (int row = 0; row < 2 * head_dim; ++row) {
      const int sign = row >= head_dim, f = row - sign * (int)head_dim;
      for (int h = 0; h < head_dim; h += 32) {
        const float* from = state.tile(f / 16, sign, h / 16) + f % 16 * 16;
        float* to = S + row * head_dim + h;
        Wide a, b;
        const float* other = state.tile(f / 16, 1 - sign, h / 16) + f % 16 * 16;
        from_tile_order(load_wide(from) + 0.0f * load_wide(other),
                        load_wide(from + 256) + 0.0f * load_wide(other + 256), a, b);
        store_some(to, head_dim - h, a), store_some(to + 16, head_dim - h - 16, b);
      }
      const float other = state.z[(1 - sign) * d.padded() + f];
      z[row] = state.z[sign * d.padded() + f] + 0.0f * other - missing_in_z(state, sign, f);
    }
  });
}

// ---- what tiles are not for ----------------------------------------------------------------------

// Whether a row has something of size 2^-40 or more, or a NaN: almost always the first one has.
bool sizeable(int64_t head_dim, int64_t tokens, Rows rows) {
  for (int64_t n = 0; n < tokens; ++n) {
    const BF16* row = from(rows, n).p;
    int most = 0;
    for (int64_t i = 0; i < head_dim; ++i) most = (row[i] & 0x7fff) > most ? row[i] & 0x7fff : most;
    if (most >= (127 - 40) << 7) return true;
  }
  return false;
}
template <class D>
bool sizeable(const State<D>& state) {
  for (const float* x = state.S; x < state.z; ++x) {
    if (!(__builtin_fabsf(*x) < kSafe)) return true;
  }
  return false;
}

// A state of cpu_simd.cpp's, its scratch memory, and the way between.
struct Exact {
  int64_t head_dim;
  FloatArray state, scratch, dense;

  explicit Exact(int64_t d)
      : head_dim(d), state(exact.state_floats(d)), scratch(exact.scratch_floats(d) + 16),
        dense(2 * d * (d + 1)) {
    exact.clear(d, state.p);
  }
  float* z() const { return dense.p + 2 * head_dim * head_dim; }
  float* aligned() const {  // scratch, as its masks want it
    return (float*)(((uintptr_t)scratch.p + 63) / 64 * 64);
  }
  void load(const float* from) const {
    store_state(head_dim, from, dense.p, z());
    exact.load_state(head_dim, dense.p, z(), state.p);
  }
  void add_to(float* to) const {
    const int64_t floats = state_floats(head_dim);
    FloatArray both(2 * floats);
    exact.store_state(head_dim, state.p, dense.p, z());
    __builtin_memcpy(both.p, to, floats * sizeof(float));
    load_state(head_dim, dense.p, z(), both.p + floats);
    add(head_dim, 2, floats, both.p);
    __builtin_memcpy(to, both.p, floats * sizeof(float));
  }
};

// ---- what cpu.cpp calls --------------------------------------------------------------------------

void accumulate(ElementType element, int64_t head_dim, int64_t tokens, Rows k, Rows v, float* state,
                float* scratch) {
  if (!sizeable(head_dim, tokens, k) || !sizeable(head_dim, tokens, v)) {
    const Exact other(head_dim);
    exact.accumulate(element, head_dim, tokens, k, v, other.state.p, other.aligned());
    return other.add_to(state);
  }
  const Tiles tiles;
  with_dim(head_dim, [&](auto d) {
    sum_keys(d, head_dim, tokens, k, v, State(d, state), Scratch(d, scratch).sums);
  });
}

void apply(ElementType element, int64_t head_dim, int64_t tokens, Rows q, Rows out,
           const float* data, float eps, float* scratch) {
  const bool done = with_dim(head_dim, [&](auto d) {
    const State state(d, const_cast<float*>(data));
    const Scratch s(d, scratch);
    if (!sizeable(state)) return false;
    const Tiles tiles;
    state_tiles(d, state, s.apply.tiles);
    return apply_state(d, head_dim, tokens, q, out, eps, s.apply);
  });
  if (done) return;
  end_streams();
  const Exact other(head_dim);
  other.load(data);
  exact.apply(element, head_dim, tokens, q, out, other.state.p, eps, other.aligned());
}

void query_gradient(ElementType element, int64_t head_dim, int64_t tokens, Rows dout, Rows q,
                    Rows dq, const float* data, float eps, float* gradient, Sums wanted,
                    float* scratch) {
  const bool done = with_dim(head_dim, [&](auto d) {
    const State state(d, const_cast<float*>(data));
    const Scratch s(d, scratch);
    if (!sizeable(state) || !sizeable(head_dim, tokens, dout)) return false;
    if (!wanted.any()) {
      const Tiles tiles;
      return query_slopes(d, head_dim, tokens, dout, q, dq, state, eps, s.gradient);
    }
    const State sum(d, gradient);
    const int64_t floats = state_floats(head_dim);
    const bool first = *sum.empty != 0;
    const FloatArray before(first ? 1 : floats);  // for the case that this has to be done again
    if (!first) __builtin_memcpy(before.p, gradient, floats * sizeof(float));
    const Tiles tiles;
    if (query_gradients(d, head_dim, tokens, dout, q, dq, state, eps, sum, wanted, s.gradient,
                        s.sums)) {
      return true;
    }
    if (!first) __builtin_memcpy(gradient, before.p, floats * sizeof(float));
    if (first) *sum.empty = 1, *sum.centred = 0;
    return false;
  });
  if (done) return;
  end_streams();
  const Exact values(head_dim), sums(head_dim);
  values.load(data);
  exact.query_gradient(element, head_dim, tokens, dout, q, dq, values.state.p, eps, sums.state.p,
                       wanted, values.aligned());
  if (wanted.any()) sums.add_to(gradient);
}

void key_gradient(ElementType element, int64_t head_dim, int64_t tokens, Rows k, Rows v, Rows dk,
                  Rows dv, const float* data, float* scratch) {
  const bool done = with_dim(head_dim, [&](auto d) {
    const State gradient(d, const_cast<float*>(data));
    if (!sizeable(gradient) || !sizeable(head_dim, tokens, k) || !sizeable(head_dim, tokens, v)) {
      return false;
    }
    const Tiles tiles;
    key_gradients(d, head_dim, tokens, k, v, dk, dv, gradient, Scratch(d, scratch).gradient);
    return true;
  });
  if (done) return;
  const Exact other(head_dim);
  other.load(data);
  exact.key_gradient(element, head_dim, tokens, k, v, dk, dv, other.state.p, other.aligned());
}

double probe(Probe kind, int64_t repeats, float* scratch) {
  return exact.probe(kind, repeats, scratch);
}

}  // namespace

bool linear_attention_amx_allowed() {
  static const bool allowed = tiles_allowed();  // asked for once a process
  return allowed;
}

extern const LinearAttentionKernels linear_attention_amx = {
    "AMX",      state_floats, scratch_floats, clear,          accumulate,   add,   spread_nan,
    load_state, store_state,  apply,          query_gradient, key_gradient, probe,
};
