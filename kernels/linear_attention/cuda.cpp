// Linear attention's CUDA operators: tensors in, cuda.cu's launchers called, tensors out.
// Shapes and dtypes have been checked by the public functions. What each returns is in operators.py.
#include <torch/library.h>

#include "../cuda/tensors.h"
#include "cuda.h"

namespace {

using at::Tensor;
using Arguments = LinearAttentionArguments;
using Launcher = cudaError_t (*)(const Arguments*, cudaStream_t);

// Of queries (B, H, N, D) and keys (B, Hk, M, D); an operator that has only one of them gives it twice.
Arguments arguments_of(const Tensor& q, const Tensor& k, double eps) {
  Arguments arguments{};
  arguments.element = element_type(q);
  arguments.head_dim = static_cast<int32_t>(q.size(3));
  arguments.batch = q.size(0);
  arguments.kv_heads = k.size(1);
  arguments.group = k.size(1) == 0 ? 1 : q.size(1) / k.size(1);
  arguments.queries = q.size(2);
  arguments.keys = k.size(2);
  arguments.multiprocessors = multiprocessors();
  arguments.eps = static_cast<float>(eps);
  arguments.q = view(q);
  arguments.k = view(k);
  return arguments;
}

// Null for an empty one: a state that is not kept.
float* floats(const Tensor& x) { return x.numel() == 0 ? nullptr : x.data_ptr<float>(); }

void run_pass(const char* name, Launcher launcher, LinearAttentionPass pass, Arguments& arguments,
              const Tensor& like) {
  const Tensor workspace = empty_floats(like, {linear_attention_workspace(&arguments, pass)});
  arguments.workspace = floats(workspace);
  run(name, launcher, arguments);
}

std::tuple<Tensor, Tensor> empty_state(const Tensor& x, int64_t heads) {
  const int64_t batch = x.size(0), head_dim = x.size(3);
  return {empty_floats(x, {batch, heads, 2 * head_dim, head_dim}),
          empty_floats(x, {batch, heads, 2 * head_dim})};
}

// ---- the whole operation ---------------------------------------------------------------------------

std::tuple<Tensor, Tensor> forward(const Tensor& q, const Tensor& k, const Tensor& v, double eps,
                                   bool save_state, const Tensor& out) {
  auto [S, z] = save_state ? empty_state(k, k.size(1))
                           : std::make_tuple(empty_floats(k, {0}), empty_floats(k, {0}));
  Arguments arguments = arguments_of(q, k, eps);
  arguments.v = view(v);
  arguments.out = view(out);
  arguments.S = floats(S);
  arguments.z = floats(z);
  run_pass("linear_attention_forward", linear_attention_forward, kForward, arguments, q);
  return {S, z};
}

// dq, dk and dv have to be there: a launch that makes one of them may make them all.
void backward(const Tensor& dout, const Tensor& q, const Tensor& k, const Tensor& v,
              const Tensor& S_any, const Tensor& z_any, double eps, const Tensor& dq,
              const Tensor& dk, const Tensor& dv, bool only_dq) {
  const Tensor S = contiguous_and_aligned(S_any), z = z_any.contiguous();
  Arguments arguments = arguments_of(q, k, eps);
  arguments.v = view(v);
  arguments.dout = view(dout);
  arguments.dq = view(dq);
  arguments.dk = view(dk);
  arguments.dv = view(dv);
  arguments.S = floats(S);
  arguments.z = floats(z);
  arguments.only_dq = only_dq;
  run_pass("linear_attention_backward", linear_attention_backward, kBackward, arguments, q);
}

std::tuple<Tensor, Tensor, Tensor> attention(const Tensor& q, const Tensor& k, const Tensor& v,
                                             double eps, bool save_state) {
  const c10::cuda::CUDAGuard guard(q.device());
  Tensor out = empty_in_order(q);
  auto [S, z] = forward(q, k, v, eps, save_state, out);
  return {out, S, z};
}

std::tuple<Tensor, Tensor, Tensor> attention_backward(const Tensor& dout, const Tensor& q,
                                                      const Tensor& k, const Tensor& v,
                                                      const Tensor& S, const Tensor& z,
                                                      double eps, int64_t wanted) {
  const c10::cuda::CUDAGuard guard(q.device());
  Tensor dq = empty_in_order(q), dk = empty_in_order(k), dv = empty_in_order(v);
  backward(readable(dout), q, k, v, S, z, eps, dq, dk, dv, wanted == 1);
  return {if_wanted(dq, wanted, 0), if_wanted(dk, wanted, 1), if_wanted(dv, wanted, 2)};
}

// ---- packed: qkv (B, N, 3, H, D) read in place, one dqkv written -----------------------------------

Tensor unpacked(const Tensor& qkv, int64_t which) { return qkv.select(2, which).transpose(1, 2); }

std::tuple<Tensor, Tensor, Tensor> attention_packed(const Tensor& qkv, double eps,
                                                    bool save_state) {
  const c10::cuda::CUDAGuard guard(qkv.device());
  Tensor out = empty_in_order(qkv.select(2, 0));
  auto [S, z] = forward(unpacked(qkv, 0), unpacked(qkv, 1), unpacked(qkv, 2), eps, save_state,
                        out.transpose(1, 2));
  return {out, S, z};
}

Tensor attention_packed_backward(const Tensor& dout, const Tensor& qkv, const Tensor& S,
                                 const Tensor& z, double eps) {
  const c10::cuda::CUDAGuard guard(qkv.device());
  Tensor dqkv = empty_in_order(qkv);
  backward(readable(dout).transpose(1, 2), unpacked(qkv, 0), unpacked(qkv, 1), unpacked(qkv, 2), S,
           z, eps, unpacked(dqkv, 0), unpacked(dqkv, 1), unpacked(dqkv, 2), false);
  return dqkv;
}

// ---- the state, and its application ----------------------------------------------------------------

std::tuple<Tensor, Tensor> state(const Tensor& k, const Tensor& v) {
  const c10::cuda::CUDAGuard guard(k.device());
  auto [S, z] = empty_state(k, k.size(1));
  Arguments arguments = arguments_of(k, k, 0.0);
  arguments.v = view(v);
  arguments.S = floats(S);
  arguments.z = floats(z);
  run_pass("linear_attention_state", linear_attention_state, kState, arguments, k);
  return {S, z};
}

std::tuple<Tensor, Tensor> state_backward(const Tensor& dS_any, const Tensor& dz_any,
                                          const Tensor& k, const Tensor& v, int64_t wanted) {
  const c10::cuda::CUDAGuard guard(k.device());
  const Tensor dS = contiguous_and_aligned(dS_any), dz = dz_any.contiguous();
  Tensor dk = empty_in_order(k), dv = empty_in_order(v);
  Arguments arguments = arguments_of(k, k, 0.0);
  arguments.v = view(v);
  arguments.dk = view(dk);
  arguments.dv = view(dv);
  arguments.dS = floats(dS);
  arguments.dz = floats(dz);
  run_pass("linear_attention_state_backward", linear_attention_state_backward, kStateBackward,
           arguments, k);
  return {if_wanted(dk, wanted, 0), if_wanted(dv, wanted, 1)};
}

Arguments apply_arguments(const Tensor& q, const Tensor& S, const Tensor& z, double eps) {
  Arguments arguments = arguments_of(q, q, eps);
  arguments.kv_heads = S.size(1);
  arguments.group = S.size(1) == 0 ? 1 : q.size(1) / S.size(1);
  arguments.keys = 0;
  arguments.S = floats(S);
  arguments.z = floats(z);
  return arguments;
}

Tensor apply(const Tensor& q, const Tensor& S_any, const Tensor& z_any, double eps) {
  const c10::cuda::CUDAGuard guard(q.device());
  const Tensor S = contiguous_and_aligned(S_any), z = z_any.contiguous();
  Tensor out = empty_in_order(q);
  Arguments arguments = apply_arguments(q, S, z, eps);
  arguments.out = view(out);
  run_pass("linear_attention_apply", linear_attention_apply, kApply, arguments, q);
  return out;
}

std::tuple<Tensor, Tensor, Tensor> apply_backward(const Tensor& dout_any, const Tensor& q,
                                                  const Tensor& S_any, const Tensor& z_any,
                                                  double eps, int64_t wanted) {
  const c10::cuda::CUDAGuard guard(q.device());
  const Tensor dout = readable(dout_any);
  const Tensor S = contiguous_and_aligned(S_any), z = z_any.contiguous();
  Tensor dq = empty_in_order(q);
  auto [dS, dz] = empty_state(q, S.size(1));
  Arguments arguments = apply_arguments(q, S, z, eps);
  arguments.dout = view(dout);
  arguments.dq = view(dq);
  arguments.dS = floats(dS);
  arguments.dz = floats(dz);
  arguments.only_dq = wanted == 1;
  run_pass("linear_attention_apply_backward", linear_attention_apply_backward, kApplyBackward,
           arguments, q);
  return {if_wanted(dq, wanted, 0), if_wanted(dS, wanted, 1), if_wanted(dz, wanted, 2)};
}

std::string describe(const Tensor& q) {
  return linear_attention_describe(element_type(q), static_cast<int32_t>(q.size(-1)));
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(linear_vit, m) {
  const std::vector<at::Tag> tags = {at::Tag::pt2_compliant_tag};
  m.def(
      "cuda_linear_attention(Tensor q, Tensor k, Tensor v, float eps, bool save_state)"
      " -> (Tensor, Tensor, Tensor)",
      tags);
  m.def(
      "cuda_linear_attention_backward(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor S, Tensor z,"
      " float eps, int wanted) -> (Tensor, Tensor, Tensor)",
      tags);
  m.def(
      "cuda_linear_attention_packed(Tensor qkv, float eps, bool save_state)"
      " -> (Tensor, Tensor, Tensor)",
      tags);
  m.def(
      "cuda_linear_attention_packed_backward(Tensor dout, Tensor qkv, Tensor S, Tensor z, float eps)"
      " -> Tensor",
      tags);
  m.def("cuda_linear_attention_state(Tensor k, Tensor v) -> (Tensor, Tensor)", tags);
  m.def(
      "cuda_linear_attention_state_backward(Tensor dS, Tensor dz, Tensor k, Tensor v, int wanted)"
      " -> (Tensor, Tensor)",
      tags);
  m.def("cuda_linear_attention_apply(Tensor q, Tensor S, Tensor z, float eps) -> Tensor", tags);
  m.def(
      "cuda_linear_attention_apply_backward(Tensor dout, Tensor q, Tensor S, Tensor z, float eps,"
      " int wanted)"
      " -> (Tensor, Tensor, Tensor)",
      tags);
  m.def("cuda_linear_attention_describe(Tensor q) -> str", tags);
}

TORCH_LIBRARY_IMPL(linear_vit, CUDA, m) {
  m.impl("cuda_linear_attention", attention);
  m.impl("cuda_linear_attention_backward", attention_backward);
  m.impl("cuda_linear_attention_packed", attention_packed);
  m.impl("cuda_linear_attention_packed_backward", attention_packed_backward);
  m.impl("cuda_linear_attention_state", state);
  m.impl("cuda_linear_attention_state_backward", state_backward);
  m.impl("cuda_linear_attention_apply", apply);
  m.impl("cuda_linear_attention_apply_backward", apply_backward);
  m.impl("cuda_linear_attention_describe", describe);
}
