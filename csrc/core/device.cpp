#include "core/device.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <string>
#include <vector>

#include "core/checks.h"
#include "core/registration.h"

namespace charlm {
namespace {

const Gpu* registered_gpu = nullptr;
std::atomic<const Gpu*> cpu_ops_on = nullptr;

const Gpu* gpu_of(const at::Tensor& t) {
  if (!t.is_cuda()) return cpu_ops_on.load(std::memory_order_relaxed);
  TORCH_CHECK_NOT_IMPLEMENTED(registered_gpu, "charlm was built without CUDA: a tensor on ", t.device(),
                              " has no kernels. Build it for CUDA, or move the tensor to the CPU.");
  return registered_gpu;
}

bool checks_each_launch() {
  static const bool checks = [] {
    const char* const value = std::getenv("CHARLM_CUDA_CHECK");
    return value && std::strcmp(value, "1") == 0;
  }();
  return checks;
}

// The index error of each device, allocated on its first use and never freed: CUDA graphs may hold its address, and at
// exit CUDA ends first.
class IndexErrors {
 public:
  IndexError* of(const at::Device& device, const Gpu& gpu) {
    const size_t i = device.has_index() ? device.index() : 0;
    const std::lock_guard<std::mutex> lock(mutex_);
    if (errors_.size() <= i) errors_.resize(i + 1);
    if (!errors_[i]) errors_[i] = gpu.allocate_index_error();
    return errors_[i];
  }

  // Moves what is recorded to `error` and frees the record for the next one; false if nothing is recorded.
  bool take(IndexError* recorded, IndexError& error) {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (!is_ready(recorded)) return false;
    error = *recorded;
    recorded->ready = 0;
    __atomic_store_n(&recorded->claimed, 0, __ATOMIC_RELEASE);
    return true;
  }

  static bool is_ready(const IndexError* error) { return __atomic_load_n(&error->ready, __ATOMIC_ACQUIRE) != 0; }

 private:
  std::mutex mutex_;
  std::vector<IndexError*> errors_;
};

IndexErrors& index_errors() {
  static IndexErrors& all = *new IndexErrors;  // outlives every static object
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

void raise_recorded(IndexError* recorded, Stream stream, const Gpu& gpu) {
  if (!IndexErrors::is_ready(recorded)) return;
  // The kernel may still record for other indices; after it has ended, one error stands for all of them.
  if (!gpu.is_capturing(stream)) gpu.wait_for_stream(stream);
  IndexError error;
  if (index_errors().take(recorded, error)) raise(error);
}

}  // namespace

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

const Gpu* gpu() { return registered_gpu; }

bool register_gpu(const Gpu* gpu) {
  registered_gpu = gpu;
  return true;
}

void run_cpu_ops_on(const Gpu* gpu) { cpu_ops_on = gpu; }

Device::Device(const at::Tensor& t) : gpu_(gpu_of(t)), device_(t.device()) {
  if (!gpu_) return;
  if (t.is_cuda()) guard_.reset_device(device_);
  stream_ = gpu_->current_stream(device_);
  index_error_ = index_errors().of(device_, *gpu_);
  raise_recorded(index_error_, stream_, *gpu_);
}

Indices Device::gpu_indices(const at::Tensor& given, const at::Tensor& contiguous, int64_t limit, IndexKind kind,
                            int64_t first) const {
  Indices indices;
  indices.data = contiguous.const_data_ptr();
  indices.error = index_error_;
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

at::Tensor Device::new_workspace(int64_t bytes) const {
  return at::empty({bytes}, at::TensorOptions().dtype(at::kByte).device(device_));
}

void Device::wait() const {
  if (!gpu_->is_capturing(stream_)) gpu_->wait_for_device();
  raise_recorded(index_error_, stream_, *gpu_);
}

void Device::check(int error) const {
  gpu_->check(error);
  if (!checks_each_launch() || gpu_->is_capturing(stream_)) return;
  gpu_->wait_for_stream(stream_);
  raise_recorded(index_error_, stream_, *gpu_);
}

namespace {

void synchronize(const at::Tensor& on) {
  const Device device(on);
  if (device.is_gpu()) device.wait();
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(charlm, m) {
  m.def("_synchronize(Tensor on) -> ()");
  implement(m, "_synchronize", &synchronize);
  m.impl("_synchronize", torch::dispatch(c10::DispatchKey::Meta, [](const at::Tensor&) {}));
}

}  // namespace charlm
