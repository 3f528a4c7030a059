// Linear attention for the CPU: the arithmetic, on ranges of one head's tokens.
//
// Each feature of φ is zero for half of the tokens: a key adds |k_f| v to one of two rows of S, a
// query reads one of two. So S is held as rows [feature][sign][D], and the sums are
//
//   accumulate   S[f][sign of k_f] += k_f v          2·D² FLOP a token where φ written out costs 4·D²
//   gather       out += q_f S[f][sign of q_f]        the same
//   dots         a_f = S[f][sign of q_f] · g         the same, and sums across lanes
//
// with the rows (and z) of negative features negated, so that no product needs a magnitude and a_f
// is what dq_f needs, its sign included. Forward is the first two; dq and dS the third and the
// first; dk and dv (fused: both read the same row of dS) the third and the second. φ is never in
// memory.
//
// Blocks of 64 tokens are converted to float32 scratch, with the signs as bit masks. `gather` and
// `dots` load the row that a sign bit addresses: no branch, 5 loads for 4 FMAs (gather), so load
// ports are the limit. `accumulate` holds two features' sums in registers and visits the tokens of
// each pair of signs in turn, as the masks list them: 6 loads for 8 FMAs, and a mispredicted branch
// at the end of each list, which is what keeps it from the FMA rate. Lists of four features at a
// time (half the loads, a quarter of the tokens each) or of blocks of 128 and 256 tokens (longer, but
// v leaves the L1 cache) came out no faster, nor did all of the work as a matrix product, φ written
// out and a tile of it in registers: slower forward, about level backward. S is 2·D² floats; 16 KB of
// it at a time are in the L1 cache while 64 tokens go by, and the rows of the next 64 are prefetched
// meanwhile.
//
// Sums over tokens have two levels, 64 tokens in registers and then the state, and the caller adds a
// third (partial states).
#include "cpu.h"

#include "../cpu/simd.h"

namespace {

// ---- where things are ----------------------------------------------------------------------------

// Three vectors a piece are for head dim 48 of 16 lanes; of fewer lanes two or four fit as well.
constexpr bool kThree = kLanes == 16;

// A row of S or v is `chunks` pieces of `width` vectors. Pieces lie apart (all first pieces of a
// block or a state, then all second ones), so that strides inside one are known to the compiler.
struct Shape {
  int64_t head_dim;
  int64_t features;  // head_dim rounded up to 16; those past head_dim are zero
  int width;
  int64_t chunks;

  explicit Shape(int64_t d) : head_dim(d), features((d + 15) / 16 * 16), width(1) {
    const int64_t vectors = (d + kLanes - 1) / kLanes;
    int64_t least = INT64_MAX;
    for (int w = vectors < 4 ? (int)vectors : 4; w >= (vectors > 1 ? 2 : 1); --w) {
      if (w == 3 && !kThree) continue;
      const int64_t padded = (vectors + w - 1) / w * w;
      if (padded < least) least = padded, width = w;
    }
    chunks = (vectors + width - 1) / width;
  }

  int64_t piece() const { return width * kLanes; }  // floats
  int64_t row() const { return chunks * piece(); }
  int64_t s_floats() const { return 2 * features * row(); }
  int64_t floats() const { return s_floats() + 2 * features; }  // and z [sign][feature]
};

// Tokens of a block that are worked on: some steps take several at a time, so that a few past the last
// one have to be there, as zeros.
INLINE int64_t whole(int64_t tokens) { return (tokens + 15) / 16 * 16; }

// Scratch of one block: k or q; v or dout; what gather and dots make of them.
struct Block {
  int64_t words;    // of 64 features
  uint64_t* signs;  // [64][words]: bit f % 64 of word f / 64
  uint64_t* masks;  // [features]: bit n
  float* x;         // [64][features]
  float* dots;      // [64][features]
  float* rows;      // [chunk][64][piece]
  float* sums;      // [chunk][64][piece]

  Block(const Shape& s, float* scratch) : words((s.features + 63) / 64) {
    signs = (uint64_t*)scratch;
    masks = signs + kBlock * words;
    x = (float*)(masks + 64 * words);
    dots = x + kBlock * s.features;
    rows = dots + kBlock * s.features;
    sums = rows + kBlock * s.row();
  }

