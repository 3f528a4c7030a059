// Linear attention's CPU operators: how the work is cut and shared out; cpu_simd.cpp does it.
// Shapes and dtypes have been checked by the public functions.
//
// A key/value head is an item of work that stays in the caches of one core: its state is summed, and
// read by its queries at once. Where heads are few or long, each is cut into at most 64 parts, by
// its size alone (never by the number of threads, so that results are the same for any), whose
// states are then added in order. Memory beyond tensors: a state per head and part, or per thread,
// and a block of tokens per thread; nothing that grows with N.
#include <torch/library.h>

#include <cstring>

#include "../cpu/tensors.h"
#include "cpu.h"

namespace {

using at::Tensor;

const LinearAttentionKernels& kernels() {
#if defined(LINEAR_VIT_X86)
  return choose(&linear_attention_avx512, &linear_attention_avx2, &linear_attention_portable);
#else
  return choose<LinearAttentionKernels>(nullptr, nullptr, &linear_attention_portable);
#endif
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

// One call: sizes, the cuts of keys and queries, and the steps on one key/value head.
struct Call {
  const LinearAttentionKernels& kernel;
  ElementType element;
  int64_t batch, kv_heads, group, head_dim, heads;
  Cut keys, queries;
  int64_t state_floats, scratch_floats;

  Call(const Tensor& x, int64_t kv_heads_, int64_t group_, int64_t key_tokens, int64_t query_tokens)
      : kernel(kernels()), element(element_type(x)), batch(x.size(0)), kv_heads(kv_heads_),
        group(group_), head_dim(x.size(3)), heads(batch * kv_heads), keys(heads, 1, key_tokens),
        queries(heads, group, query_tokens),
        state_floats((kernel.state_floats(head_dim) + 15) / 16 * 16),
        scratch_floats((kernel.scratch_floats(head_dim) + 15) / 16 * 16) {}

  bool whole_heads() const { return keys.parts == 1 && queries.parts == 1; }

  Tensor states(const Tensor& like, int64_t parts) const {
    return empty_floats(like, {heads, parts, state_floats});
  }

  float* clear(float* state) const {
    return static_cast<float*>(std::memset(state, 0, state_floats * sizeof(float)));
  }

  void accumulate(const Tensor& k, const Tensor& v, int64_t head, int64_t part, float* state,
                  float* scratch) const {
    const int64_t i = head / kv_heads, h = head % kv_heads;
    keys.ranges(part, [&](int64_t, int64_t first, int64_t count) {
      kernel.accumulate(element, head_dim, count, rows(k, i, h, first), rows(v, i, h, first),
                        state, scratch);
    });
  }

  void apply(const Tensor& q, const Tensor& out, int64_t head, int64_t part, const float* state,
             float eps, float* scratch) const {
    const int64_t i = head / kv_heads, h = head % kv_heads * group;
    queries.ranges(part, [&](int64_t g, int64_t first, int64_t count) {
      kernel.apply(element, head_dim, count, rows(q, i, h + g, first), rows(out, i, h + g, first),
                   state, eps, scratch);
    });
  }

  void query_gradient(const Tensor& dout, const Tensor& q, const Tensor& dq, int64_t head,
                      int64_t part, const float* state, float eps, float* gradient,
                      float* scratch) const {
    const int64_t i = head / kv_heads, h = head % kv_heads * group;
    queries.ranges(part, [&](int64_t g, int64_t first, int64_t count) {
      kernel.query_gradient(element, head_dim, count, rows(dout, i, h + g, first),
                            rows(q, i, h + g, first), rows(dq, i, h + g, first), state, eps,
                            gradient, scratch);
    });
  }

  void key_gradient(const Tensor& k, const Tensor& v, const Tensor& dk, const Tensor& dv,
                    int64_t head, int64_t part, const float* gradient, float* scratch) const {
    const int64_t i = head / kv_heads, h = head % kv_heads;
    keys.ranges(part, [&](int64_t, int64_t first, int64_t count) {
      kernel.key_gradient(element, head_dim, count, rows(k, i, h, first), rows(v, i, h, first),
                          rows(dk, i, h, first), rows(dv, i, h, first), gradient, scratch);
    });
  }

  // The parts of one head's state, added up.
  void finish(int64_t parts, float* state) const {
    kernel.add(head_dim, parts, state_floats, state);
    kernel.spread_nan(head_dim, state);
  }

  void load(const Tensor& S, const Tensor& z, int64_t head, float* state) const {
    kernel.load_state(head_dim, S.data_ptr<float>() + head * 2 * head_dim * head_dim,
                      z.data_ptr<float>() + head * 2 * head_dim, state);
  }

  void store(const float* state, int64_t head, const Tensor& S, const Tensor& z) const {
    kernel.store_state(head_dim, state, S.data_ptr<float>() + head * 2 * head_dim * head_dim,
                       z.data_ptr<float>() + head * 2 * head_dim);
  }

  // function(head, part, that part's state, scratch) for all of `states`.
  template <typename Function>
  void for_parts(const Tensor& states, const Function& function) const {
    const int64_t parts = states.size(1);
    float* const memory = states.data_ptr<float>();
    parallel(heads * parts, scratch_floats, [&](int64_t item, float* scratch) {
      function(item / parts, item % parts, memory + item * state_floats, scratch);
    });
  }

  // The states of k and v, each head's in its first part.
  Tensor key_states(const Tensor& k, const Tensor& v) const {
    const Tensor all = states(k, keys.parts);
    for_parts(all, [&](int64_t head, int64_t part, float* state, float* scratch) {
      accumulate(k, v, head, part, clear(state), scratch);
    });
    finish_all(all);
    return all;
  }

  Tensor loaded_states(const Tensor& S, const Tensor& z) const {
    const Tensor all = states(S, 1);
    for_parts(all, [&](int64_t head, int64_t, float* state, float*) { load(S, z, head, state); });
    return all;
  }

  void finish_all(const Tensor& all) const {
    for_heads(all, [&](int64_t, float* state) { finish(all.size(1), state); });
  }

  void store_all(const Tensor& all, const Tensor& S, const Tensor& z) const {
    for_heads(all, [&](int64_t head, float* state) { store(state, head, S, z); });
  }

  // function(head, its first state)
  template <typename Function>
  void for_heads(const Tensor& states, const Function& function) const {
    parallel(heads, 0, [&](int64_t head, float*) { function(head, state_of(states, head)); });
  }

  float* state_of(const Tensor& states, int64_t head) const {
    return states.data_ptr<float>() + head * states.size(1) * state_floats;
  }

  // out, for all heads and parts, of each head's first state.
  void apply_all(const Tensor& q, const Tensor& out, const Tensor& all, float eps) const {
    parallel(heads * queries.parts, scratch_floats, [&](int64_t item, float* scratch) {
      const int64_t head = item / queries.parts;
      apply(q, out, head, item % queries.parts, state_of(all, head), eps, scratch);
    });
  }

  // dq, and the states' gradients, each head's in its first part.
  Tensor query_gradients(const Tensor& dout, const Tensor& q, const Tensor& dq, const Tensor& all,
                         float eps) const {
    const Tensor gradients = states(q, queries.parts);
    for_parts(gradients, [&](int64_t head, int64_t part, float* gradient, float* scratch) {
      query_gradient(dout, q, dq, head, part, state_of(all, head), eps, clear(gradient), scratch);
    });
    finish_all(gradients);
    return gradients;
  }

  void key_gradients(const Tensor& k, const Tensor& v, const Tensor& dk, const Tensor& dv,
                     const Tensor& gradients) const {
    parallel(heads * keys.parts, scratch_floats, [&](int64_t item, float* scratch) {
      const int64_t head = item / keys.parts;
      key_gradient(k, v, dk, dv, head, item % keys.parts, state_of(gradients, head), scratch);
    });
  }
};

using Pair = std::tuple<Tensor, Tensor>;
using Triple = std::tuple<Tensor, Tensor, Tensor>;

Pair empty_state(const Tensor& k, bool save) {
  const int64_t batch = k.size(0), heads = k.size(1), head_dim = k.size(3);
  if (!save) return {empty_floats(k, {0}), empty_floats(k, {0})};
  return {empty_floats(k, {batch, heads, 2 * head_dim, head_dim}),
          empty_floats(k, {batch, heads, 2 * head_dim})};
}

Pair forward_into(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& out, float eps,
                  bool save_state) {
  const Call call(k, k.size(1), q.size(1) / k.size(1), k.size(2), q.size(2));
  const auto [S, z] = empty_state(k, save_state);
  if (!call.whole_heads()) {
    const Tensor all = call.key_states(k, v);
    if (save_state) call.store_all(all, S, z);
    call.apply_all(q, out, all, eps);
    return {S, z};
  }
  // The lambda can't take a structured binding's name in C++17.
  const Tensor &S_out = S, &z_out = z;
  parallel(call.heads, call.state_floats + call.scratch_floats, [&](int64_t head, float* scratch) {
    float* const state = scratch + call.scratch_floats;
    call.accumulate(k, v, head, 0, call.clear(state), scratch);
    call.finish(1, state);
    if (save_state) call.store(state, head, S_out, z_out);
    call.apply(q, out, head, 0, state, eps, scratch);
  });
  return {S, z};
}

void backward_into(const Tensor& dout, const Tensor& q, const Tensor& k, const Tensor& v,
                   const Tensor& S_any, const Tensor& z_any, float eps, const Tensor& dq,
                   const Tensor& dk, const Tensor& dv) {
  const Call call(k, k.size(1), q.size(1) / k.size(1), k.size(2), q.size(2));
  const Tensor S = S_any.contiguous(), z = z_any.contiguous();
  const bool saved = S.numel() > 0;
  if (!call.whole_heads()) {
    const Tensor all = saved ? call.loaded_states(S, z) : call.key_states(k, v);
    call.key_gradients(k, v, dk, dv, call.query_gradients(dout, q, dq, all, eps));
    return;
  }
  const int64_t floats = 2 * call.state_floats + call.scratch_floats;
  parallel(call.heads, floats, [&](int64_t head, float* scratch) {
    float* const state = scratch + call.scratch_floats;
    float* const gradient = state + call.state_floats;
    if (saved) {
      call.load(S, z, head, state);
    } else {
      call.accumulate(k, v, head, 0, call.clear(state), scratch);
      call.finish(1, state);
    }
    call.query_gradient(dout, q, dq, head, 0, state, eps, call.clear(gradient), scratch);
    call.finish(1, gradient);
    call.key_gradient(k, v, dk, dv, head, 0, gradient, scratch);
  });
}

// ---- operators -----------------------------------------------------------------------------------

Triple forward(const Tensor& q, const Tensor& k, const Tensor& v, double eps, bool save_state) {
  const Tensor out = output_like(q);
  const auto [S, z] = forward_into(q, k, v, out, static_cast<float>(eps), save_state);
  return {out, S, z};
}

Triple backward(const Tensor& dout, const Tensor& q, const Tensor& k, const Tensor& v,
                const Tensor& S, const Tensor& z, double eps) {
  const Tensor dq = output_like(q), dk = output_like(k), dv = output_like(v);
  backward_into(readable(dout), q, k, v, S, z, static_cast<float>(eps), dq, dk, dv);
  return {dq, dk, dv};
}

// Part `i` of (B, N, 3, H, D), as (B, H, N, D).
Tensor unpacked(const Tensor& qkv, int64_t i) { return qkv.select(2, i).transpose(1, 2); }

Triple forward_packed(const Tensor& qkv, double eps, bool save_state) {
  const Tensor out = output_like(qkv.select(2, 0));
  const auto [S, z] =
      forward_into(unpacked(qkv, 0), unpacked(qkv, 1), unpacked(qkv, 2), out.transpose(1, 2),
                   static_cast<float>(eps), save_state);
  return {out, S, z};
}

Tensor backward_packed(const Tensor& dout, const Tensor& qkv, const Tensor& S, const Tensor& z,
                       double eps) {
  const Tensor dqkv = output_like(qkv);
  backward_into(readable(dout).transpose(1, 2), unpacked(qkv, 0), unpacked(qkv, 1),
                unpacked(qkv, 2), S, z, static_cast<float>(eps), unpacked(dqkv, 0),
                unpacked(dqkv, 1), unpacked(dqkv, 2));
  return dqkv;
}

Pair state(const Tensor& k, const Tensor& v) {
  const Call call(k, k.size(1), 1, k.size(2), 0);
  const auto [S, z] = empty_state(k, true);
  call.store_all(call.key_states(k, v), S, z);
  return {S, z};
}

Pair state_backward(const Tensor& dS, const Tensor& dz, const Tensor& k, const Tensor& v) {
  const Call call(k, k.size(1), 1, k.size(2), 0);
  const Tensor dk = output_like(k), dv = output_like(v);
  call.key_gradients(k, v, dk, dv, call.loaded_states(dS.contiguous(), dz.contiguous()));
  return {dk, dv};
}

Tensor apply(const Tensor& q, const Tensor& S, const Tensor& z, double eps) {
  const Call call(q, S.size(1), q.size(1) / S.size(1), 0, q.size(2));
  const Tensor out = output_like(q);
  call.apply_all(q, out, call.loaded_states(S.contiguous(), z.contiguous()),
                 static_cast<float>(eps));
  return out;
}

Triple apply_backward(const Tensor& dout, const Tensor& q, const Tensor& S_any,
                      const Tensor& z_any, double eps) {
  const Tensor S = S_any.contiguous(), z = z_any.contiguous();
  const Call call(q, S.size(1), q.size(1) / S.size(1), 0, q.size(2));
  const Tensor dq = output_like(q), dS = empty_floats(q, S.sizes()),
               dz = empty_floats(q, z.sizes());
  call.store_all(call.query_gradients(readable(dout), q, dq, call.loaded_states(S, z),
                                      static_cast<float>(eps)),
                 dS, dz);
  return {dq, dS, dz};
}

std::string instruction_set() { return kernels().name; }

// FLOP of the roofline's probe, which ran on every thread.
double probe(bool loading, int64_t repeats) {
  const int64_t threads = at::get_num_threads();
  std::vector<double> flop(threads);
  parallel(threads, kernels().scratch_floats(64), [&](int64_t item, float* scratch) {
    flop[item] = kernels().probe(loading, repeats, scratch);
  });
  return std::accumulate(flop.begin(), flop.end(), 0.0);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(linear_vit, m) {
  const std::vector<at::Tag> tags = {at::Tag::pt2_compliant_tag};
  m.def(
      "cpu_linear_attention(Tensor q, Tensor k, Tensor v, float eps, bool save_state)"
      " -> (Tensor, Tensor, Tensor)",
      tags);
  m.def(
      "cpu_linear_attention_backward(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor S, Tensor z,"
      " float eps) -> (Tensor, Tensor, Tensor)",
      tags);
  m.def(
      "cpu_linear_attention_packed(Tensor qkv, float eps, bool save_state)"
      " -> (Tensor, Tensor, Tensor)",
      tags);
  m.def(
      "cpu_linear_attention_packed_backward(Tensor dout, Tensor qkv, Tensor S, Tensor z, float eps)"
      " -> Tensor",
      tags);
  m.def("cpu_linear_attention_state(Tensor k, Tensor v) -> (Tensor, Tensor)", tags);
  m.def(
      "cpu_linear_attention_state_backward(Tensor dS, Tensor dz, Tensor k, Tensor v)"
      " -> (Tensor, Tensor)",
      tags);
  m.def("cpu_linear_attention_apply(Tensor q, Tensor S, Tensor z, float eps) -> Tensor", tags);
  m.def(
      "cpu_linear_attention_apply_backward(Tensor dout, Tensor q, Tensor S, Tensor z, float eps)"
      " -> (Tensor, Tensor, Tensor)",
      tags);
  m.def("cpu_linear_attention_instruction_set() -> str", instruction_set);
  m.def("cpu_linear_attention_probe(bool loading, int repeats) -> float", probe);
}

TORCH_LIBRARY_IMPL(linear_vit, CPU, m) {
  m.impl("cpu_linear_attention", forward);
  m.impl("cpu_linear_attention_backward", backward);
  m.impl("cpu_linear_attention_packed", forward_packed);
  m.impl("cpu_linear_attention_packed_backward", backward_packed);
  m.impl("cpu_linear_attention_state", state);
  m.impl("cpu_linear_attention_state_backward", state_backward);
  m.impl("cpu_linear_attention_apply", apply);
  m.impl("cpu_linear_attention_apply_backward", apply_backward);
}
