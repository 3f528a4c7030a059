// Softmax attention's CUDA operators: tensors in, cuda.cu's launchers called, tensors out.
// Shapes and dtypes have been checked by the public function.
#include <torch/library.h>

#include "../cuda/tensors.h"
#include "cuda.h"

namespace {

using at::Tensor;

std::tuple<Tensor, Tensor> forward(const Tensor& q, const Tensor& k, const Tensor& v,
                                   double scale) {
  const c10::cuda::CUDAGuard guard(q.device());
  Tensor out = empty_in_order(q);
  Tensor lse = empty_floats(q, {q.size(0), q.size(1), q.size(2)});
  run("softmax_attention_forward", softmax_attention_forward,
      SoftmaxForwardArguments{element_type(q), static_cast<int32_t>(q.size(3)), q.size(0),
                              q.size(1), q.size(1) / k.size(1), q.size(2), k.size(2), view(q),
                              view(k), view(v), view(out), lse.data_ptr<float>(),
                              static_cast<float>(scale)});
  return {out, lse};
}

std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& dout_any, const Tensor& q,
                                            const Tensor& k, const Tensor& v, const Tensor& out_any,
                                            const Tensor& lse_any, double scale) {
  const c10::cuda::CUDAGuard guard(q.device());
  const Tensor dout = readable(dout_any), out = readable(out_any), lse = lse_any.contiguous();
  Tensor dq = empty_in_order(q), dk = empty_in_order(k), dv = empty_in_order(v);
  Tensor delta = at::empty_like(lse);
  run("softmax_attention_backward", softmax_attention_backward,
      SoftmaxBackwardArguments{element_type(q), static_cast<int32_t>(q.size(3)), q.size(0),
                               q.size(1), q.size(1) / k.size(1), q.size(2), k.size(2), view(dout),
                               view(q), view(k), view(v), view(out), view(dq), view(dk), view(dv),
                               lse.data_ptr<float>(), delta.data_ptr<float>(),
                               static_cast<float>(scale)});
  return {dq, dk, dv};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(linear_vit, m) {
  const std::vector<at::Tag> tags = {at::Tag::pt2_compliant_tag};
  m.def(
      "cuda_softmax_attention(Tensor q, Tensor k, Tensor v, float scale) -> (Tensor, Tensor)",
      tags);
  m.def(
      "cuda_softmax_attention_backward(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out,"
      " Tensor lse, float scale) -> (Tensor, Tensor, Tensor)",
      tags);
}

TORCH_LIBRARY_IMPL(linear_vit, CUDA, m) {
  m.impl("cuda_softmax_attention", forward);
  m.impl("cuda_softmax_attention_backward", backward);
}
