// What cpu.cpp (operators) asks of cpu_simd.cpp, which is compiled once per instruction set, and of
// cpu_amx.cpp.
//
// A `state` is floats in an order of the instruction set's own: S and z of one key/value head, or
// dS and dz. It travels between these functions only.
#pragma once

#include <cfloat>

#include "../cpu/arguments.h"

enum Probe { kRegisters, kLoads, kInstructions };

// Which of dS and dz are asked for.
struct Sums {
  bool S, z;
  bool any() const { return S || z; }
};

struct LinearAttentionKernels {
  const char* name;

  // Floats of one state, and of the scratch memory that the functions below need.
  int64_t (*state_floats)(int64_t head_dim);
  int64_t (*scratch_floats)(int64_t head_dim);

  // S = 0 and z = 0.
  void (*clear)(int64_t head_dim, float* state);
  // S += Σ φ(kₘ) vₘᵀ and z += Σ φ(kₘ) over `tokens` rows.
  void (*accumulate)(ElementType, int64_t head_dim, int64_t tokens, Rows k, Rows v, float* state,
                     float* scratch);
  // partials[0] += the other ones, `stride` floats apart, in order.
  void (*add)(int64_t head_dim, int64_t partials, int64_t stride, float* state);
  // A NaN that reached one sign's row of a feature reaches the other's, as 0 · NaN does.
  void (*spread_nan)(int64_t head_dim, float* state);
  // From and to S (2D, D) and z (2D), dense.
  void (*load_state)(int64_t head_dim, const float* S, const float* z, float* state);
  void (*store_state)(int64_t head_dim, const float* state, float* S, float* z);

  // outₙ = φ(qₙ)ᵀ S / (φ(qₙ)·z + eps), 0 as least_met says.
  void (*apply)(ElementType, int64_t head_dim, int64_t tokens, Rows q, Rows out,
                const float* state, float eps, float* scratch);
  // dq, and dS, dz += this range's share; what is not asked for may be left out: dq's and gradient's
  // addresses are null then.
  void (*query_gradient)(ElementType, int64_t head_dim, int64_t tokens, Rows dout, Rows q, Rows dq,
                         const float* state, float eps, float* gradient, Sums, float* scratch);
  // dk and dv from dS and dz; dk from both, dv from dS alone. One's address may be null.
  void (*key_gradient)(ElementType, int64_t head_dim, int64_t tokens, Rows k, Rows v, Rows dk,
                       Rows dv, const float* gradient, float* scratch);

  // For the roofline: `repeats` times a few FMAs on registers, or each with a load from the L1
  // cache, or as many instructions that do nothing. Returns the FLOP of that many FMAs.
  double (*probe)(Probe, int64_t repeats, float* scratch);
};

// Tokens of a block: ranges that start at multiples of it have the same sums however they are cut.
constexpr int64_t kBlock = 64;

// A query with |φ(q)·z| no more than this meets no key, or its normaliser has no float inverse: it comes
// out 0 and has no part in any sum.
inline float least_met(float eps) { return eps < FLT_MIN ? FLT_MIN - eps : 0.0f; }

extern const LinearAttentionKernels linear_attention_avx512, linear_attention_avx2,
    linear_attention_portable;
// Of cpu_amx.cpp, in bfloat16 only; and whether this process may use them. Weak: both are null in a
// library whose assembler knew no such instructions.
extern const LinearAttentionKernels linear_attention_amx __attribute__((weak));
__attribute__((weak)) bool linear_attention_amx_allowed();
