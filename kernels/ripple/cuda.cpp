// Ripple's CUDA operators: tensors in, cuda.cu's launchers called, tensors out.
// Shapes and dtypes have been checked by the public functions.
#include <torch/library.h>

#include "../cuda/tensors.h"
#include "cuda.h"

namespace {

using at::Tensor;

RippleArguments arguments(const Tensor& x, int64_t axis, int32_t stride) {
  RippleArguments a{};
  a.element = element_type(x);
  a.axis = static_cast<int32_t>(axis);
  a.stride = stride;
  a.batch = x.size(0);
  a.rows = x.size(1);
  a.cols = x.size(2);
  a.channels = x.size(3);
  a.x = view(x);
  a.num_splits = 1;
  return a;
}

// Chooses the splits of the weights' gradients and gives them room, which the caller keeps.
Tensor make_workspace(RippleArguments& a, const Tensor& dout) {
  const int64_t tokens = dout.size(0) * dout.size(1) * dout.size(2);
  a.num_splits = ripple_num_splits(tokens, a.channels, multiprocessors());
  Tensor workspace = empty_floats(dout, {a.num_splits, 11, a.channels});
  a.workspace = workspace.data_ptr<float>();
  return workspace;
}

Tensor pool(const Tensor& x, const Tensor& weight_any, int64_t axis) {
  const c10::cuda::CUDAGuard guard(x.device());
  const Tensor weight = weight_any.contiguous();
  std::vector<int64_t> sizes = x.sizes().vec();
  sizes[axis + 1] = (sizes[axis + 1] + 1) / 2;
  Tensor out = empty_in_order(x, sizes);
  RippleArguments a = arguments(x, axis, 2);
  a.out = view(out);
  a.weight = weight.data_ptr();
  run("ripple_forward", ripple_forward, a);
  return out;
}

std::tuple<Tensor, Tensor> pool_backward(const Tensor& dout_any, const Tensor& x,
                                         const Tensor& weight_any, int64_t axis) {
  const c10::cuda::CUDAGuard guard(x.device());
  const Tensor dout = readable(dout_any), weight = weight_any.contiguous();
  Tensor dx = empty_in_order(x), dweight = at::empty_like(weight);
  RippleArguments a = arguments(x, axis, 2);
  a.out = view(dout);
  a.dx = view(dx);
  a.weight = weight.data_ptr();
  a.dweight = dweight.data_ptr();
  const Tensor workspace = make_workspace(a, dout);
  run("ripple_backward", ripple_backward, a);
  return {dx, dweight};
}

Tensor expand(const Tensor& z, const Tensor& x, const Tensor& weight_any,
              const Tensor& lateral_weight_any, int64_t axis) {
  const c10::cuda::CUDAGuard guard(x.device());
  const Tensor weight = weight_any.contiguous(), lateral_weight = lateral_weight_any.contiguous();
  Tensor out = empty_in_order(x);
  RippleArguments a = arguments(x, axis, 1);
  a.z = view(z);
  a.out = view(out);
  a.weight = lateral_weight.data_ptr();
  a.pair_weight = weight.data_ptr();
  run("ripple_forward", ripple_forward, a);
  return out;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> expand_backward(const Tensor& dout_any, const Tensor& z,
                                                           const Tensor& x,
                                                           const Tensor& weight_any,
                                                           const Tensor& lateral_weight_any,
                                                           int64_t axis) {
  const c10::cuda::CUDAGuard guard(x.device());
  const Tensor dout = readable(dout_any), weight = weight_any.contiguous();
  const Tensor lateral_weight = lateral_weight_any.contiguous();
  Tensor dz = empty_in_order(z), dx = empty_in_order(x);
  Tensor dweight = at::empty_like(weight), dlateral_weight = at::empty_like(lateral_weight);
  RippleArguments a = arguments(x, axis, 1);
  a.z = view(z);
  a.out = view(dout);
  a.dx = view(dx);
  a.dz = view(dz);
  a.weight = lateral_weight.data_ptr();
  a.pair_weight = weight.data_ptr();
  a.dweight = dlateral_weight.data_ptr();
  a.dpair_weight = dweight.data_ptr();
  const Tensor workspace = make_workspace(a, dout);
  run("ripple_backward", ripple_backward, a);
  return {dz, dx, dweight, dlateral_weight};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(linear_vit, m) {
  const std::vector<at::Tag> tags = {at::Tag::pt2_compliant_tag};
  m.def("cuda_ripple_pool(Tensor x, Tensor weight, int axis) -> Tensor", tags);
  m.def(
      "cuda_ripple_pool_backward(Tensor dout, Tensor x, Tensor weight, int axis)"
      " -> (Tensor, Tensor)",
      tags);
  m.def(
      "cuda_ripple_expand(Tensor z, Tensor x, Tensor weight, Tensor lateral_weight, int axis)"
      " -> Tensor",
      tags);
  m.def(
      "cuda_ripple_expand_backward(Tensor dout, Tensor z, Tensor x, Tensor weight,"
      " Tensor lateral_weight, int axis) -> (Tensor, Tensor, Tensor, Tensor)",
      tags);
}

TORCH_LIBRARY_IMPL(linear_vit, CUDA, m) {
  m.impl("cuda_ripple_pool", pool);
  m.impl("cuda_ripple_pool_backward", pool_backward);
  m.impl("cuda_ripple_expand", expand);
  m.impl("cuda_ripple_expand_backward", expand_backward);
}
