// Linear attention's CPU operators: how the work is cut and shared out; cpu_simd.cpp does it.
// Shapes and dtypes have been checked by the public functions.
//
// A key/value head is an item of work that stays in the caches of one core: its state is summed, and
// read by its queries at once. Where heads are few or long, each is cut into at most 64 parts, by
// its size alone (never by the number of threads, so that results are the same for any), whose
// states are then added in order. Memory beyond tensors: a state per head and part, or per thread,
// and a block of tokens per thread; nothing that grows with N.
#include "../cpu/tensors.h"
#include "cpu.h"

namespace {

// AMX multiplies bfloat16 only, and of narrow heads half of each tile would be padding, and the rounding
// of S not averaged out: for others its name stands for AVX-512.
const LinearAttentionKernels& kernels([[maybe_unused]] bool bfloat16,
                                      [[maybe_unused]] int64_t head_dim) {
  return choose<LinearAttentionKernels>({
#if defined(LINEAR_VIT_AMX)
      {"amx",
       has_avx512() && linear_attention_amx_allowed != nullptr && linear_attention_amx_allowed(),
       bfloat16 && head_dim >= 16 ? &linear_attention_amx : &linear_attention_avx512},
#endif
#if defined(LINEAR_VIT_X86)
      {"avx512", has_avx512(), &linear_attention_avx512},
      {"avx2", has_avx2(), &linear_attention_avx2},
#endif
      {"portable", true, &linear_attention_portable},
  });
}

// The tokens of the query heads (or the one key head) of a key/value head, cut into parts.
struct Cut {
  int64_t heads, tokens, blocks, parts;  // blocks of a head

  Cut(int64_t key_heads, int64_t heads_each, int64_t tokens_each)
      : heads(heads_each), tokens(tokens_each), blocks((tokens_each + kBlock - 1) / kBlock) {
    const int64_t total = heads * blocks;
    const int64_t busy = std::min(64 / std::max<int64_t>(key_heads, 1), total / 4);
    const int64_t accurate = (total + 255) / 256;  // a part is a plain sum of at most 256 blocks
    parts = std::clamp<int64_t>(std::max(busy, accurate), 1, 64);
  }

  // function(head, first token, tokens) for the ranges of a part.
  template <typename Function>
  void ranges(int64_t part, const Function& function) const {
    const int64_t total = heads * blocks, each = (total + parts - 1) / parts;
    const int64_t end = std::min(total, (part + 1) * each);
    for (int64_t at = part * each; at < end;) {
      const int64_t head = at / blocks, block = at % blocks;
      const int64_t count = std::min(end - at, blocks - block);
      const int64_t first = block * kBlock;
      function(head, first, std::min(count * kBlock, tokens - first));
      at += count;
    }
  }
};

// A state per head and part.
struct States {
  Memory all;
  int64_t parts, floats;  // of a head; of a state

  float* of(int64_t head, int64_t part = 0) const {
    return all.get() + (head * parts + part) * floats;
  }
};

// A gradient's rows, if it is asked for.
Rows rows_of(const View& gradient, int64_t i, int64_t j, int64_t k) {
  return gradient.data == nullptr ? Rows{} : gradient.rows(i, j, k);
}

// S (B, Hk, 2D, D) and z (B, Hk, 2D) of all heads as the operators take and give them, or null.
struct Dense {
  float *S, *z;

  Dense(const Tensor& S_, const Tensor& z_)
      : S(S_.numel() == 0 ? nullptr : static_cast<float*>(S_.data_ptr())),
        z(z_.numel() == 0 ? nullptr : static_cast<float*>(z_.data_ptr())) {}
};

using Pair = std::tuple<Tensor, Tensor>;
using Triple = std::tuple<Tensor, Tensor, Tensor>;

// One call: sizes, the cuts of keys and queries, and the steps on one key/value head.
struct Call {
  const LinearAttentionKernels& kernel;
  ElementType element;
  int64_t batch, kv_heads, group, head_dim, heads;
  Cut keys, queries;
  int64_t state_floats, scratch_floats;

  // Of x's dtype, batch and head dim.
  Call(const View& x, int64_t kv_heads_, int64_t group_, int64_t key_tokens, int64_t query_tokens)
      : kernel(kernels(x.element == kBFloat16, x.size[3])), element(x.element), batch(x.size[0]), kv_heads(kv_heads_),
        group(group_), head_dim(x.size[3]), heads(batch * kv_heads), keys(heads, 1, key_tokens),
        queries(heads, group, query_tokens),
        state_floats((kernel.state_floats(head_dim) + 15) / 16 * 16),
        scratch_floats((kernel.scratch_floats(head_dim) + 15) / 16 * 16) {}

