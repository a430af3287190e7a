// What a kernel file needs of CUDA. The same source has two compilers: nvcc, and any C++20 compiler with
// tests/cuda_emulator on its include path, which runs the kernels on the CPU and watches them.
//
//   CHARLM_SHARED(T, name, n)         T name[n] in shared memory, uninitialised
//   CHARLM_DYNAMIC_SHARED(T, name)    T* name: the bytes of shared memory that the launch asked for, 16-byte aligned
//   launch(kernel, grid, block, shared_bytes, stream, arguments...)    returns CUDA's error code
#pragma once

#include "../../types.h"
#include "stream.h"

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

template <class... Parameters, class... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, int64_t shared_bytes, cudaStream_t stream,
                   const Arguments&... arguments) {
  constexpr int64_t kAlwaysGranted = 48 << 10;  // bytes; more must be asked for
  if (shared_bytes > kAlwaysGranted) {
    const cudaError_t error =
        cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                             static_cast<int>(shared_bytes));
    if (error != cudaSuccess) return error;
  }
  kernel<<<grid, block, shared_bytes, stream>>>(static_cast<Parameters>(arguments)...);
  return cudaGetLastError();
}

}  // namespace charlm::cuda

#else

#include "cuda_emulator.h"

#endif
