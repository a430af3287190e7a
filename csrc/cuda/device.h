// What every CUDA adapter does around its kernels: makes the tensors' device the current one, takes its current stream,
// raises an IndexError that an earlier kernel recorded, and checks each launch. Nothing here waits for the device
// unless it is asked to, and all of it may happen while a stream is captured into a CUDA graph.
//
// Environment, read once: CHARLM_CUDA_CHECK=1 makes each op wait for its kernels, so that an IndexError is raised by
// the call that it is about.
//
// Compiled with CHARLM_CUDA_EMULATOR the adapters take CPU tensors, and register for them: tests/cuda_emulator.
#pragma once

#include <ATen/core/Tensor.h>

#ifdef CHARLM_CUDA_EMULATOR
#define CHARLM_CUDA_KEY CPU
#else
#include <c10/cuda/CUDAGuard.h>
#define CHARLM_CUDA_KEY CUDA
#endif

#include "kernels/index_error.h"
#include "kernels/stream.h"

namespace charlm::cuda {

// One call of an op on a device.
class DeviceCall {
 public:
  // Raises the IndexError of an earlier call on this device, if its kernel has run by now.
  explicit DeviceCall(const at::Device& device);

  Stream stream() const { return stream_; }

  // The most shared memory that a block can have, bytes.
  int64_t max_shared_bytes() const;

  // Indices for a kernel: `contiguous` holds those of `given` from the `first` on, in the same order and with the same
  // dtype or int64; each is to be in [0, limit).
  Indices indices(const at::Tensor& given, const at::Tensor& contiguous, int64_t limit, IndexKind kind,
                  int64_t first = 0) const;

  // What a launch function returned: torch's error if the launch failed. With CHARLM_CUDA_CHECK=1 waits for the kernel
  // and raises its IndexError, unless the stream is being captured.
  void check(int error) const;

 private:
#ifndef CHARLM_CUDA_EMULATOR
  c10::cuda::CUDAGuard guard_;
#endif
  Stream stream_ = nullptr;
  IndexError* error_;  // the device's record
};

}  // namespace charlm::cuda
