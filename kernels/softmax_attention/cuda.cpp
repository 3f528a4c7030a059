// Softmax attention's CUDA operators: tensors in, cuda.cu's launchers called, tensors out.
// Shapes and dtypes have been checked by the public function.
#include <torch/library.h>

#include <optional>
#include <string>

#include "../cuda/tensors.h"
#include "cuda.h"

namespace {

using at::Tensor;

struct QueryKeyValue {
  Tensor q, k, v;
};

// (B, H, N, D) views of a (B, N, 3, H, D) projection.
QueryKeyValue unpack(const Tensor& qkv) {
  auto part = [&](int64_t i) { return qkv.select(2, i).transpose(1, 2); };
  return {part(0), part(1), part(2)};
}

// (B, M) bool, contiguous, or undefined where all keys are there.
Tensor readable_mask(const std::optional<Tensor>& key_mask) {
  return key_mask.has_value() ? key_mask->contiguous() : Tensor();
}

const uint8_t* bytes(const Tensor& mask) {
  return mask.defined() ? static_cast<const uint8_t*>(mask.const_data_ptr()) : nullptr;
}

// Fills `out`; returns lse.
Tensor run_forward(const QueryKeyValue& in, const std::optional<Tensor>& key_mask,
                   const Tensor& out, double scale) {
  const auto& [q, k, v] = in;
  const Tensor mask = readable_mask(key_mask);
  Tensor lse = empty_floats(q, {q.size(0), q.size(1), q.size(2)});
  run("softmax_attention_forward", softmax_attention_forward,
      SoftmaxForwardArguments{element_type(q), static_cast<int32_t>(q.size(3)), q.size(0),
                              q.size(1), q.size(1) / k.size(1), q.size(2), k.size(2), view(q),
                              view(k), view(v), view(out), bytes(mask), lse.data_ptr<float>(),
                              static_cast<float>(scale)});
  return lse;
}

// Fills `gradients`.
void run_backward(const Tensor& dout_any, const QueryKeyValue& in,
                  const std::optional<Tensor>& key_mask, const Tensor& out_any,
                  const Tensor& lse_any, const QueryKeyValue& gradients, double scale,
                  int64_t wanted) {
  const Tensor mask = readable_mask(key_mask);
  const Tensor dout = readable(dout_any), out = readable(out_any), lse = lse_any.contiguous();
  const auto& [q, k, v] = in;
  const auto& [dq, dk, dv] = gradients;
  Tensor delta = at::empty_like(lse);
  run("softmax_attention_backward", softmax_attention_backward,
      SoftmaxBackwardArguments{element_type(q), static_cast<int32_t>(q.size(3)), q.size(0),
                               q.size(1), q.size(1) / k.size(1), q.size(2), k.size(2), view(dout),
                               view(q), view(k), view(v), view(out), view(dq), view(dk), view(dv),
                               bytes(mask), lse.data_ptr<float>(), delta.data_ptr<float>(),
                               static_cast<float>(scale), static_cast<int32_t>(wanted)});
}

std::tuple<Tensor, Tensor> forward(const Tensor& q, const Tensor& k, const Tensor& v,
                                   const std::optional<Tensor>& key_mask, double scale) {
  const c10::cuda::CUDAGuard guard(q.device());
  Tensor out = empty_in_order(q);
  Tensor lse = run_forward({q, k, v}, key_mask, out, scale);
  return {out, lse};
}

std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& dout, const Tensor& q, const Tensor& k,
                                            const Tensor& v, const std::optional<Tensor>& key_mask,
                                            const Tensor& out, const Tensor& lse, double scale,
                                            int64_t wanted) {
  const c10::cuda::CUDAGuard guard(q.device());
  const QueryKeyValue d{empty_in_order(q), empty_in_order(k), empty_in_order(v)};
  run_backward(dout, {q, k, v}, key_mask, out, lse, d, scale, wanted);
  return {if_wanted(d.q, wanted, 0), if_wanted(d.k, wanted, 1), if_wanted(d.v, wanted, 2)};
}

std::tuple<Tensor, Tensor> packed_forward(const Tensor& qkv, const std::optional<Tensor>& key_mask,
                                          double scale) {
  const c10::cuda::CUDAGuard guard(qkv.device());
  Tensor out = empty_in_order(qkv.select(2, 0));
  Tensor lse = run_forward(unpack(qkv), key_mask, out.transpose(1, 2), scale);
  return {out, lse};
}

Tensor packed_backward(const Tensor& dout, const Tensor& qkv, const std::optional<Tensor>& key_mask,
                       const Tensor& out, const Tensor& lse, double scale) {
  const c10::cuda::CUDAGuard guard(qkv.device());
  Tensor dqkv = empty_in_order(qkv);
  run_backward(dout.transpose(1, 2), unpack(qkv), key_mask, out.transpose(1, 2), lse, unpack(dqkv),
               scale, 0b111);
  return dqkv;
}

std::string describe(const Tensor& q) {
  char line[128];
  softmax_attention_describe(element_type(q), static_cast<int32_t>(q.size(-1)), line, sizeof(line));
  return line;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(linear_vit, m) {
  const std::vector<at::Tag> tags = {at::Tag::pt2_compliant_tag};
  m.def(
      "cuda_softmax_attention(Tensor q, Tensor k, Tensor v, Tensor? key_mask, float scale)"
      " -> (Tensor, Tensor)",
      tags);
  m.def(
      "cuda_softmax_attention_backward(Tensor dout, Tensor q, Tensor k, Tensor v,"
      " Tensor? key_mask, Tensor out, Tensor lse, float scale, int wanted)"
      " -> (Tensor, Tensor, Tensor)",
      tags);
  m.def(
      "cuda_softmax_attention_packed(Tensor qkv, Tensor? key_mask, float scale)"
      " -> (Tensor, Tensor)",
      tags);
  m.def(
      "cuda_softmax_attention_packed_backward(Tensor dout, Tensor qkv, Tensor? key_mask,"
      " Tensor out, Tensor lse, float scale) -> Tensor",
      tags);
  m.def("cuda_softmax_attention_describe(Tensor q) -> str", tags);
}

TORCH_LIBRARY_IMPL(linear_vit, CUDA, m) {
  m.impl("cuda_softmax_attention", forward);
  m.impl("cuda_softmax_attention_backward", backward);
  m.impl("cuda_softmax_attention_packed", packed_forward);
  m.impl("cuda_softmax_attention_packed_backward", packed_backward);
  m.impl("cuda_softmax_attention_describe", describe);
}