  int64_t flop() const {  // of the forward pass, or of its half
    return 4 * head_dim * head_dim * heads * (keys.tokens + group * queries.tokens);
  }

  bool whole_heads() const { return keys.parts == 1 && queries.parts == 1; }

  States states(int64_t parts) const {
    return {memory(heads * parts * state_floats), parts, state_floats};
  }

  float* clear(float* state) const {
    kernel.clear(head_dim, state);
    return state;
  }

  void accumulate(const View& k, const View& v, int64_t head, int64_t part, float* state,
                  float* scratch) const {
    const int64_t i = head / kv_heads, h = head % kv_heads;
    keys.ranges(part, [&](int64_t, int64_t first, int64_t count) {
      kernel.accumulate(element, head_dim, count, k.rows(i, h, first), v.rows(i, h, first), state,
                        scratch);
    });
  }

  void apply(const View& q, const View& out, int64_t head, int64_t part, const float* state,
             float eps, float* scratch) const {
    const int64_t i = head / kv_heads, h = head % kv_heads * group;
    queries.ranges(part, [&](int64_t g, int64_t first, int64_t count) {
      kernel.apply(element, head_dim, count, q.rows(i, h + g, first), out.rows(i, h + g, first),
                   state, eps, scratch);
    });
  }

  void query_gradient(const View& dout, const View& q, const View& dq, int64_t head, int64_t part,
                      const float* state, float eps, float* gradient, Sums sums,
                      float* scratch) const {
    const int64_t i = head / kv_heads, h = head % kv_heads * group;
    queries.ranges(part, [&](int64_t g, int64_t first, int64_t count) {
      kernel.query_gradient(element, head_dim, count, dout.rows(i, h + g, first),
                            q.rows(i, h + g, first), rows_of(dq, i, h + g, first), state, eps,
                            gradient, sums, scratch);
    });
  }

  void key_gradient(const View& k, const View& v, const View& dk, const View& dv, int64_t head,
                    int64_t part, const float* gradient, float* scratch) const {
    const int64_t i = head / kv_heads, h = head % kv_heads;
    keys.ranges(part, [&](int64_t, int64_t first, int64_t count) {
      kernel.key_gradient(element, head_dim, count, k.rows(i, h, first), v.rows(i, h, first),
                          rows_of(dk, i, h, first), rows_of(dv, i, h, first), gradient, scratch);
    });
  }

  // The parts of one head's state, added up.
  void finish(int64_t parts, float* state) const {
    kernel.add(head_dim, parts, state_floats, state);
    kernel.spread_nan(head_dim, state);
  }

  void load(const Dense& from, int64_t head, float* state) const {
    kernel.load_state(head_dim, from.S + head * 2 * head_dim * head_dim,
                      from.z + head * 2 * head_dim, state);
    kernel.spread_nan(head_dim, state);
  }

  void store(const float* state, int64_t head, const Dense& to) const {
    kernel.store_state(head_dim, state, to.S + head * 2 * head_dim * head_dim,
                       to.z + head * 2 * head_dim);
  }

  // function(head, part, that part's state, scratch) for all of `states`.
  template <typename Function>
  void for_parts(const States& states, const Function& function) const {
    const int64_t parts = states.parts;
    parallel(heads * parts, scratch_floats, flop(), [&](int64_t item, float* scratch) {
      function(item / parts, item % parts, states.of(item / parts, item % parts), scratch);
    });
  }

  // The states of k and v, each head's in its first part.
  States key_states(const View& k, const View& v) const {
    States all = states(keys.parts);
    for_parts(all, [&](int64_t head, int64_t part, float* state, float* scratch) {
      accumulate(k, v, head, part, clear(state), scratch);
    });
    finish_all(all);
    return all;
  }

  States loaded_states(const Dense& from) const {
    States all = states(1);
    for_parts(all, [&](int64_t head, int64_t, float* state, float*) { load(from, head, state); });
    return all;
  }

  void finish_all(const States& all) const {
    parallel(heads, 0, flop(), [&](int64_t head, float*) { finish(all.parts, all.of(head)); });
  }

