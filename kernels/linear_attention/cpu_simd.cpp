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
// Blocks of 64 tokens are read where they are, or converted to float32 scratch; their signs become
// bit masks. `gather` and `dots` load the row that a sign bit addresses: no branch, and per row of
// four vectors 4 loads (with AVX-512 the q_f come from a register by a shuffle: a fifth load costs a
// tenth), 4 FMAs and 8 instructions in all. `accumulate` holds two features' sums in registers and
// visits the tokens of each pair of signs in turn, as the masks list them: 6 loads, 8 FMAs, 18
// instructions, and a mispredicted branch at the end of each list. So a core that can start four
// instructions in a cycle, two of them FMAs, has none to spare for what comes on top: the ends of
// lists, a tenth to a seventh of the time, and waiting for tensors that are not in a cache.
//
// No faster: lists of four features at a time (28 instructions for 16 FMAs, and four times as many
// lists), of blocks of 128 and 256 tokens (v leaves the L1 cache), of offsets written out beforehand;
// both signs of one feature at once; all of the work as a matrix product, φ written out and a tile of
// it in registers. S is 2·D² floats; 16 KB of it at a time are in the L1 cache while 64 tokens go by,
// and the rows of the next 64 are prefetched meanwhile.
//
// Sums over tokens have two levels, 64 tokens in registers and then the state, and the caller adds a
// third (partial states).
#include "cpu.h"

#include "../cpu/simd.h"

namespace {

// ---- where things are ----------------------------------------------------------------------------

// A row of S, of x (q or k) or of v is `chunks` pieces of `width` vectors, of 16, 32, 48 or 64
// floats. Pieces lie apart (all first pieces of a block or a state, then all second ones), so that
// strides inside one are known to the compiler, and the same for x and v. kWidths: which there are.
constexpr bool kWidths[] = {false, kLanes == 16, kLanes >= 8, kLanes == 16, true};

struct Shape {
  int64_t head_dim;
  int width;
  int64_t chunks;
  int64_t features;  // head_dim rounded up to whole pieces, and a row's floats; past head_dim are zeros

  explicit Shape(int64_t d) : head_dim(d), width(4) {
    const int64_t vectors = (d + 15) / 16 * 16 / kLanes;
    int64_t least = INT64_MAX;
    for (int w = 4; w >= (vectors > 1 ? 2 : 1); --w) {
      const int64_t padded = (vectors + w - 1) / w * w;
      if (kWidths[w] && padded < least) least = padded, width = w;
    }
    chunks = (vectors + width - 1) / width;
    features = chunks * piece();
  }

  int64_t piece() const { return width * kLanes; }  // floats
  int64_t s_floats() const { return 2 * features * features; }
  int64_t floats() const { return s_floats() + 2 * features; }  // and z [sign][feature]
};

// Tokens of a block that are worked on: some steps take several at a time, so that a few past the last
// one have to be there, as zeros.
INLINE int64_t whole(int64_t tokens) { return (tokens + 15) / 16 * 16; }

// Scratch of one block: k or q; v or dout; what gather and dots make of them. Where a caller's rows
// lie as x, rows or sums would (see in_place), they are used instead.
struct Block {
  uint64_t* masks;  // [features, at least 64]: bit n
  uint16_t* signs;  // [features / 16][64]: bit f % 16
  float* x;         // [chunk][64][piece]
  float* rows;      // [chunk][64][piece]
  float* sums;      // [chunk][64][piece]
  float* dots;      // [chunk][64][piece]

  Block(const Shape& s, float* scratch) {
    const int64_t bits = (s.features + 63) / 64 * 64, floats = kBlock * s.features;
    masks = (uint64_t*)scratch;
    signs = (uint16_t*)(masks + bits);
    x = (float*)(signs + bits / 16 * kBlock);
    rows = x + floats;
    sums = rows + floats;
    dots = sums + floats;
  }

