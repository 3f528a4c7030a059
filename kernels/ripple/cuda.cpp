// Ripple's CUDA operators: tensors in, cuda.cu's launchers called, tensors out. Operators of a whole
// pyramid are for grids that fit in shared memory; kernels/ripple/stages.py asks no more of them.
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

// Chooses the splits of x's tokens and gives the weights' gradients room in them, if they are asked for,
// which the caller keeps.
Tensor make_workspace(RippleArguments& a, const Tensor& x) {
  a.num_splits = ripple_num_splits(a.batch * a.rows * a.cols, a.channels, multiprocessors());
  if (!needs_sums(a)) return {};
  Tensor workspace = empty_floats(x, {a.num_splits, 11, a.channels});
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
                                         const Tensor& weight_any, int64_t axis,
                                         int64_t wanted) {
  const c10::cuda::CUDAGuard guard(x.device());
  const Tensor dout = readable(dout_any), weight = weight_any.contiguous();
  Tensor dx = gradient_of(x, wanted, 0), dweight = gradient_of(weight, wanted, 1);
  RippleArguments a = arguments(x, axis, 2);
  a.out = view(dout);
  a.dx = view_if_any(dx);
  a.weight = weight.data_ptr();
  a.dweight = data_if_any(dweight);
  const Tensor workspace = make_workspace(a, x);
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
                                                           int64_t axis, int64_t wanted) {
  const c10::cuda::CUDAGuard guard(x.device());
  const Tensor dout = readable(dout_any), weight = weight_any.contiguous();
  const Tensor lateral_weight = lateral_weight_any.contiguous();
  Tensor dz = gradient_of(z, wanted, 0), dx = gradient_of(x, wanted, 1);
  Tensor dweight = gradient_of(weight, wanted, 2);
  Tensor dlateral_weight = gradient_of(lateral_weight, wanted, 3);
  RippleArguments a = arguments(x, axis, 1);
  a.z = view(z);
  a.out = view(dout);
  a.dx = view_if_any(dx);
  a.dz = view_if_any(dz);
  a.weight = lateral_weight.data_ptr();
  a.pair_weight = weight.data_ptr();
  a.dweight = data_if_any(dlateral_weight);
  a.dpair_weight = data_if_any(dweight);
  const Tensor workspace = make_workspace(a, x);
  run("ripple_backward", ripple_backward, a);
  return {dz, dx, dweight, dlateral_weight};
}

// ---- a pyramid -------------------------------------------------------------------------------------

// Weights in the caller's keeping while a launch is enqueued.
std::vector<Tensor> contiguous(at::TensorList tensors) {
  std::vector<Tensor> result;
  for (const Tensor& x : tensors) result.push_back(x.contiguous());
  return result;
}

// Memory for those of an operator's gradients that are asked for, `first` and on.
std::vector<Tensor> gradients_of(at::TensorList tensors, int64_t wanted, int64_t first) {
  std::vector<Tensor> result;
  for (const Tensor& x : tensors) result.push_back(gradient_of(x, wanted, first++));
  return result;
}

void append(std::vector<Tensor>& result, const std::vector<Tensor>& more) {
  result.insert(result.end(), more.begin(), more.end());
}

void point_at(const void* (&pointers)[kMostStages], const std::vector<Tensor>& tensors) {
  for (size_t s = 0; s < tensors.size(); ++s) pointers[s] = tensors[s].data_ptr();
}

void point_at(void* (&pointers)[kMostStages], const std::vector<Tensor>& gradients) {
  for (size_t s = 0; s < gradients.size(); ++s) pointers[s] = data_if_any(gradients[s]);
}

