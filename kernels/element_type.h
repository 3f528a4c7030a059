// The element types of every C++ and CUDA kernel.
#pragma once

#include <cstdint>

enum ElementType : int32_t { kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2 };
