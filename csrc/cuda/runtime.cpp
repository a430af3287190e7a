// charlm::Gpu (core/device.h) for CUDA: streams, waiting, pinned memory and errors.
#include <ATen/core/CachingHostAllocator.h>
#include <c10/cuda/CUDAFunctions.h>
#include <c10/cuda/CUDAGraphsC10Utils.h>
#include <c10/cuda/CUDAStream.h>

#include <array>
#include <atomic>
#include <new>

#include "core/device.h"

namespace charlm::cuda {

Kernels& kernels() {
  static Kernels table{};
  return table;
}

namespace {

Stream current_stream(const at::Device& device) { return c10::cuda::getCurrentCUDAStream(device.index()).stream(); }

bool is_capturing(Stream stream) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  C10_CUDA_CHECK(cudaStreamIsCapturing(stream, &status));
  return status != cudaStreamCaptureStatusNone;
}

void wait_for_stream(Stream stream) { c10::cuda::stream_synchronize(stream); }

void wait_for_device() { c10::cuda::device_synchronize(); }

// Pinned memory from torch's allocator: kernels write it, and the host reads it without waiting.
IndexError* allocate_index_error() {
  // Another stream may be capturing, and a strict capture forbids allocation.
  const c10::cuda::CUDAStreamCaptureModeGuard relaxed(cudaStreamCaptureModeRelaxed);
  at::DataPtr memory = at::getHostAllocator(at::kCUDA)->allocate(sizeof(IndexError));
  memory.release_context();
  return new (memory.get()) IndexError;
}

// Every launch needs these, so each is read once for each device.
template <cudaDeviceAttr kAttribute>
int attribute(const at::Device& device) {
  static std::array<std::atomic<int>, C10_COMPILE_TIME_MAX_GPUS> known{};
  std::atomic<int>& value = known.at(device.index());
  if (value == 0) {
    int found = 0;
    C10_CUDA_CHECK(cudaDeviceGetAttribute(&found, kAttribute, device.index()));
    value = found;
  }
  return value;
}

int64_t max_shared_bytes(const at::Device& device) {
  return attribute<cudaDevAttrMaxSharedMemoryPerBlockOptin>(device);
}

int compute_capability(const at::Device& device) {
  return 10 * attribute<cudaDevAttrComputeCapabilityMajor>(device) +
         attribute<cudaDevAttrComputeCapabilityMinor>(device);
}

void check(int error) { C10_CUDA_CHECK(static_cast<cudaError_t>(error)); }

const Gpu runtime = {&kernels(),        &current_stream,     &is_capturing,
                     &wait_for_stream,  &wait_for_device,    &allocate_index_error,
                     &max_shared_bytes, &compute_capability, &check};

[[maybe_unused]] const bool is_registered = register_gpu(&runtime);

}  // namespace
}  // namespace charlm::cuda