RippleStagesArguments stages_arguments(const Tensor& x, at::IntArrayRef axes) {
  TORCH_CHECK(axes.size() <= kMostStages, "linear_vit: at most ", kMostStages,
              " ripple stages in one kernel, got ", axes.size());
  RippleStagesArguments a{};
  a.element = element_type(x);
  a.num_stages = static_cast<int32_t>(axes.size());
  for (size_t s = 0; s < axes.size(); ++s) a.axes[s] = static_cast<int32_t>(axes[s]);
  a.batch = x.size(0);
  a.rows = x.size(1);
  a.cols = x.size(2);
  a.channels = x.size(3);
  a.multiprocessors = multiprocessors();
  a.num_splits = 1;
  return a;
}

Tensor make_workspace(RippleStagesArguments& a, const Tensor& x, bool expand) {
  a.num_splits = ripple_stages_num_splits(&a, expand);
  if (!needs_sums(a)) return {};
  Tensor workspace = empty_floats(x, {a.num_splits, a.num_stages, 11, a.channels});
  a.workspace = workspace.data_ptr<float>();
  return workspace;
}

std::vector<Tensor> pool_stages(const Tensor& x, at::TensorList weights_any,
                                at::IntArrayRef axes) {
  const c10::cuda::CUDAGuard guard(x.device());
  const std::vector<Tensor> weights = contiguous(weights_any);
  RippleStagesArguments a = stages_arguments(x, axes);
  a.level[0] = view(x);
  std::vector<Tensor> levels;
  std::vector<int64_t> sizes = x.sizes().vec();
  for (size_t s = 0; s < axes.size(); ++s) {
    sizes[axes[s] + 1] = (sizes[axes[s] + 1] + 1) / 2;
    levels.push_back(empty_in_order(x, sizes));
    a.level[s + 1] = view(levels.back());
  }
  point_at(a.weight, weights);
  run("ripple_pool_stages", ripple_pool_stages, a);
  return levels;
}

std::vector<Tensor> pool_stages_backward(at::TensorList dlevels_any, at::TensorList levels,
                                         at::TensorList weights_any, at::IntArrayRef axes,
                                         int64_t wanted) {
  const Tensor& x = levels[0];
  const c10::cuda::CUDAGuard guard(x.device());
  const std::vector<Tensor> weights = contiguous(weights_any);
  const std::vector<Tensor> dweights = gradients_of(weights, wanted, 1);
  std::vector<Tensor> dlevels;
  for (const Tensor& gradient : dlevels_any) dlevels.push_back(readable(gradient));
  Tensor dx = gradient_of(x, wanted, 0);
  RippleStagesArguments a = stages_arguments(x, axes);
  a.gradient[0] = view_if_any(dx);
  for (size_t s = 0; s < axes.size(); ++s) {
    a.level[s] = view(levels[s]);
    a.gradient[s + 1] = view(dlevels[s]);
  }
  point_at(a.weight, weights);
  point_at(a.dweight, dweights);
  const Tensor workspace = make_workspace(a, x, false);
  run("ripple_pool_stages_backward", ripple_pool_stages_backward, a);
  std::vector<Tensor> result = {dx};
  append(result, dweights);
  return result;
}

Tensor expand_stages(const Tensor& z, at::TensorList levels, at::TensorList weights_any,
                     at::TensorList lateral_weights_any, at::IntArrayRef axes) {
  const c10::cuda::CUDAGuard guard(z.device());
  const std::vector<Tensor> weights = contiguous(weights_any);
  const std::vector<Tensor> lateral_weights = contiguous(lateral_weights_any);
  Tensor out = empty_in_order(levels[0]);
  RippleStagesArguments a = stages_arguments(levels[0], axes);
  for (size_t s = 0; s < axes.size(); ++s) a.level[s] = view(levels[s]);
  a.level[axes.size()] = view(z);
  a.out = view(out);
  point_at(a.weight, lateral_weights);
  point_at(a.pair_weight, weights);
  run("ripple_expand_stages", ripple_expand_stages, a);
  return out;
}

