// The device, its stream and its record of an index out of range (device.h), and the op that waits for them:
// charlm::synchronize.
#include "device.h"

#include <torch/library.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <new>
#include <string>
#include <vector>

#include "../checks.h"

#ifndef CHARLM_CUDA_EMULATOR
#include <ATen/core/CachingHostAllocator.h>
#include <c10/cuda/CUDAFunctions.h>
#include <c10/cuda/CUDAGraphsC10Utils.h>
#endif

namespace charlm::cuda {
namespace {

#ifdef CHARLM_CUDA_EMULATOR

IndexError* allocate_record() { return new IndexError; }

// An emulated kernel has run when its launch returns.
bool is_capturing(Stream) { return false; }
void wait_for(Stream) {}

#else

// Pinned memory of torch's allocator: kernels write to it, and the host reads it without waiting. It is never given
// back: graphs may hold its address, and when the process ends CUDA is gone first.
IndexError* allocate_record() {
  // Another stream may be captured just now, and a strict capture forbids to allocate.
  const c10::cuda::CUDAStreamCaptureModeGuard relaxed(cudaStreamCaptureModeRelaxed);
  at::DataPtr memory = at::getHostAllocator(at::kCUDA)->allocate(sizeof(IndexError));
  memory.release_context();
  return new (memory.get()) IndexError;
}

bool is_capturing(Stream stream) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  C10_CUDA_CHECK(cudaStreamIsCapturing(stream, &status));
  return status != cudaStreamCaptureStatusNone;
}

void wait_for(Stream stream) { c10::cuda::stream_synchronize(stream); }

#endif

bool checks_at_once() {
  static const bool checks = [] {
    const char* const value = std::getenv("CHARLM_CUDA_CHECK");
    return value && std::strcmp(value, "1") == 0;
  }();
  return checks;
}

// The record of each device, made when it is first asked for.
class Records {
 public:
  IndexError* of(const at::Device& device) {
    const size_t i = device.has_index() ? device.index() : 0;
    const std::lock_guard<std::mutex> lock(mutex_);
    if (records_.size() <= i) records_.resize(i + 1);
    if (!records_[i]) records_[i] = allocate_record();
    return records_[i];
  }

  // Moves what is recorded to `error` and makes room for the next; false if there is nothing.
  bool take(IndexError* record, IndexError& error) {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (!is_ready(record)) return false;
    error = *record;
    record->ready = 0;
    __atomic_store_n(&record->claimed, 0, __ATOMIC_RELEASE);
    return true;
  }

  static bool is_ready(const IndexError* record) { return __atomic_load_n(&record->ready, __ATOMIC_ACQUIRE) != 0; }

 private:
  std::mutex mutex_;
  std::vector<IndexError*> records_;
};

Records& records() {
  static Records& all = *new Records;  // outlives every static object
  return all;
}

[[noreturn]] void raise(const IndexError& error) {
  const IndexLimit& against = error.against;
  const std::string shown = against.type == IndexType::kUInt64 ? std::to_string(static_cast<uint64_t>(error.value))
                                                               : std::to_string(error.value);
  const at::IntArrayRef sizes(against.sizes, static_cast<size_t>(against.n_dims));
  const bool is_target = against.kind == IndexKind::kTarget;
  const int64_t stride = against.kind == IndexKind::kIndexAtPlace ? sizes.back() : 1;
  raise_out_of_range(shown, sizes, against.first() + error.position * stride, against.limit,
                     is_target ? "target" : "index", is_target ? "classes" : "embeddings");
}

void raise_recorded(IndexError* record, Stream stream) {
  if (!Records::is_ready(record)) return;
  // Whatever the same kernel still has to say would come as a second error, later.
  if (!is_capturing(stream)) wait_for(stream);
  IndexError error;
  if (records().take(record, error)) raise(error);
}

IndexType index_type(const at::Tensor& given, const at::Tensor& contiguous) {
  if (given.scalar_type() == at::kUInt64) return IndexType::kUInt64;  // the same bits as int64
  switch (contiguous.scalar_type()) {
    case at::kChar:
      return IndexType::kInt8;
    case at::kShort:
      return IndexType::kInt16;
    case at::kInt:
      return IndexType::kInt32;
    case at::kByte:
      return IndexType::kUInt8;
    case at::kUInt16:
      return IndexType::kUInt16;
    case at::kUInt32:
      return IndexType::kUInt32;
    default:
      return IndexType::kInt64;
  }
}

#ifdef CHARLM_CUDA_EMULATOR

void synchronize(const at::Tensor& device) { DeviceCall call(device.device()); }

#else

void synchronize(const at::Tensor& device) {
  const c10::cuda::CUDAGuard guard(device.device());
  // While a graph is captured nothing runs that could be waited for.
  if (!is_capturing(c10::cuda::getCurrentCUDAStream())) c10::cuda::device_synchronize();
  DeviceCall call(device.device());
}

#endif

}  // namespace

#ifdef CHARLM_CUDA_EMULATOR

DeviceCall::DeviceCall(const at::Device& device) : error_(records().of(device)) { raise_recorded(error_, stream_); }

int64_t DeviceCall::max_shared_bytes() const { return 227 << 10; }  // an H100's

#else

DeviceCall::DeviceCall(const at::Device& device)
    : guard_(device), stream_(c10::cuda::getCurrentCUDAStream(device.index()).stream()), error_(records().of(device)) {
  raise_recorded(error_, stream_);
}

int64_t DeviceCall::max_shared_bytes() const {
  int bytes = 0;
  C10_CUDA_CHECK(
      cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, guard_.current_device().index()));
  return bytes;
}

#endif

Indices DeviceCall::indices(const at::Tensor& given, const at::Tensor& contiguous, int64_t limit, IndexKind kind,
                            int64_t first) const {
  Indices indices;
  indices.data = contiguous.const_data_ptr();
  indices.error = error_;
  IndexLimit& against = indices.against;
  against.limit = limit;
  against.first() = first;
  against.kind = kind;
  against.type = index_type(given, contiguous);
  if (given.dim() <= IndexLimit::kMaxDims) {
    against.n_dims = static_cast<int32_t>(given.dim());
    std::copy(given.sizes().begin(), given.sizes().end(), against.sizes);
  } else {
    against.n_dims = 1;
    against.sizes[0] = given.numel();
  }
  return indices;
}

void DeviceCall::check(int error) const {
#ifdef CHARLM_CUDA_EMULATOR
  TORCH_CHECK(error == 0, "a launch returned ", error);
#else
  C10_CUDA_CHECK(static_cast<cudaError_t>(error));
#endif
  if (!checks_at_once() || is_capturing(stream_)) return;
  wait_for(stream_);
  raise_recorded(error_, stream_);
}

}  // namespace charlm::cuda

TORCH_LIBRARY_IMPL(charlm, CHARLM_CUDA_KEY, m) { m.impl("synchronize", &charlm::cuda::synchronize); }
