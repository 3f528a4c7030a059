// Linear attention's CUDA operators: tensors in, cuda.cu's launchers called, tensors out.
// Shapes and dtypes have been checked by the public functions.
#include <torch/library.h>

#include "../cuda/tensors.h"
#include "cuda.h"

namespace {

using at::Tensor;

// S, z of keys and values; dS, dz of queries and output gradients, with a scale and a weight a row.
std::tuple<Tensor, Tensor> feature_outer(const Tensor& x, const Tensor& w, int64_t kv_heads,
                                         const float* row_scale, const float* row_weight) {
  const int64_t batch = x.size(0), heads = x.size(1), tokens = x.size(2), head_dim = x.size(3);
  Tensor S = empty_floats(x, {batch, kv_heads, 2 * head_dim, head_dim});
  Tensor z = empty_floats(x, {batch, kv_heads, 2 * head_dim});
  const int64_t num_splits =
      linear_attention_num_splits(batch * kv_heads, tokens, multiprocessors());
  Tensor workspace =
      empty_floats(x, {num_splits > 1 ? num_splits * (S.numel() + z.numel()) : 0});
  run("linear_attention_feature_outer", linear_attention_feature_outer,
      FeatureOuterArguments{element_type(x), static_cast<int32_t>(head_dim), batch, kv_heads,
                            heads / kv_heads, tokens, num_splits, view(x), view(w), row_scale,
                            row_weight, S.data_ptr<float>(), z.data_ptr<float>(),
                            workspace.data_ptr<float>()});
  return {S, z};
}

std::tuple<Tensor, Tensor> state(const Tensor& k, const Tensor& v) {
  const c10::cuda::CUDAGuard guard(k.device());
  return feature_outer(k, v, k.size(1), nullptr, nullptr);
}

std::tuple<Tensor, Tensor> state_backward(const Tensor& dS_any, const Tensor& dz_any,
                                          const Tensor& k, const Tensor& v) {
  const c10::cuda::CUDAGuard guard(k.device());
  const Tensor dS = dS_any.contiguous(), dz = dz_any.contiguous();
  Tensor dk = empty_in_order(k), dv = empty_in_order(v);
  run("linear_attention_key_value_gradient", linear_attention_key_value_gradient,
      KeyValueGradientArguments{element_type(k), static_cast<int32_t>(k.size(3)), k.size(0),
                                k.size(1), k.size(2), view(k), view(v), view(dk), view(dv),
                                dS.data_ptr<float>(), dz.data_ptr<float>()});
  return {dk, dv};
}

Tensor apply(const Tensor& q, const Tensor& S_any, const Tensor& z_any, double eps) {
  const c10::cuda::CUDAGuard guard(q.device());
  const Tensor S = S_any.contiguous(), z = z_any.contiguous();
  Tensor out = empty_in_order(q);
  run("linear_attention_apply", linear_attention_apply,
      ApplyArguments{element_type(q), static_cast<int32_t>(q.size(3)), q.size(0), q.size(1),
                     q.size(1) / S.size(1), q.size(2), view(q), view(out), S.data_ptr<float>(),
                     z.data_ptr<float>(), static_cast<float>(eps)});
  return out;
}

std::tuple<Tensor, Tensor, Tensor> apply_backward(const Tensor& dout_any, const Tensor& q,
                                                  const Tensor& S_any, const Tensor& z_any,
                                                  double eps) {
  const c10::cuda::CUDAGuard guard(q.device());
  const Tensor dout = readable(dout_any), S = S_any.contiguous(), z = z_any.contiguous();
  Tensor dq = empty_in_order(q);
  Tensor row_scale = empty_floats(q, {q.size(0), q.size(1), q.size(2)});
  Tensor row_weight = empty_floats(q, {q.size(0), q.size(1), q.size(2)});
  run("linear_attention_query_gradient", linear_attention_query_gradient,
      QueryGradientArguments{element_type(q), static_cast<int32_t>(q.size(3)), q.size(0),
                             q.size(1), q.size(1) / S.size(1), q.size(2), view(dout), view(q),
                             view(dq), S.data_ptr<float>(), z.data_ptr<float>(),
                             static_cast<float>(eps), row_scale.data_ptr<float>(),
                             row_weight.data_ptr<float>()});
  auto [dS, dz] = feature_outer(q, dout, S.size(1), row_scale.data_ptr<float>(),
                                row_weight.data_ptr<float>());
  return {dq, dS, dz};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(linear_vit, m) {
  const std::vector<at::Tag> tags = {at::Tag::pt2_compliant_tag};
  m.def("cuda_linear_attention_state(Tensor k, Tensor v) -> (Tensor, Tensor)", tags);
  m.def(
      "cuda_linear_attention_state_backward(Tensor dS, Tensor dz, Tensor k, Tensor v)"
      " -> (Tensor, Tensor)",
      tags);
  m.def("cuda_linear_attention_apply(Tensor q, Tensor S, Tensor z, float eps) -> Tensor", tags);
  m.def(
      "cuda_linear_attention_apply_backward(Tensor dout, Tensor q, Tensor S, Tensor z, float eps)"
      " -> (Tensor, Tensor, Tensor)",
      tags);
}

TORCH_LIBRARY_IMPL(linear_vit, CUDA, m) {
  m.impl("cuda_linear_attention_state", state);
  m.impl("cuda_linear_attention_state_backward", state_backward);
  m.impl("cuda_linear_attention_apply", apply);
  m.impl("cuda_linear_attention_apply_backward", apply_backward);
}