std::vector<Tensor> expand_stages_backward(const Tensor& dout_any, const Tensor& z,
                                           at::TensorList levels, at::TensorList weights_any,
                                           at::TensorList lateral_weights_any,
                                           at::IntArrayRef axes, int64_t wanted) {
  const c10::cuda::CUDAGuard guard(z.device());
  const Tensor dout = readable(dout_any);
  const std::vector<Tensor> weights = contiguous(weights_any);
  const std::vector<Tensor> lateral_weights = contiguous(lateral_weights_any);
  const auto stages = static_cast<int64_t>(axes.size());
  Tensor dz = gradient_of(z, wanted, 0);
  const std::vector<Tensor> dlevels = gradients_of(levels, wanted, 1);
  const std::vector<Tensor> dweights = gradients_of(weights, wanted, 1 + stages);
  const std::vector<Tensor> dlateral_weights =
      gradients_of(lateral_weights, wanted, 1 + 2 * stages);
  RippleStagesArguments a = stages_arguments(levels[0], axes);
  for (size_t s = 0; s < axes.size(); ++s) {
    a.level[s] = view(levels[s]);
    a.gradient[s] = view_if_any(dlevels[s]);
  }
  a.level[axes.size()] = view(z);
  a.gradient[axes.size()] = view_if_any(dz);
  a.out = view(dout);
  point_at(a.weight, lateral_weights);
  point_at(a.pair_weight, weights);
  point_at(a.dweight, dlateral_weights);
  point_at(a.dpair_weight, dweights);
  const Tensor workspace = make_workspace(a, z, true);
  run("ripple_expand_stages_backward", ripple_expand_stages_backward, a);
  std::vector<Tensor> result = {dz};
  append(result, dlevels);
  append(result, dweights);
  append(result, dlateral_weights);
  return result;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(linear_vit, m) {
  const std::vector<at::Tag> tags = {at::Tag::pt2_compliant_tag};
  m.def("cuda_ripple_pool(Tensor x, Tensor weight, int axis) -> Tensor", tags);
  m.def(
      "cuda_ripple_pool_backward(Tensor dout, Tensor x, Tensor weight, int axis, int wanted)"
      " -> (Tensor, Tensor)",
      tags);
  m.def(
      "cuda_ripple_expand(Tensor z, Tensor x, Tensor weight, Tensor lateral_weight, int axis)"
      " -> Tensor",
      tags);
  m.def(
      "cuda_ripple_expand_backward(Tensor dout, Tensor z, Tensor x, Tensor weight,"
      " Tensor lateral_weight, int axis, int wanted) -> (Tensor, Tensor, Tensor, Tensor)",
      tags);
  m.def("cuda_ripple_pool_stages(Tensor x, Tensor[] weights, int[] axes) -> Tensor[]", tags);
  m.def(
      "cuda_ripple_pool_stages_backward(Tensor[] dlevels, Tensor[] levels, Tensor[] weights,"
      " int[] axes, int wanted) -> Tensor[]",
      tags);
  m.def(
      "cuda_ripple_expand_stages(Tensor z, Tensor[] levels, Tensor[] weights,"
      " Tensor[] lateral_weights, int[] axes) -> Tensor",
      tags);
  m.def(
      "cuda_ripple_expand_stages_backward(Tensor dout, Tensor z, Tensor[] levels, Tensor[] weights,"
      " Tensor[] lateral_weights, int[] axes, int wanted) -> Tensor[]",
      tags);
}

TORCH_LIBRARY_IMPL(linear_vit, CUDA, m) {
  m.impl("cuda_ripple_pool", pool);
  m.impl("cuda_ripple_pool_backward", pool_backward);
  m.impl("cuda_ripple_expand", expand);
  m.impl("cuda_ripple_expand_backward", expand_backward);
  m.impl("cuda_ripple_pool_stages", pool_stages);
  m.impl("cuda_ripple_pool_stages_backward", pool_stages_backward);
  m.impl("cuda_ripple_expand_stages", expand_stages);
  m.impl("cuda_ripple_expand_stages_backward", expand_stages_backward);
}
