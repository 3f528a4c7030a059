// phi(x) = [relu(x), relu(-x)], its gradient, and the normaliser's inverse, in float32.
#pragma once

// NaN compares false, so it passes through; fmaxf would drop it.
__device__ inline float positive_part(float x) { return x <= 0.0f ? 0.0f : x; }
__device__ inline float negative_part(float x) { return x >= 0.0f ? 0.0f : -x; }

// d/dx of a function of phi(x), given its gradients by both halves of phi: 0 at x = 0, NaN at NaN.
__device__ inline float feature_gradient(float x, float by_positive, float by_negative) {
  return x > 0.0f ? by_positive : x < 0.0f ? -by_negative : x;
}

// A query row that meets no key has E = eps, or 0 with eps = 0; its output is 0, not 0/0.
__device__ inline float inverse(float E) { return E != 0.0f ? 1.0f / E : 0.0f; }
