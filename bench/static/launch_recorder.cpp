// A CUDA runtime that launches nothing: it writes down what it is asked to launch, on a GPU whose
// properties the caller makes up. Linked with a room's cuda.cu and cuda.cpp in place of libcudart,
// so that block sizes and dynamic shared memory are those that the launchers really ask for.
#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstring>
#include <map>
#include <mutex>
#include <sstream>
#include <string>

namespace {

std::mutex mutex;
// Host address of a kernel -> its mangled name. Kernels register themselves when the library is
// loaded, in no known order with this file's own globals: hence the function.
std::map<const void*, std::string>& names() {
  static std::map<const void*, std::string> map;
  return map;
}

std::ostringstream launches;               // a line each: name threads dynamic-shared-memory blocks
std::string taken;
std::map<int, int> attributes;

struct Configuration {
  dim3 grid, block;
  size_t shared;
  cudaStream_t stream;
} pending;  // of a launch written <<<...>>>

unsigned count(dim3 d) { return d.x * d.y * d.z; }

cudaError_t record(const void* kernel, dim3 grid, dim3 block, size_t shared) {
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = names().find(kernel);
  if (found == names().end()) return cudaErrorInvalidDeviceFunction;
  launches << found->second << ' ' << count(block) << ' ' << shared << ' ' << count(grid) << '\n';
  return cudaSuccess;
}

}  // namespace

extern "C" {

// ---- for the caller ------------------------------------------------------------------------------

void launch_recorder_set(int attribute, int value) { attributes[attribute] = value; }

// The launches since the last call.
const char* launch_recorder_take() {
  const std::lock_guard<std::mutex> lock(mutex);
  taken = launches.str();
  launches.str("");
  return taken.c_str();
}

// ---- what compiled code registers and launches ---------------------------------------------------

void** __cudaRegisterFatBinary(void*) {
  static void* handle = nullptr;
  return &handle;
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
char __cudaInitModule(void**) { return 1; }
void __cudaRegisterVar(void**, char*, char*, const char*, int, size_t, int, int) {}

void __cudaRegisterFunction(void**, const char* host, char*, const char* name, int, uint3*, uint3*,
                            dim3*, dim3*, int*) {
  names()[host] = name;
}

cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* host) {
  *kernel = reinterpret_cast<cudaKernel_t>(const_cast<void*>(host));
  return cudaSuccess;
}

unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, cudaStream_t stream) {
  pending = {grid, block, shared, stream};
  return 0;
}

cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared, void* stream) {
  *grid = pending.grid;
  *block = pending.block;
  *shared = pending.shared;
  *static_cast<cudaStream_t*>(stream) = pending.stream;
  return cudaSuccess;
}

cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void**, size_t shared,
                               cudaStream_t) {
  return record(reinterpret_cast<const void*>(kernel), grid, block, shared);
}

cudaError_t cudaLaunchKernel(const void* kernel, dim3 grid, dim3 block, void**, size_t shared,
                             cudaStream_t) {
  return record(kernel, grid, block, shared);
}

cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* kernel, void**) {
  return record(kernel, config->gridDim, config->blockDim, config->dynamicSmemBytes);
}

// ---- what launchers ask of the device ------------------------------------------------------------

cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int) { return cudaSuccess; }
cudaError_t cudaGetLastError() { return cudaSuccess; }
cudaError_t cudaPeekAtLastError() { return cudaSuccess; }
const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaSuccess ? "no error" : "an error of the launch recorder";
}

cudaError_t cudaMemsetAsync(void*, int, size_t, cudaStream_t) { return cudaSuccess; }

cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  const auto found = attributes.find(attribute);
  if (found == attributes.end()) return cudaErrorInvalidValue;
  *value = found->second;
  return cudaSuccess;
}

}  // extern "C"
