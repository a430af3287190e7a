// Declarations that every kernel file needs. Two compilers accept the same source: nvcc, and any C++20 compiler with
// tests/cuda_emulator on its include path, which runs the kernels on the CPU and checks them.
//
//   CHARLM_SHARED(T, name, n)         T name[n] in shared memory, uninitialised
//   CHARLM_DYNAMIC_SHARED(T, name)    T* name: the bytes of shared memory that the launch requested, 16-byte aligned
//   launch_kernel(kernel, grid, block, shared_bytes, stream, arguments...)    returns CUDA's error code
//   launch_kernel(options, kernel, grid, ...)    the same, with LaunchOptions
#pragma once

#include "core/kernels.h"

namespace charlm::cuda {

// Dynamic shared memory beyond this needs an opt-in: by default a kernel has 48 KiB of static and dynamic shared memory
// together, and the static part of every kernel fits in the rest.
constexpr int64_t kMaxUnrequestedSharedBytes = 32 << 10;

// Most blocks of a launch, enough to fill any GPU several times. Blocks loop over any further work.
constexpr int kMaxBlocks = 8192;

// Second argument of __launch_bounds__: blocks that must fit in a multiprocessor. Without it ptxas aims at more blocks,
// and spills registers or loads fewer elements at a time.
constexpr int kMinResidentBlocks = 2;

constexpr int64_t ceil_div(int64_t n, int64_t divisor) { return (n + divisor - 1) / divisor; }

constexpr int64_t round_up(int64_t n, int64_t multiple) { return ceil_div(n, multiple) * multiple; }

// The smallest power of two >= n, for n <= 2^30.
constexpr int power_of_two(int64_t n) {
  int power = 1;
  while (power < n && power < 1 << 30) power *= 2;
  return power;
}

// Number of blocks for a loop over n pieces of work, n >= 0.
constexpr int blocks_for(int64_t n, int most = kMaxBlocks) { return static_cast<int>(n < 1 ? 1 : n < most ? n : most); }

// What a launch asks for beyond its grid, on sm_90 and later.
struct LaunchOptions {
  int cluster_blocks = 1;     // blocks that run together and reach each other's shared memory (async.cuh)
  bool is_dependent = false;  // may begin before the kernel before it has ended (async.cuh)
};

constexpr int kSm90 = 90;  // Launch::compute_capability from which async.cuh and LaunchOptions can be used

// The table of GPU kernels. CHARLM_REGISTER_KERNELS fills it when the library is loaded.
Kernels& kernels();

}  // namespace charlm::cuda

#define CHARLM_FOR_EACH_TYPE(f) f<float>(), f<double>(), f<BFloat16>(), f<Float16>()

// Sets a member of TypedKernels<T> for every element type T:
//   CHARLM_REGISTER_KERNELS(entropy, {&entropy_forward<T>, &entropy_backward<T>});
#define CHARLM_REGISTER_KERNELS(member, ...)                \
  template <class T>                                        \
  void register_##member() {                                \
    ::charlm::cuda::kernels().of<T>().member = __VA_ARGS__; \
  }                                                         \
  [[maybe_unused]] const bool member##_is_registered = (CHARLM_FOR_EACH_TYPE(register_##member), true)

#ifdef __CUDACC__

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

// Declared as bytes, since objects in shared memory must not have constructors.
#define CHARLM_SHARED(T, name, n)                                               \
  __shared__ __align__(alignof(T)) unsigned char name##_bytes[sizeof(T) * (n)]; \
  T* const name = reinterpret_cast<T*>(name##_bytes)
#define CHARLM_DYNAMIC_SHARED(T, name)                                   \
  extern __shared__ __align__(16) unsigned char charlm_dynamic_shared[]; \
  T* const name = reinterpret_cast<T*>(charlm_dynamic_shared)

namespace charlm::cuda {

// Allows a kernel all the shared memory of a block. This is an attribute of the function, not of a launch. Its value is
// always the same, so that no host thread lowers it while another is about to launch.
inline cudaError_t allow_all_shared(const void* kernel) {
  int device = 0, most = 0;
  cudaFuncAttributes attributes;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (error == cudaSuccess) error = cudaFuncGetAttributes(&attributes, kernel);
  if (error != cudaSuccess) return error;
  return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                              most - static_cast<int>(attributes.sharedSizeBytes));
}

template <class... Parameters, class... Arguments>
cudaError_t launch_kernel(const LaunchOptions& options, void (*kernel)(Parameters...), dim3 grid, dim3 block,
                          int64_t shared_bytes, cudaStream_t stream, const Arguments&... arguments) {
  if (shared_bytes > kMaxUnrequestedSharedBytes) {
    const cudaError_t error = allow_all_shared(reinterpret_cast<const void*>(kernel));
    if (error != cudaSuccess) return error;
  }
  cudaLaunchAttribute attributes[2];
  cudaLaunchConfig_t config = {grid, block, static_cast<size_t>(shared_bytes), stream, attributes, 0};
  if (options.cluster_blocks > 1) {
    cudaLaunchAttribute& attribute = attributes[config.numAttrs++];
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim = {static_cast<unsigned>(options.cluster_blocks), 1, 1};
  }
  if (options.is_dependent) {
    cudaLaunchAttribute& attribute = attributes[config.numAttrs++];
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
  }
  return cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...);
}

template <class... Parameters, class... Arguments>
cudaError_t launch_kernel(void (*kernel)(Parameters...), dim3 grid, dim3 block, int64_t shared_bytes,
                          cudaStream_t stream, const Arguments&... arguments) {
  return launch_kernel(LaunchOptions{}, kernel, grid, block, shared_bytes, stream, arguments...);
}

}  // namespace charlm::cuda

#else

#include "cuda_emulator.h"

#endif