  // For the address sanitizer: of arrays by token, what lies past the block's tokens is not there.
  void only(const Shape& s, int64_t tokens) const {
    const int64_t n = whole(tokens), piece = s.piece();
    for (int64_t f = 0; f < s.features; f += 16) hide(signs + f / 16 * kBlock, n, kBlock);
    for (int64_t c = 0; c < s.chunks; ++c) {
      hide(x + c * kBlock * piece, n * piece, kBlock * piece);
      hide(rows + c * kBlock * piece, tokens * piece, kBlock * piece);
      hide(sums + c * kBlock * piece, n * piece, kBlock * piece);
      hide(dots + c * kBlock * piece, n * piece, kBlock * piece);
    }
  }
};

int64_t state_floats(int64_t head_dim) { return Shape(head_dim).floats(); }

int64_t scratch_floats(int64_t head_dim) {
  const Shape s(head_dim);
  return (s.features + 63) / 64 * 256 + 4 * kBlock * s.features;
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

  INLINE void fetch(int64_t first_token, int64_t count) const {
    for (int64_t n = first_token; n < first_token + count && n < tokens; ++n) {
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
template <int kWidth = 4, typename Function>
INLINE void with_width(const Shape& s, const Function& function) {
  if constexpr (kWidth > 0) {
    if constexpr (kWidths[kWidth]) {
      if (s.width == kWidth) return function(std::integral_constant<int, kWidth>());
    }
    with_width<kWidth - 1>(s, function);
  }
}

// ---- a block in and out of scratch ---------------------------------------------------------------

// Whether a block's rows can be read or written where they are: a copy costs as much as a tenth of a
// product. Not so with rows apart, as of a packed qkv: few sets of the cache would hold them all.
template <typename Element>
INLINE bool in_place(const Shape& s, int64_t tokens, Rows rows) {
  return std::is_same_v<Element, float> && tokens == kBlock && s.chunks == 1 &&
         s.head_dim == s.features && rows.stride == s.head_dim &&
         (uintptr_t)rows.data % sizeof(Floats) == 0;
}

// Rows as floats, in pieces: those of x or, copied, scratch.
template <typename Element>
const float* load_rows(const Shape& s, int64_t tokens, Rows x, float* scratch) {
  if (in_place<Element>(s, tokens, x)) return (const float*)x.data;
  with_width(s, [&](auto width) {
    constexpr int64_t kPiece = width * kLanes;
    for (int64_t c = 0; c < s.chunks; ++c) {
      const int64_t left = s.head_dim - c * kPiece;
      for (int64_t n = 0; n < tokens; ++n) {
        const Element* from = row_of<const Element>(x, n) + c * kPiece;
        float* to = scratch + (c * kBlock + n) * kPiece;
        if (left < kPiece) {
          load_row(from, left, to, kPiece);
          continue;
        }
        for (int64_t i = 0; i < kPiece; i += kLanes) store(to + i, load(from + i));
      }
    }
  });
  return scratch;
}

// x as load_rows has it, and its signs.
template <typename Element>
const float* load_signed(const Shape& s, int64_t tokens, Rows rows, const Block& b) {
  b.only(s, tokens);
  const float* x = load_rows<Element>(s, tokens, rows, b.x);
  const int64_t past = whole(tokens) - tokens;
  with_width(s, [&](auto width) {
    constexpr int kPiece = width * kLanes;
    for (int64_t c = 0; c < s.chunks; ++c) {
      uint16_t* signs = b.signs + c * kPiece / 16 * kBlock;
      for (int64_t n = 0; n < tokens; ++n) {
        for (int f = 0; f < kPiece; f += 16) {
          uint32_t bits = 0;
          for (int i = 0; i < 16; i += kLanes) {
            bits |= sign_bits(load(x + (c * kBlock + n) * kPiece + f + i)) << i;
          }
          signs[f / 16 * kBlock + n] = (uint16_t)bits;
        }
      }
      if (past == 0) continue;
      __builtin_memset(b.x + (c * kBlock + tokens) * kPiece, 0, past * kPiece * sizeof(float));
      for (int f = 0; f < kPiece; f += 16) {
        __builtin_memset(signs + f / 16 * kBlock + tokens, 0, past * sizeof(uint16_t));
      }
    }
  });
  return x;
}

// Where a block's rows are made: in `to` itself or, for store_rows, in scratch.
template <typename Element>
INLINE float* rows_for(const Shape& s, int64_t tokens, Rows to, float* scratch) {
  return in_place<Element>(s, tokens, to) ? (float*)to.data : scratch;
}

template <typename Element>
void store_rows(const Shape& s, int64_t tokens, const float* rows, Rows to) {
  if (rows == to.data) return;
  with_width(s, [&](auto width) {
    constexpr int64_t kPiece = width * kLanes;
    for (int64_t c = 0; c < s.chunks; ++c) {
      const int64_t left = s.head_dim - c * kPiece;
      for (int64_t n = 0; n < tokens; ++n) {
        const float* from = rows + (c * kBlock + n) * kPiece;
        Element* row = row_of<Element>(to, n) + c * kPiece;
        if (left < kPiece) {
          store_row(row, left, from);
          continue;
        }
        for (int64_t i = 0; i < kPiece; i += kLanes) store(row + i, load(from + i));
      }
    }
  });
}

// to_n = scale_n rows_n
void scale_rows(const Shape& s, int64_t tokens, const float* scale, const float* rows, float* to) {
  const int64_t piece = s.piece();
  for (int64_t c = 0; c < s.chunks; ++c) {
    for (int64_t n = 0; n < tokens; ++n) {
      const int64_t row = (c * kBlock + n) * piece;
      for (int64_t i = 0; i < piece; i += kLanes) {
        store(to + row + i, load(rows + row + i) * scale[n]);
      }
    }
  }
}

// masks[f] of 64 features: bit n is token n's sign, of tokens that there are.
void transpose_signs(const uint16_t* signs, int64_t tokens, uint64_t* masks) {
#if defined(LINEAR_VIT_AVX512)
  const uint64_t there = tokens == 64 ? ~0ull : (1ull << tokens) - 1;
  for (int f = 0; f < 64; f += 16, signs += kBlock) {
    const __m512i first = _mm512_maskz_loadu_epi16((__mmask32)there, signs);
    const __m512i second = _mm512_maskz_loadu_epi16((__mmask32)(there >> 32), signs + 32);
    for (int bit = 0; bit < 16; ++bit) {
      const __m512i one = _mm512_set1_epi16((int16_t)(1 << bit));
      masks[f + bit] = _mm512_kunpackd(_mm512_test_epi16_mask(second, one),
                                       _mm512_test_epi16_mask(first, one));
    }
  }
#else
  // 64×64 bits (Warren, Hacker's Delight, 7-3).
  for (int64_t n = 0; n < 64; ++n) {
    masks[n] = 0;
    for (int f = 0; f < 64 && n < tokens; f += 16) {
      masks[n] |= (uint64_t)signs[f / 16 * kBlock + n] << f;
    }
  }
  uint64_t mask = 0xffffffff;
  for (int width = 32; width > 0; width /= 2, mask ^= mask << width) {
    for (int base = 0; base < 64; base += 2 * width) {
      for (int i = base; i < base + width; ++i) {
        const uint64_t swap = ((masks[i] >> width) ^ masks[i + width]) & mask;
        masks[i + width] ^= swap;
        masks[i] ^= swap << width;
      }
    }
  }
#endif
}

// z of x's sign.
INLINE Floats signed_z(const Shape& s, const float* z, int64_t f, Floats x) {
  return where_negative(x, load(z + s.features + f), load(z + f));
}

// 1 / (φ(q)·z + eps), 0 where a query meets no key or that has no float inverse; of whole vectors of
// tokens, those past the last are zeros' own.
void invert_normalisers(const Shape& s, int64_t tokens, const float* x, const float* z, float eps,
                        float* inverse) {
  const float least = least_met(eps);
  with_width(s, [&](auto width) {
    constexpr int kWidth = width, kPiece = width * kLanes;
    for (int64_t n = 0; n < tokens; n += kLanes) {
      const Floats met = sums_across([&](int j) INLINE_LAMBDA {
        Floats total = {};
        for (int64_t c = 0; c < s.chunks; ++c) {
          for (int w = 0; w < kWidth; ++w) {
            const Floats q = load(x + (c * kBlock + n + j) * kPiece + w * kLanes);
            total += q * signed_z(s, z, c * kPiece + w * kLanes, q);
          }
        }
        return total;
      });
      store(inverse + n, ((met <= least) & (met >= -least)) ? Floats{} : 1.0f / (met + eps));
    }
  });
}

// z[sign of x][f] += scale_n · x_nf over the block's tokens; unless kScaled, of 1.
template <bool kScaled>
void accumulate_z(const Shape& s, int64_t tokens, const float* x, const float* scale, float* z) {
  with_width(s, [&](auto width) {
    constexpr int kWidth = width, kPiece = width * kLanes;
    for (int64_t c = 0; c < s.chunks; ++c) {
      Floats positive[kWidth] = {}, negative[kWidth] = {};
      for (int64_t n = 0; n < tokens; ++n) {
        for (int w = 0; w < kWidth; ++w) {
          const Floats value = load(x + (c * kBlock + n) * kPiece + w * kLanes);
          const Floats term = kScaled ? value * scale[n] : value;
          positive[w] = where_negative(value, positive[w], positive[w] + term);
          negative[w] = where_negative(value, negative[w] + term, negative[w]);
        }
      }
      for (int w = 0; w < kWidth; ++w) {
        float* sum = z + c * kPiece + w * kLanes;
        store(sum, load(sum) + positive[w]);
        store(sum + s.features, load(sum + s.features) + negative[w]);
      }
    }
  });
}

// ---- the three products --------------------------------------------------------------------------

// Two features' sums over the tokens that the bits of `listed` name. One offset, in one register,
// serves x and rows: every instruction here counts, as many as can start a cycle are needed.
template <int kWidth>
INLINE void add_listed(uint64_t listed, const float* x, const float* rows, Floats (&first)[kWidth],
                       Floats (&second)[kWidth]) {
  for (; listed != 0; listed &= listed - 1) {
    uint64_t at = lowest_bit(listed) * (kWidth * sizeof(Floats));
    opaque(at);
    const float* pair = (const float*)((const char*)x + at);
    const float* row = (const float*)((const char*)rows + at);
    const Floats a = splat(pair), b = splat(pair + 1);
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
void accumulate_block(const Shape& s, int64_t tokens, const Block& b, const float* x_all,
                      const float* rows_all, float* S_all, const Ahead& ahead,
                      const Ahead& ahead_too) {
  for (int64_t f = 0; f < s.features; f += 64) {
    transpose_signs(b.signs + f * 4, tokens, b.masks + f);
  }
  const uint64_t all = tokens == 64 ? ~0ull : (1ull << tokens) - 1;
  const int64_t share = 2 * kBlock / s.head_dim + 1;  // of the next tokens, for each pair of features
  with_width(s, [&](auto width) {
    constexpr int kWidth = width;
    constexpr int64_t kPiece = kWidth * kLanes;
    for (int64_t c = 0; c < s.chunks; ++c) {
      const float* rows = rows_all + c * kBlock * kPiece;
      float* S = S_all + c * 2 * s.features * kPiece;
      for (int64_t f = 0; f < s.head_dim; f += 2) {
        if (c == 0) {
          ahead.fetch(f / 2 * share, share);
          ahead_too.fetch(f / 2 * share, share);
        }
        const float* x = x_all + f / kPiece * kBlock * kPiece + f % kPiece;
        const uint64_t negative = b.masks[f], negative_next = b.masks[f + 1];
        float* row = S + 2 * kPiece * f;
        float* next = row + 2 * kPiece;
        Floats sums[kWidth] = {}, sums_next[kWidth] = {};
        const auto add = [&](uint64_t listed) INLINE_LAMBDA {
          add_listed<kWidth>(listed & all, x, rows, sums, sums_next);
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

// Features at a time: a whole piece of x or half of one, whose rows of one piece fill up to half of a
// 32 KB L1 cache.
template <int kWidth>
constexpr int64_t kFeatures = kWidth == 4 && kLanes == 16 ? 32 : kWidth * kLanes;

// Where those are that begin at feature `first`: of token 0, in x (and dots), signs and S.
template <int kWidth>
struct Features {
  int64_t x;
  const uint16_t* signs;
  const float* S;

  Features(const Block& b, const float* S_all, int64_t first) {
    constexpr int64_t kPiece = kWidth * kLanes;
    x = first / kPiece * kBlock * kPiece + first % kPiece;
    signs = b.signs + first / 16 * kBlock;
    S = S_all + 2 * kPiece * first;
  }
};

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
  opaque(row);  // one register and a constant: indexed loads don't fuse with their FMA
  return (const float*)row + 2 * kPiece * j;
}

// sums_n (+)= Σ_f x_nf S[f][sign] for kTokens tokens; after the last features times scale_n.
template <int kWidth, int kTokens>
INLINE void gather_tokens(const Features<kWidth>& at, int64_t n, const OneLane& one_lane,
                          const float* x_all, bool first, const float* scale, float* sums) {
  constexpr int64_t kPiece = kWidth * kLanes;
  constexpr bool kFromRegisters = OneLane::kLoadless && kTokens <= 4;  // that many x in registers
  const float* x = x_all + at.x + n * kPiece;
  Floats total[kTokens][kWidth];
  for (int t = 0; t < kTokens; ++t) {
    for (int w = 0; w < kWidth; ++w) {
      total[t][w] = first ? Floats{} : load(sums + (n + t) * kPiece + w * kLanes);
    }
  }
  for (int64_t f = 0; f < kFeatures<kWidth>; f += 16) {
    const float* S = at.S + 2 * kPiece * f;
    opaque(S);
    uint32_t signs[kTokens];
    Floats values[kTokens];
    for (int t = 0; t < kTokens; ++t) {
      signs[t] = at.signs[f / 16 * kBlock + n + t];
      if (kFromRegisters) values[t] = load(x + t * kPiece + f);
    }
#pragma GCC unroll 16
    for (int j = 0; j < 16; ++j) {
      for (int t = 0; t < kTokens; ++t) {
        const float* row = signed_row<kPiece>(S, j, signs[t]);
        const Floats value =
            kFromRegisters ? one_lane(values[t], j) : splat(x + t * kPiece + f + j);
        for (int w = 0; w < kWidth; ++w) total[t][w] += value * load(row + w * kLanes);
      }
    }
  }
  for (int t = 0; t < kTokens; ++t) {
    for (int w = 0; w < kWidth; ++w) {
      const Floats sum = scale == nullptr ? total[t][w] : total[t][w] * scale[n + t];
      store(sums + (n + t) * kPiece + w * kLanes, sum);
    }
  }
}

// sums_n = scale_n Σ_f x_nf S[f][sign], for whole groups of tokens: those past the last are zeros.
void gather_block(const Shape& s, int64_t tokens, const Block& b, const float* x,
                  const float* S_all, const float* scale, float* sums_all, const Ahead& ahead) {
  with_width(s, [&](auto width) {
    constexpr int kWidth = width;
    constexpr int kTokens = kWidth >= 3 ? 2 : 8 / kWidth;  // 6 or 8 sums hide the FMA's latency
    constexpr int64_t kPiece = kWidth * kLanes;
    const OneLane one_lane;
    for (int64_t c = 0; c < s.chunks; ++c) {
      const float* S = S_all + c * 2 * s.features * kPiece;
      float* sums = sums_all + c * kBlock * kPiece;
      for (int64_t f = 0; f < s.features; f += kFeatures<kWidth>) {
        const Features<kWidth> at(b, S, f);
        const bool last = f + kFeatures<kWidth> == s.features;
        for (int64_t n = 0; n < tokens; n += kTokens) {
          if (c == 0 && f == 0) ahead.fetch(n, kTokens);
          gather_tokens<kWidth, kTokens>(at, n, one_lane, x, f == 0, last ? scale : nullptr, sums);
        }
      }
    }
  });
}

// Where kDots, dots_nf = S[f][sign] · rows_n; where kGather, sums_n = Σ_f x_nf S[f][sign] on the way.
template <bool kDots, bool kGather>
void dots_block(const Shape& s, int64_t tokens, const Block& b, const float* x_all,
                const float* rows_all, const float* S_all, float* sums_all, const Ahead& ahead,
                const Ahead& ahead_too) {
  with_width(s, [&](auto width) {
    constexpr int kWidth = width;
    constexpr int kSums = kGather ? 2 : 1;  // of every other feature, for the FMA's latency
    constexpr int64_t kPiece = kWidth * kLanes;
    for (int64_t c = 0; c < s.chunks; ++c) {
      for (int64_t first = 0; first < s.features; first += kFeatures<kWidth>) {
        const Features<kWidth> at(b, S_all + c * 2 * s.features * kPiece, first);
        for (int64_t n = 0; n < tokens; ++n) {
          if (c == 0 && first == 0) {
            ahead.fetch(n, 1);
            ahead_too.fetch(n, 1);
          }
          const float* x = x_all + at.x + n * kPiece;
          const float* values = rows_all + (c * kBlock + n) * kPiece;
          float* dots = b.dots + at.x + n * kPiece;
          float* sums = sums_all + (c * kBlock + n) * kPiece;
          Floats value[kWidth], total[kSums][kWidth] = {};
          for (int w = 0; w < kWidth; ++w) {
            if (kDots) value[w] = load(values + w * kLanes);
            if (kGather && first != 0) total[0][w] = load(sums + w * kLanes);
          }
          for (int64_t f = 0; f < kFeatures<kWidth>; f += kLanes) {
            const uint32_t signs = at.signs[f / 16 * kBlock + n] >> f % 16;
            const float* S = at.S + 2 * kPiece * f;
            opaque(S);
            const Floats dot = sums_across([&](int j) INLINE_LAMBDA {
              const float* row = signed_row<kPiece>(S, j, signs);
              const Floats x_j = kGather ? splat(x + f + j) : Floats{};
              Floats lanes = {};
              for (int w = 0; w < kWidth; ++w) {
                Floats part = load(row + w * kLanes);
                if (kGather) keep(part);
                if (kDots) lanes = w == 0 ? part * value[w] : lanes + part * value[w];
                if (kGather) total[j % kSums][w] += x_j * part;
              }
              return lanes;
            });
            if (kDots) store(dots + f, c == 0 ? dot : load(dots + f) + dot);
          }
          for (int w = 0; kGather && w < kWidth; ++w) {
            store(sums + w * kLanes, total[0][w] + total[kSums - 1][w]);
          }
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
    const float* x = load_signed<Element>(s, count, from_row(element, k, n), b);
    const float* rows = load_rows<Element>(s, count, from_row(element, v, n), b.rows);
    const Ahead next_k(element, head_dim, k, n + count, tokens);
    const Ahead next_v(element, head_dim, v, n + count, tokens);
    accumulate_block(s, count, b, x, rows, state, next_k, next_v);
    accumulate_z<false>(s, count, x, nullptr, state + s.s_floats());
  });
}

void clear(int64_t head_dim, float* state) {
  __builtin_memset(state, 0, state_floats(head_dim) * sizeof(float));
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
    const Rows to = from_row(element, out, n);
    float* sums = rows_for<Element>(s, count, to, b.sums);
    const float* x = load_signed<Element>(s, count, from_row(element, q, n), b);
    invert_normalisers(s, count, x, state + s.s_floats(), eps, inverse);
    const Ahead next_q(element, head_dim, q, n + count, tokens);
    gather_block(s, count, b, x, state, inverse, sums, next_q);
    store_rows<Element>(s, count, sums, to);
  });
}

// weight_n = -inverse_n Σ_f x_nf dots_nf, of whole vectors of tokens.
void pull_to(const Shape& s, int64_t tokens, const float* x, const float* dots,
             const float* inverse, float* weight) {
  const int64_t piece = s.piece();
  for (int64_t n = 0; n < tokens; n += kLanes) {
    const Floats total = sums_across([&](int j) INLINE_LAMBDA {
      Floats lanes = {};
      for (int64_t c = 0; c < s.chunks; ++c) {
        const int64_t at = (c * kBlock + n + j) * piece;
        for (int64_t i = 0; i < piece; i += kLanes) lanes += load(x + at + i) * load(dots + at + i);
      }
      return lanes;
    });
    store(weight + n, Floats{} - total * load(inverse + n));
  }
}

// to_nf = dots_nf + weight_n · z_f of x's sign: the gradient of x; 0 where x is 0, as φ' is. Without
// weights, of 1.
template <typename Element>
void slopes(const Shape& s, int64_t tokens, const float* x, const float* dots, const float* z,
            const float* weight, Rows to) {
  const int64_t piece = s.piece();
  for (int64_t c = 0; c < s.chunks; ++c) {
    for (int64_t n = 0; n < tokens; ++n) {
      Element* row = row_of<Element>(to, n);
      for (int64_t i = 0; i < piece; i += kLanes) {
        const int64_t at = (c * kBlock + n) * piece + i, f = c * piece + i;
        const Floats value = load(x + at);
        const float factor = weight == nullptr ? 1.0f : weight[n];
        const Floats slope = load(dots + at) + factor * signed_z(s, z, f, value);
        store_some(row + f, s.head_dim - f, where_zero(value, Floats{}, slope));
      }
    }
  }
}

void query_gradient(ElementType element, int64_t head_dim, int64_t tokens, Rows dout, Rows q,
                    Rows dq, const float* state, float eps, float* gradient, Sums sums,
                    float* scratch) {
  const Shape s(head_dim);
  const bool pulled = dq.data != nullptr || sums.z;
  const Block b(s, scratch);
  const float* z = state + s.s_floats();
  for_blocks(element, tokens, s, b, [&](int64_t n, int64_t count, auto example) {
    using Element = decltype(example);
    float inverse[kBlock], weight[kBlock], none_of_z[kBlock] = {};
    const float* x = load_signed<Element>(s, count, from_row(element, q, n), b);
    const float* rows = load_rows<Element>(s, count, from_row(element, dout, n), b.rows);
    invert_normalisers(s, count, x, z, eps, inverse);
    scale_rows(s, count, inverse, rows, b.rows);
    const Ahead next_q(element, head_dim, q, n + count, tokens);
    const Ahead next_dout(element, head_dim, dout, n + count, tokens);
    if (pulled) {
      dots_block<true, false>(s, count, b, x, b.rows, state, b.sums, next_q, next_dout);
      pull_to(s, count, x, b.dots, inverse, weight);
    }
    if (dq.data != nullptr) {
      // Of one feature φ(q) z is E - eps: what the difference leaves is written out, not rounded away.
      const bool single = head_dim == 1;
      for (int64_t i = 0; single && i < count; ++i) b.dots[i * s.piece()] *= eps * inverse[i];
      slopes<Element>(s, count, x, b.dots, z, single ? none_of_z : weight,
                      from_row(element, dq, n));
    }
    const Ahead none(element, head_dim, q, 0, 0);  // dots_block has fetched it
    if (sums.S) {
      accumulate_block(s, count, b, x, b.rows, gradient, pulled ? none : next_q,
                       pulled ? none : next_dout);
    }
    if (sums.z) accumulate_z<true>(s, count, x, weight, gradient + s.s_floats());
  });
}

void key_gradient(ElementType element, int64_t head_dim, int64_t tokens, Rows k, Rows v, Rows dk,
                  Rows dv, const float* gradient, float* scratch) {
  const Shape s(head_dim);
  const Block b(s, scratch);
  const float* dz = gradient + s.s_floats();
  for_blocks(element, tokens, s, b, [&](int64_t n, int64_t count, auto example) {
    using Element = decltype(example);
    const Rows to = dv.data == nullptr ? Rows{} : from_row(element, dv, n);
    float* sums = dv.data == nullptr ? b.sums : rows_for<Element>(s, count, to, b.sums);
    const float* x = load_signed<Element>(s, count, from_row(element, k, n), b);
    const float* rows =
        dk.data == nullptr ? b.rows
                           : load_rows<Element>(s, count, from_row(element, v, n), b.rows);
    const Ahead next_k(element, head_dim, k, n + count, tokens);
    const Ahead next_v(element, head_dim, v, n + count, tokens);
    if (dk.data == nullptr) {
      dots_block<false, true>(s, count, b, x, rows, gradient, sums, next_k, next_k);
    } else if (dv.data == nullptr) {
      dots_block<true, false>(s, count, b, x, rows, gradient, sums, next_k, next_v);
    } else {
      dots_block<true, true>(s, count, b, x, rows, gradient, sums, next_k, next_v);
    }
    if (dk.data != nullptr) {
      slopes<Element>(s, count, x, b.dots, dz, nullptr, from_row(element, dk, n));
    }
    if (dv.data != nullptr) store_rows<Element>(s, count, sums, to);
  });
}

// Instructions that take a place in the pipeline's front and nothing else. (x86: of three bytes, as
// few as its cache of decoded instructions has room for.)
template <int kCount>
INLINE void do_nothing() {
#if defined(__x86_64__)
  asm volatile("nopl (%rax)");
#else
  asm volatile("nop");
#endif
  if constexpr (kCount > 1) do_nothing<kCount - 1>();
}

double probe(Probe kind, int64_t repeats, float* scratch) {
  constexpr int kChains = 10;  // two FMAs a cycle, four or five cycles each
  const auto run = [&](auto of) INLINE_LAMBDA {
    Floats sums[kChains] = {}, x = load(scratch);
    for (int64_t i = 0; i < repeats; ++i) {
#pragma GCC unroll 10
      for (int j = 0; j < kChains; ++j) {
        if (of == kRegisters) sums[j] = sums[j] * x + x;
        if (of == kLoads) sums[j] += x * load(scratch + j * kLanes);
        if (of == kInstructions) do_nothing<4>();
        keep(sums[j]);  // or the compiler sees that all chains are one
      }
      asm volatile("" : : : "memory");  // and loads each time
    }
#pragma GCC unroll 10
    for (int j = 0; j < kChains; ++j) store(scratch + j * kLanes, sums[j]);
  };
  __builtin_memset(scratch, 0, kChains * sizeof(Floats));
  if (kind == kRegisters) run(std::integral_constant<Probe, kRegisters>());
  if (kind == kLoads) run(std::integral_constant<Probe, kLoads>());
  if (kind == kInstructions) run(std::integral_constant<Probe, kInstructions>());
  return 2.0 * kChains * kLanes * repeats * (kind == kInstructions ? 4 : 1);
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
    state_floats, scratch_floats, clear, accumulate,     add,          spread_nan, load_state,
    store_state,  apply,          query_gradient, key_gradient, probe,
};