  // For the address sanitizer: of arrays by token, what lies past the block's tokens is not there.
  void only(const Shape& s, int64_t tokens) const {
    const int64_t n = whole(tokens), piece = s.piece();
    hide(signs, n * words, kBlock * words);
    hide(x, n * s.features, kBlock * s.features);
    hide(dots, n * s.features, kBlock * s.features);
    for (int64_t c = 0; c < s.chunks; ++c) {
      hide(rows + c * kBlock * piece, tokens * piece, kBlock * piece);
      hide(sums + c * kBlock * piece, n * piece, kBlock * piece);
    }
  }
};

int64_t state_floats(int64_t head_dim) { return Shape(head_dim).floats(); }

int64_t scratch_floats(int64_t head_dim) {
  const Shape s(head_dim);
  return 4 * kBlock * ((s.features + 63) / 64) + 2 * kBlock * (s.features + s.row());
}

template <typename Element>
INLINE Element* row_of(Rows rows, int64_t token) {
  return (Element*)rows.data + token * rows.stride;
}

INLINE Rows from_row(ElementType element, Rows rows, int64_t token) {
  const int64_t size = element == kFloat32 ? 4 : 2;
  return {(char*)rows.data + token * rows.stride * size, rows.stride};
}

// The rows of the block to come, brought near while this one is worked on: the block's own loads come
// in bursts, between which memory would have nothing to do.
struct Ahead {
  const char* first;
  int64_t stride, bytes, tokens;

  Ahead(ElementType element, int64_t head_dim, Rows rows, int64_t next, int64_t end)
      : first((const char*)from_row(element, rows, next).data),
        stride(rows.stride * (element == kFloat32 ? 4 : 2)),
        bytes(head_dim * (element == kFloat32 ? 4 : 2)),
        tokens(end - next < kBlock ? end - next : kBlock) {}

