// What a kernel file needs of CUDA. The same source has two compilers: nvcc, and any C++20 compiler with
// tests/cuda_emulator on its include path, which runs the kernels on the CPU and watches them.
//
//   CHARLM_SHARED(T, name, n)         T name[n] in shared memory, uninitialised
//   CHARLM_DYNAMIC_SHARED(T, name)    T* name: the bytes of shared memory that the launch asked for, 16-byte aligned
//   launch(kernel, grid, block, shared_bytes, stream, arguments...)    returns CUDA's error code
#pragma once

#include "../../types.h"
#include "stream.h"

namespace charlm::cuda {

// Bytes of dynamic shared memory up to which a launch need not ask: 48 KiB are granted to a kernel's static and dynamic
// shared memory together, and static memory stays below the rest.
constexpr int64_t kMostUnaskedShared = 32 << 10;

}  // namespace charlm::cuda

#ifdef __CUDACC__

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

// As bytes: shared memory has no constructors.
#define CHARLM_SHARED(T, name, n)                                               \
  __shared__ __align__(alignof(T)) unsigned char name##_bytes[sizeof(T) * (n)]; \
  T* const name = reinterpret_cast<T*>(name##_bytes)
#define CHARLM_DYNAMIC_SHARED(T, name)                                   \
  extern __shared__ __align__(16) unsigned char charlm_dynamic_shared[]; \
  T* const name = reinterpret_cast<T*>(charlm_dynamic_shared)

namespace charlm::cuda {

// Lets a kernel have all the shared memory of a block. What is set is the function's, not a launch's: always the same
// number, so that no thread takes away what another is about to launch with.
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
cudaError_t launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, int64_t shared_bytes, cudaStream_t stream,
                   const Arguments&... arguments) {
  if (shared_bytes > kMostUnaskedShared) {
    const cudaError_t error = allow_all_shared(reinterpret_cast<const void*>(kernel));
    if (error != cudaSuccess) return error;
  }
  kernel<<<grid, block, shared_bytes, stream>>>(static_cast<Parameters>(arguments)...);
  return cudaGetLastError();
}

}  // namespace charlm::cuda

#else

#include "cuda_emulator.h"

#endif
