// phi(x) = [relu(x), relu(-x)], its gradient, and the normaliser's inverse, in float32.
#pragma once

#include <cfloat>

// NaN compares false, so it passes through; fmaxf would drop it.
__device__ inline float positive_part(float x) { return x <= 0.0f ? 0.0f : x; }
__device__ inline float negative_part(float x) { return x >= 0.0f ? 0.0f : -x; }

// d/dx of a function of phi(x), given its gradients by both halves of phi: 0 at x = 0, NaN at NaN.
__device__ inline float feature_gradient(float x, float by_positive, float by_negative) {
  return x > 0.0f ? by_positive : x < 0.0f ? -by_negative : x;
}

// 1 / E, of E = phi(q) . z + eps; 0 where a query row meets no key, or E has no float32 inverse: its
// output is 0, not 0/0, and it has no part in any sum, whatever eps is.
__device__ inline float inverse(float met, float eps) {
  return met == 0.0f || fabsf(met + eps) < FLT_MIN ? 0.0f : 1.0f / (met + eps);
}