  // The i-th of `of` equal shares.
  INLINE void fetch(int64_t i, int64_t of) const {
    for (int64_t n = kBlock * i / of; n < kBlock * (i + 1) / of && n < tokens; ++n) {
      for (int64_t at = 0; at < bytes; at += 64) __builtin_prefetch(first + n * stride + at, 0, 2);
    }
  }
};

// function(an Element)
template <typename Function>
INLINE void with_element(ElementType element, const Function& function) {
  if (element == kFloat32) return function(float{});
  if (element == kFloat16) return function(Float16{});
  return function(BFloat16{});
}

// function(std::integral_constant<int, width>)
template <typename Function>
INLINE void with_width(const Shape& s, const Function& function) {
  if (s.width == 4) return function(std::integral_constant<int, 4>());
  if constexpr (kThree) {
    if (s.width == 3) return function(std::integral_constant<int, 3>());
  }
  if (s.width == 2) return function(std::integral_constant<int, 2>());
  return function(std::integral_constant<int, 1>());
}

// ---- a block in and out of scratch ---------------------------------------------------------------

template <typename Element>
void load_signed(const Shape& s, int64_t tokens, Rows x, const Block& b) {
  b.only(s, tokens);
  for (int64_t n = 0; n < tokens; ++n) {
    float* values = b.x + n * s.features;
    load_row(row_of<const Element>(x, n), s.head_dim, values, s.features);
    for (int64_t word = 0; word < b.words; ++word) b.signs[n * b.words + word] = 0;
    for (int64_t f = 0; f < s.features; f += kLanes) {
      b.signs[n * b.words + f / 64] |= (uint64_t)sign_bits(load(values + f)) << (f % 64);
    }
  }
  const int64_t past = whole(tokens) - tokens;
  __builtin_memset(b.x + tokens * s.features, 0, past * s.features * sizeof(float));
  __builtin_memset(b.signs + tokens * b.words, 0, past * b.words * sizeof(uint64_t));
}

template <typename Element>
void load_rows(const Shape& s, int64_t tokens, Rows x, float* rows) {
  const int64_t piece = s.piece();
  for (int64_t n = 0; n < tokens; ++n) {
    const Element* from = row_of<const Element>(x, n);
    for (int64_t c = 0; c < s.chunks; ++c) {
      const int64_t left = s.head_dim - c * piece;
      load_row(from + c * piece, left < piece ? left : piece, rows + (c * kBlock + n) * piece,
               piece);
    }
  }
}

template <typename Element>
void store_rows(const Shape& s, int64_t tokens, const float* rows, Rows to) {
  const int64_t piece = s.piece();
  for (int64_t n = 0; n < tokens; ++n) {
    for (int64_t c = 0; c < s.chunks; ++c) {
      const int64_t left = s.head_dim - c * piece;
      store_row(row_of<Element>(to, n) + c * piece, left < piece ? left : piece,
                rows + (c * kBlock + n) * piece);
    }
  }
}

// rows_n *= scale_n
void scale_rows(const Shape& s, int64_t tokens, const float* scale, float* rows) {
  const int64_t piece = s.piece();
  for (int64_t c = 0; c < s.chunks; ++c) {
    for (int64_t n = 0; n < tokens; ++n) {
      float* row = rows + (c * kBlock + n) * piece;
      for (int64_t i = 0; i < piece; i += kLanes) store(row + i, load(row + i) * scale[n]);
    }
  }
}

// 64×64 bits: bit n of out[f] is bit f of token n's word (Warren, Hacker's Delight, 7-3).
void transpose_bits(const uint64_t* in, int64_t stride, int64_t tokens, uint64_t* out) {
  for (int64_t n = 0; n < 64; ++n) out[n] = n < tokens ? in[n * stride] : 0;
  uint64_t mask = 0xffffffff;
  for (int width = 32; width > 0; width /= 2, mask ^= mask << width) {
    for (int base = 0; base < 64; base += 2 * width) {
      for (int i = base; i < base + width; ++i) {
        const uint64_t swap = ((out[i] >> width) ^ out[i + width]) & mask;
        out[i + width] ^= swap;
        out[i] ^= swap << width;
      }
    }
  }
}

// z of x's sign.
INLINE Floats signed_z(const Shape& s, const float* z, int64_t f, Floats x) {
  return where_negative(x, load(z + s.features + f), load(z + f));
}

// 1 / (φ(q)·z + eps), 0 for 1 / 0; of whole vectors of tokens, those past the last are zeros' own.
void invert_normalisers(const Shape& s, int64_t tokens, const Block& b, const float* z, float eps,
                        float* inverse) {
  for (int64_t n = 0; n < tokens; n += kLanes) {
    const Floats normaliser = eps + sums_across([&](int j) INLINE_LAMBDA {
      Floats total = {};
      for (int64_t f = 0; f < s.features; f += kLanes) {
        const Floats q = load(b.x + (n + j) * s.features + f);
        total += q * signed_z(s, z, f, q);
      }
      return total;
    });
    store(inverse + n, where_zero(normaliser, Floats{}, 1.0f / normaliser));
  }
}

// z[sign of x][f] += scale_n · x_nf over the block's tokens; without scales, of 1.
void accumulate_z(const Shape& s, int64_t tokens, const Block& b, const float* scale, float* z) {
  for (int64_t f = 0; f < s.features; f += kLanes) {
    Floats positive = {}, negative = {};
    for (int64_t n = 0; n < tokens; ++n) {
      const Floats x = load(b.x + n * s.features + f);
      const Floats value = scale == nullptr ? x : x * scale[n];
      positive += where_negative(x, Floats{}, value);
      negative += where_negative(x, value, Floats{});
    }
    store(z + f, load(z + f) + positive);
    store(z + s.features + f, load(z + s.features + f) + negative);
  }
}

// ---- the three products --------------------------------------------------------------------------

// Two features' sums over the tokens that the bits of `listed` name.
template <int kWidth>
INLINE void add_listed(uint64_t listed, const float* x, int64_t features, const float* rows,
                       Floats (&first)[kWidth], Floats (&second)[kWidth]) {
  for (; listed != 0; listed &= listed - 1) {
    const int64_t n = __builtin_ctzll(listed);
    const float a = x[n * features], b = x[n * features + 1];
    const float* row = rows + n * kWidth * kLanes;
    for (int w = 0; w < kWidth; ++w) {
      Floats value = load(row + w * kLanes);
      keep(value);
      first[w] += a * value;
      second[w] += b * value;
    }
  }
}

template <int kWidth>
INLINE void flush(Floats (&sums)[kWidth], float* row) {
  for (int w = 0; w < kWidth; ++w) {
    store(row + w * kLanes, load(row + w * kLanes) + sums[w]);
    sums[w] = Floats{};
  }
}

// S[f][sign] += Σₙ x_nf rows_n, the sum over the tokens of that sign.
void accumulate_block(const Shape& s, int64_t tokens, const Block& b, float* S_all,
                      const Ahead& ahead, const Ahead& ahead_too) {
  for (int64_t word = 0; word < b.words; ++word) {
    transpose_bits(b.signs + word, b.words, tokens, b.masks + 64 * word);
  }
  const uint64_t all = tokens == 64 ? ~0ull : (1ull << tokens) - 1;
  with_width(s, [&](auto width) {
    constexpr int kWidth = width;
    constexpr int64_t kPiece = kWidth * kLanes;
    for (int64_t c = 0; c < s.chunks; ++c) {
      const float* rows = b.rows + c * kBlock * kPiece;
      float* S = S_all + c * 2 * s.features * kPiece;
      for (int64_t f = 0; f < s.head_dim; f += 2) {
        if (c == 0) {
          ahead.fetch(f / 2, (s.head_dim + 1) / 2);
          ahead_too.fetch(f / 2, (s.head_dim + 1) / 2);
        }
        const uint64_t negative = b.masks[f], negative_next = b.masks[f + 1];
        float* row = S + 2 * kPiece * f;
        float* next = row + 2 * kPiece;
        Floats sums[kWidth] = {}, sums_next[kWidth] = {};
        const auto add = [&](uint64_t listed) INLINE_LAMBDA {
          add_listed<kWidth>(listed & all, b.x + f, s.features, rows, sums, sums_next);
        };
        // From one list to the next one sign changes, so one row is written.
        add(~negative & ~negative_next);
        flush(sums_next, next);
        add(~negative & negative_next);
        flush(sums, row);
        add(negative & negative_next);
        flush(sums_next, next + kPiece);
        add(negative & ~negative_next);
        flush(sums, row + kPiece);
        flush(sums_next, next);
      }
    }
  });
}

// Features whose rows of one piece fit half of a 32 KB L1 cache.
template <int kWidth>
constexpr int64_t kFeatures = 2048 / (16 * kWidth * kLanes) * 16;

// The j-th feature's row, from S on, of the sign that bit j tells.
template <int kPiece>
INLINE const float* signed_row(const float* S, int j, uint32_t signs) {
  constexpr uint32_t kBytes = kPiece * sizeof(float);
  uint32_t offset;
  if constexpr ((kBytes & (kBytes - 1)) == 0) {  // the bit turned to where it is worth a row's bytes
    constexpr int kPlace = __builtin_ctz(kBytes);
    offset = ((signs >> ((j - kPlace) & 31)) | (signs << ((kPlace - j) & 31))) & kBytes;
  } else {
    offset = -((signs >> j) & 1) & kBytes;
  }
  const char* row = (const char*)S + offset;
  asm("" : "+r"(row));  // one register and a constant: indexed loads don't fuse with their FMA
  return (const float*)row + 2 * kPiece * j;
}

INLINE uint32_t signs_from(const Block& b, int64_t n, int64_t f) {
  return (uint32_t)(b.signs[n * b.words + f / 64] >> (f % 64));
}

// sums_n (+)= Σ_f x_nf S[f][sign] for kTokens tokens, features from `first` to `last`.
template <int kWidth, int kTokens>
INLINE void gather_tokens(const Shape& s, int64_t n, const Block& b, const float* S, int64_t first,
                          int64_t last, float* sums) {
  constexpr int kPiece = kWidth * kLanes;
  Floats total[kTokens][kWidth];
  for (int t = 0; t < kTokens; ++t) {
    for (int w = 0; w < kWidth; ++w) {
      total[t][w] = first == 0 ? Floats{} : load(sums + (n + t) * kPiece + w * kLanes);
    }
  }
  for (int64_t f = first; f < last; f += 16) {
    uint32_t signs[kTokens];
    for (int t = 0; t < kTokens; ++t) signs[t] = signs_from(b, n + t, f);
#pragma GCC unroll 16
    for (int j = 0; j < 16; ++j) {
      for (int t = 0; t < kTokens; ++t) {
        const float* row = signed_row<kPiece>(S + 2 * kPiece * f, j, signs[t]);
        const float x = b.x[(n + t) * s.features + f + j];
        for (int w = 0; w < kWidth; ++w) total[t][w] += x * load(row + w * kLanes);
      }
    }
  }
  for (int t = 0; t < kTokens; ++t) {
    for (int w = 0; w < kWidth; ++w) store(sums + (n + t) * kPiece + w * kLanes, total[t][w]);
  }
}

// b.sums_n = Σ_f x_nf S[f][sign], for whole groups of tokens: those past the last are zeros.
void gather_block(const Shape& s, int64_t tokens, const Block& b, const float* S_all,
                  const Ahead& ahead) {
  with_width(s, [&](auto width) {
    constexpr int kWidth = width;
    constexpr int kTokens = kWidth >= 3 ? 2 : 8 / kWidth;  // 6 or 8 sums hide the FMA's latency
    constexpr int64_t kPiece = kWidth * kLanes;
    for (int64_t c = 0; c < s.chunks; ++c) {
      const float* S = S_all + c * 2 * s.features * kPiece;
      float* sums = b.sums + c * kBlock * kPiece;
      for (int64_t f = 0; f < s.features; f += kFeatures<kWidth>) {
        const int64_t end = f + kFeatures<kWidth>;
        const int64_t last = end < s.features ? end : s.features;
        for (int64_t n = 0; n < tokens; n += kTokens) {
          if (c == 0 && f == 0) ahead.fetch(n / kTokens, kBlock / kTokens);
          gather_tokens<kWidth, kTokens>(s, n, b, S, f, last, sums);
        }
      }
    }
  });
}

// b.dots_nf = S[f][sign] · rows_n; and where kGather, b.sums_n = Σ_f x_nf S[f][sign] on the way.
template <bool kGather>
void dots_block(const Shape& s, int64_t tokens, const Block& b, const float* S_all,
                const Ahead& ahead, const Ahead& ahead_too) {
  with_width(s, [&](auto width) {
    constexpr int kWidth = width;
    constexpr int64_t kPiece = kWidth * kLanes;
    for (int64_t c = 0; c < s.chunks; ++c) {
      const float* S = S_all + c * 2 * s.features * kPiece;
      for (int64_t first = 0; first < s.features; first += kFeatures<kWidth>) {
        const int64_t end = first + kFeatures<kWidth>;
        const int64_t last = end < s.features ? end : s.features;
        for (int64_t n = 0; n < tokens; ++n) {
          if (c == 0 && first == 0) {
            ahead.fetch(n, kBlock);
            ahead_too.fetch(n, kBlock);
          }
          const float* values = b.rows + (c * kBlock + n) * kPiece;
          float* sums_n = b.sums + (c * kBlock + n) * kPiece;
          Floats value[kWidth], total[kWidth];
          for (int w = 0; w < kWidth; ++w) {
            value[w] = load(values + w * kLanes);
            total[w] = first == 0 || !kGather ? Floats{} : load(sums_n + w * kLanes);
          }
          for (int64_t f = first; f < last; f += kLanes) {
            const uint32_t signs = signs_from(b, n, f);
            const float* x = b.x + n * s.features + f;
            float* dots = b.dots + n * s.features + f;
            const Floats dot = sums_across([&](int j) INLINE_LAMBDA {
              const float* row = signed_row<kPiece>(S + 2 * kPiece * f, j, signs);
              Floats lanes = {};
              for (int w = 0; w < kWidth; ++w) {
                Floats part = load(row + w * kLanes);
                if (kGather) keep(part);
                lanes = w == 0 ? part * value[w] : lanes + part * value[w];
                if (kGather) total[w] += x[j] * part;
              }
              return lanes;
            });
            store(dots, c == 0 ? dot : load(dots) + dot);
          }
          for (int w = 0; kGather && w < kWidth; ++w) store(sums_n + w * kLanes, total[w]);
        }
      }
    }
  });
}

// ---- what cpu.cpp calls --------------------------------------------------------------------------

// function(first token, count, an Element) for each block, whose scratch is b's.
template <typename Function>
INLINE void for_blocks(ElementType element, int64_t tokens, const Shape& s, const Block& b,
                       const Function& function) {
  with_element(element, [&](auto example) {
    for (int64_t n = 0; n < tokens; n += kBlock) {
      function(n, tokens - n < kBlock ? tokens - n : kBlock, example);
    }
  });
  b.only(s, kBlock);  // all of it is there for others
}

void accumulate(ElementType element, int64_t head_dim, int64_t tokens, Rows k, Rows v,
                float* state, float* scratch) {
  const Shape s(head_dim);
  const Block b(s, scratch);
  for_blocks(element, tokens, s, b, [&](int64_t n, int64_t count, auto example) {
    using Element = decltype(example);
    load_signed<Element>(s, count, from_row(element, k, n), b);
    load_rows<Element>(s, count, from_row(element, v, n), b.rows);
    const Ahead next_k(element, head_dim, k, n + count, tokens);
    const Ahead next_v(element, head_dim, v, n + count, tokens);
    accumulate_block(s, count, b, state, next_k, next_v);
    accumulate_z(s, count, b, nullptr, state + s.s_floats());
  });
}

void add(int64_t head_dim, int64_t partials, int64_t stride, float* state) {
  const int64_t floats = state_floats(head_dim);
  for (int64_t p = 1; p < partials; ++p) {
    const float* other = state + p * stride;
    for (int64_t i = 0; i < floats; i += kLanes) store(state + i, load(state + i) + load(other + i));
  }
}

void spread_nan(int64_t head_dim, float* state) {
  const Shape s(head_dim);
  const auto spread = [](float* one, float* other, int64_t count) {
    for (int64_t i = 0; i < count; i += kLanes) {
      const Floats a = load(one + i), b = load(other + i);
      store(one + i, a + 0.0f * b);
      store(other + i, b + 0.0f * a);
    }
  };
  const int64_t piece = s.piece();
  for (float* row = state; row < state + s.s_floats(); row += 2 * piece) {
    spread(row, row + piece, piece);
  }
  spread(state + s.s_floats(), state + s.s_floats() + s.features, s.features);
}

// to = ±from, and zeros.
INLINE void load_signed_row(const float* from, int64_t count, float sign, float* to,
                            int64_t padded) {
  load_row(from, count, to, padded);
  for (int64_t i = 0; i < padded; i += kLanes) store(to + i, load(to + i) * sign);
}

void load_state(int64_t head_dim, const float* S, const float* z, float* state) {
  const Shape s(head_dim);
  const int64_t piece = s.piece();
  for (int64_t c = 0; c < s.chunks; ++c) {
    const int64_t left = head_dim - c * piece, count = left < piece ? left : piece;
    for (int64_t f = 0; f < s.features; ++f) {
      for (int sign = 0; sign < 2; ++sign, state += piece) {
        const float* row = S + (sign * head_dim + (f < head_dim ? f : 0)) * head_dim + c * piece;
        load_signed_row(row, f < head_dim ? count : 0, sign ? -1.0f : 1.0f, state, piece);
      }
    }
  }
  load_signed_row(z, head_dim, 1.0f, state, s.features);
  load_signed_row(z + head_dim, head_dim, -1.0f, state + s.features, s.features);
}

void store_state(int64_t head_dim, const float* state, float* S, float* z) {
  const Shape s(head_dim);
  const int64_t piece = s.piece();
  for (int64_t c = 0; c < s.chunks; ++c) {
    const int64_t left = head_dim - c * piece, count = left < piece ? left : piece;
    for (int64_t f = 0; f < s.features; ++f) {
      for (int sign = 0; sign < 2; ++sign, state += piece) {
        float* row = S + (sign * head_dim + f) * head_dim + c * piece;
        for (int64_t i = 0; f < head_dim && i < count; ++i) row[i] = sign ? 0.0f - state[i] : state[i];
      }
    }
  }
  for (int64_t f = 0; f < head_dim; ++f) {
    z[f] = state[f];
    z[head_dim + f] = 0.0f - state[s.features + f];  // not −0 where there is nothing
  }
}

void apply(ElementType element, int64_t head_dim, int64_t tokens, Rows q, Rows out,
           const float* state, float eps, float* scratch) {
  const Shape s(head_dim);
  const Block b(s, scratch);
  for_blocks(element, tokens, s, b, [&](int64_t n, int64_t count, auto example) {
    using Element = decltype(example);
    float inverse[kBlock];
    load_signed<Element>(s, count, from_row(element, q, n), b);
    invert_normalisers(s, count, b, state + s.s_floats(), eps, inverse);
    gather_block(s, count, b, state, Ahead(element, head_dim, q, n + count, tokens));
    scale_rows(s, count, inverse, b.sums);
    store_rows<Element>(s, count, b.sums, from_row(element, out, n));
  });
}

void query_gradient(ElementType element, int64_t head_dim, int64_t tokens, Rows dout, Rows q,
                    Rows dq, const float* state, float eps, float* gradient, float* scratch) {
  const Shape s(head_dim);
  const Block b(s, scratch);
  const float* z = state + s.s_floats();
  for_blocks(element, tokens, s, b, [&](int64_t n, int64_t count, auto example) {
    using Element = decltype(example);
    float inverse[kBlock], weight[kBlock];
    load_signed<Element>(s, count, from_row(element, q, n), b);
    load_rows<Element>(s, count, from_row(element, dout, n), b.rows);
    invert_normalisers(s, count, b, z, eps, inverse);
    const Ahead next_q(element, head_dim, q, n + count, tokens);
    const Ahead next_dout(element, head_dim, dout, n + count, tokens);
    dots_block<false>(s, count, b, state, next_q, next_dout);
    for (int64_t i = 0; i < count; ++i) {
      const float* x = b.x + i * s.features;
      float* dots = b.dots + i * s.features;
      Floats total = {};
      for (int64_t f = 0; f < s.features; f += kLanes) total += load(x + f) * load(dots + f);
      const float pull = sum(total) * inverse[i] * inverse[i];  // φ(q)·a / E²
      for (int64_t f = 0; f < s.features; f += kLanes) {
        const Floats value = load(x + f);
        const Floats slope = load(dots + f) * inverse[i] - pull * signed_z(s, z, f, value);
        store(dots + f, where_zero(value, Floats{}, slope));
      }
      weight[i] = -pull;
      store_row(row_of<Element>(dq, n + i), s.head_dim, dots);
    }
    scale_rows(s, count, inverse, b.rows);
    const Ahead none(element, head_dim, q, 0, 0);  // dots_block has fetched it
    accumulate_block(s, count, b, gradient, none, none);
    accumulate_z(s, count, b, weight, gradient + s.s_floats());
  });
}

void key_gradient(ElementType element, int64_t head_dim, int64_t tokens, Rows k, Rows v, Rows dk,
                  Rows dv, const float* gradient, float* scratch) {
  const Shape s(head_dim);
  const Block b(s, scratch);
  const float* dz = gradient + s.s_floats();
  for_blocks(element, tokens, s, b, [&](int64_t n, int64_t count, auto example) {
    using Element = decltype(example);
    load_signed<Element>(s, count, from_row(element, k, n), b);
    load_rows<Element>(s, count, from_row(element, v, n), b.rows);
    const Ahead next_k(element, head_dim, k, n + count, tokens);
    const Ahead next_v(element, head_dim, v, n + count, tokens);
    dots_block<true>(s, count, b, gradient, next_k, next_v);
    for (int64_t i = 0; i < count; ++i) {
      float* dots = b.dots + i * s.features;
      for (int64_t f = 0; f < s.features; f += kLanes) {
        const Floats value = load(b.x + i * s.features + f);
        const Floats slope = load(dots + f) + signed_z(s, dz, f, value);
        store(dots + f, where_zero(value, Floats{}, slope));
      }
      store_row(row_of<Element>(dk, n + i), s.head_dim, dots);
    }
    store_rows<Element>(s, count, b.sums, from_row(element, dv, n));
  });
}

double probe(bool loading, int64_t repeats, float* scratch) {
  constexpr int kChains = 10;  // two FMAs a cycle, four or five cycles each
  const auto run = [&](auto load_too) INLINE_LAMBDA {
    Floats sums[kChains] = {}, x = load(scratch);
    for (int64_t i = 0; i < repeats; ++i) {
#pragma GCC unroll 10
      for (int j = 0; j < kChains; ++j) {
        if (load_too) sums[j] += x * load(scratch + j * kLanes);
        if (!load_too) sums[j] = sums[j] * x + x;
        keep(sums[j]);  // or the compiler sees that all chains are one
      }
      asm volatile("" : : : "memory");  // and loads each time
    }
#pragma GCC unroll 10
    for (int j = 0; j < kChains; ++j) store(scratch + j * kLanes, sums[j]);
  };
  __builtin_memset(scratch, 0, kChains * sizeof(Floats));
  if (loading) {
    run(std::true_type());
  } else {
    run(std::false_type());
  }
  return 2.0 * kChains * kLanes * repeats;
}

}  // namespace

#if defined(LINEAR_VIT_AVX512)
extern const LinearAttentionKernels linear_attention_avx512 = {
    "AVX-512",
#elif defined(LINEAR_VIT_AVX2)
extern const LinearAttentionKernels linear_attention_avx2 = {
    "AVX2",
#else
extern const LinearAttentionKernels linear_attention_portable = {
    "portable code",
#endif
    state_floats, scratch_floats, accumulate,     add,          spread_nan, load_state,
    store_state,  apply,          query_gradient, key_gradient, probe,
};