  void store_all(const States& all, const Dense& to) const {
    parallel(heads, 0, flop(), [&](int64_t head, float*) { store(all.of(head), head, to); });
  }

  // out, for all heads and parts, of each head's first state.
  void apply_all(const View& q, const View& out, const States& all, float eps) const {
    parallel(heads * queries.parts, scratch_floats, flop(), [&](int64_t item, float* scratch) {
      const int64_t head = item / queries.parts;
      apply(q, out, head, item % queries.parts, all.of(head), eps, scratch);
    });
  }

  // dq, and the states' gradients, each head's in its first part, as far as they are asked for.
  States query_gradients(const View& dout, const View& q, const View& dq, const States& all,
                         float eps, Sums sums) const {
    const int64_t parts = queries.parts;
    States gradients = states(sums.any() ? parts : 0);
    parallel(heads * parts, scratch_floats, flop(), [&](int64_t item, float* scratch) {
      const int64_t head = item / parts, part = item % parts;
      float* const gradient = sums.any() ? clear(gradients.of(head, part)) : nullptr;
      query_gradient(dout, q, dq, head, part, all.of(head), eps, gradient, sums, scratch);
    });
    if (sums.any()) finish_all(gradients);
    return gradients;
  }

  void key_gradients(const View& k, const View& v, const View& dk, const View& dv,
                     const States& gradients) const {
    parallel(heads * keys.parts, scratch_floats, flop(), [&](int64_t item, float* scratch) {
      const int64_t head = item / keys.parts;
      key_gradient(k, v, dk, dv, head, item % keys.parts, gradients.of(head), scratch);
    });
  }
};

// S and z for keys like k's, of shape (0,) if they are not to be saved.
Pair empty_state(const View& k, bool save) {
  const int64_t batch = k.size[0], heads = k.size[1], head_dim = k.size[3];
  if (!save) return {empty_floats({0}), empty_floats({0})};
  return {empty_floats({batch, heads, 2 * head_dim, head_dim}),
          empty_floats({batch, heads, 2 * head_dim})};
}

void forward_into(const Call& call, const View& q, const View& k, const View& v, const View& out,
                  const Dense& saved, float eps) {
  if (!call.whole_heads()) {
    const States all = call.key_states(k, v);
    if (saved.S != nullptr) call.store_all(all, saved);
    return call.apply_all(q, out, all, eps);
  }
  const int64_t floats = call.state_floats + call.scratch_floats;
  parallel(call.heads, floats, call.flop(), [&](int64_t head, float* scratch) {
    float* const state = scratch + call.scratch_floats;
    call.accumulate(k, v, head, 0, call.clear(state), scratch);
    call.finish(1, state);
    if (saved.S != nullptr) call.store(state, head, saved);
    call.apply(q, out, head, 0, state, eps, scratch);
  });
}

void backward_into(const Call& call, const View& dout, const View& q, const View& k, const View& v,
                   const Dense& saved, float eps, const View& dq, const View& dk, const View& dv) {
  const Sums sums{dk.data != nullptr || dv.data != nullptr, dk.data != nullptr};
  if (!call.whole_heads()) {
    const States all = saved.S != nullptr ? call.loaded_states(saved) : call.key_states(k, v);
    const States gradients = call.query_gradients(dout, q, dq, all, eps, sums);
    if (sums.any()) call.key_gradients(k, v, dk, dv, gradients);
    return;
  }
  const int64_t floats = 2 * call.state_floats + call.scratch_floats;
  parallel(call.heads, floats, call.flop(), [&](int64_t head, float* scratch) {
    float* const state = scratch + call.scratch_floats;
    float* const gradient = state + call.state_floats;
    if (saved.S != nullptr) {
      call.load(saved, head, state);
    } else {
      call.accumulate(k, v, head, 0, call.clear(state), scratch);
      call.finish(1, state);
    }
    call.query_gradient(dout, q, dq, head, 0, state, eps, call.clear(gradient), sums, scratch);
    if (!sums.any()) return;
    call.finish(1, gradient);
    call.key_gradient(k, v, dk, dv, head, 0, gradient, scratch);
  });
}

Call call_on(const View& q, const View& k) {
  return Call(k, k.size[1], q.size[1] / k.size[1], k.size[2], q.size[2]);
}
Call call_on_keys(const View& k) { return Call(k, k.size[1], 1, k.size[2], 0); }
Call call_on_queries(const View& q, const Tensor& S) {
  return Call(q, S.size(1), q.size[1] / S.size(1), 0, q.size[2]);
}

// ---- operators -----------------------------------------------------------------------------------

Triple forward(const Tensor& q, const Tensor& k, const Tensor& v, double eps, bool save_state) {
  const Tensor out = output_like(q);
  const View queries(q), keys(k);
  const auto [S, z] = empty_state(keys, save_state);
  forward_into(call_on(queries, keys), queries, keys, View(v), View(out).output(), Dense(S, z),
               static_cast<float>(eps));
  return {out, S, z};
}

Triple backward(const Tensor& dout_any, const Tensor& q, const Tensor& k, const Tensor& v,
                const Tensor& S_any, const Tensor& z_any, double eps, int64_t wanted) {
  const Tensor dout = readable(dout_any), S = contiguous(S_any), z = contiguous(z_any);
  const Gradient dq(q, wanted, 0), dk(k, wanted, 1), dv(v, wanted, 2);
  const View queries(q), keys(k);
  backward_into(call_on(queries, keys), View(dout), queries, keys, View(v), Dense(S, z),
                static_cast<float>(eps), dq.view, dk.view, dv.view);
  return {dq.tensor, dk.tensor, dv.tensor};
}

// Part `i` of (B, N, 3, H, D), as (B, H, N, D).
View unpacked(const Tensor& qkv, int64_t i) {
  return View(qkv, {qkv.size(0), qkv.size(3), qkv.size(1), qkv.size(4)},
              {qkv.stride(0), qkv.stride(3), qkv.stride(1), qkv.stride(4)}, i * qkv.stride(2));
}

// (B, N, H, D), as (B, H, N, D).
View heads_first(const Tensor& x) {
  return View(x, {x.size(0), x.size(2), x.size(1), x.size(3)},
              {x.stride(0), x.stride(2), x.stride(1), x.stride(3)});
}

Triple forward_packed(const Tensor& qkv, double eps, bool save_state) {
  const Tensor out = output_like(torch::stable::select(qkv, 2, 0));
  const View q = unpacked(qkv, 0), k = unpacked(qkv, 1);
  const auto [S, z] = empty_state(k, save_state);
  forward_into(call_on(q, k), q, k, unpacked(qkv, 2), heads_first(out).output(),
               Dense(S, z), static_cast<float>(eps));
  return {out, S, z};
}

Tensor backward_packed(const Tensor& dout_any, const Tensor& qkv, const Tensor& S_any,
                       const Tensor& z_any, double eps) {
  const Tensor dout = readable(dout_any), S = contiguous(S_any), z = contiguous(z_any);
  const Tensor dqkv = output_like(qkv);
  const View q = unpacked(qkv, 0), k = unpacked(qkv, 1);
  backward_into(call_on(q, k), heads_first(dout), q, k, unpacked(qkv, 2), Dense(S, z),
                static_cast<float>(eps), unpacked(dqkv, 0).output(), unpacked(dqkv, 1).output(),
                unpacked(dqkv, 2).output());
  return dqkv;
}

Pair state(const Tensor& k, const Tensor& v) {
  const View keys(k);
  const Call call = call_on_keys(keys);
  const auto [S, z] = empty_state(keys, true);
  call.store_all(call.key_states(keys, View(v)), Dense(S, z));
  return {S, z};
}

Pair state_backward(const Tensor& dS_any, const Tensor& dz_any, const Tensor& k, const Tensor& v,
                    int64_t wanted) {
  const Tensor dS = contiguous(dS_any), dz = contiguous(dz_any);
  const Gradient dk(k, wanted, 0), dv(v, wanted, 1);
  const View keys(k);
  const Call call = call_on_keys(keys);
  call.key_gradients(keys, View(v), dk.view, dv.view, call.loaded_states(Dense(dS, dz)));
  return {dk.tensor, dv.tensor};
}

Tensor apply(const Tensor& q, const Tensor& S_any, const Tensor& z_any, double eps) {
  const Tensor S = contiguous(S_any), z = contiguous(z_any), out = output_like(q);
  const View queries(q);
  const Call call = call_on_queries(queries, S);
  call.apply_all(queries, View(out).output(), call.loaded_states(Dense(S, z)),
                 static_cast<float>(eps));
  return out;
}

Triple apply_backward(const Tensor& dout_any, const Tensor& q, const Tensor& S_any,
                      const Tensor& z_any, double eps, int64_t wanted) {
  const Tensor dout = readable(dout_any), S = contiguous(S_any), z = contiguous(z_any);
  const Gradient dq(q, wanted, 0);
  const Sums sums{is_wanted(wanted, 1), is_wanted(wanted, 2)};
  const View queries(q);
  const Call call = call_on_queries(queries, S);
  const States gradients =
      call.query_gradients(View(dout), queries, dq.view, call.loaded_states(Dense(S, z)),
                           static_cast<float>(eps), sums);
  const Tensor nothing = empty_floats({0});
  if (!sums.any()) return {dq.tensor, nothing, nothing};
  const Tensor dS = empty_contiguous(S), dz = empty_contiguous(z);
  call.store_all(gradients, Dense(dS, dz));  // what is not asked for is unset in them
  return {dq.tensor, sums.S ? dS : nothing, sums.z ? dz : nothing};
}

std::string instruction_set(bool bfloat16, int64_t head_dim) {
  return kernels(bfloat16, head_dim).name;
}

// FLOP of the roofline's probe, which ran on every thread.
double probe(int64_t kind, int64_t repeats) {
  if (kind < kRegisters || kind > kInstructions) {
    throw std::runtime_error("linear_vit: no such probe");
  }
  const int64_t threads = torch::stable::get_num_threads();
  std::vector<double> flop(threads);
  const LinearAttentionKernels& kernel = kernels(false, 64);
  parallel(threads, kernel.scratch_floats(64), INT64_MAX, [&](int64_t item, float* scratch) {
    flop[item] = kernel.probe(static_cast<Probe>(kind), repeats, scratch);
  });
  return std::accumulate(flop.begin(), flop.end(), 0.0);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(linear_vit, m) {
  m.def(
      "cpu_linear_attention(Tensor q, Tensor k, Tensor v, float eps, bool save_state)"
      " -> (Tensor, Tensor, Tensor)");
  m.def(
      "cpu_linear_attention_backward(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor S, Tensor z,"
      " float eps, int wanted) -> (Tensor, Tensor, Tensor)");
  m.def(
      "cpu_linear_attention_packed(Tensor qkv, float eps, bool save_state)"
      " -> (Tensor, Tensor, Tensor)");
  m.def(
      "cpu_linear_attention_packed_backward(Tensor dout, Tensor qkv, Tensor S, Tensor z, float eps)"
      " -> Tensor");
  m.def("cpu_linear_attention_state(Tensor k, Tensor v) -> (Tensor, Tensor)");
  m.def(
      "cpu_linear_attention_state_backward(Tensor dS, Tensor dz, Tensor k, Tensor v, int wanted)"
      " -> (Tensor, Tensor)");
  m.def("cpu_linear_attention_apply(Tensor q, Tensor S, Tensor z, float eps) -> Tensor");
  m.def(
      "cpu_linear_attention_apply_backward(Tensor dout, Tensor q, Tensor S, Tensor z, float eps,"
      " int wanted)"
      " -> (Tensor, Tensor, Tensor)");
  m.def("cpu_linear_attention_instruction_set(bool bfloat16, int head_dim=64) -> str");
  m.def("cpu_linear_attention_probe(int kind, int repeats) -> float");
}

STABLE_TORCH_LIBRARY_IMPL(linear_vit, CPU, m) {
  m.impl("cpu_linear_attention", TORCH_BOX(&forward));
  m.impl("cpu_linear_attention_backward", TORCH_BOX(&backward));
  m.impl("cpu_linear_attention_packed", TORCH_BOX(&forward_packed));
  m.impl("cpu_linear_attention_packed_backward", TORCH_BOX(&backward_packed));
  m.impl("cpu_linear_attention_state", TORCH_BOX(&state));
  m.impl("cpu_linear_attention_state_backward", TORCH_BOX(&state_backward));
  m.impl("cpu_linear_attention_apply", TORCH_BOX(&apply));
  m.impl("cpu_linear_attention_apply_backward", TORCH_BOX(&apply_backward));
}

// Without tensors there is no device to choose by.
STABLE_TORCH_LIBRARY_IMPL(linear_vit, CompositeExplicitAutograd, m) {
  m.impl("cpu_linear_attention_instruction_set", TORCH_BOX(&instruction_set));
  m.impl("cpu_linear_attention_probe", TORCH_BOX(&probe));
}
