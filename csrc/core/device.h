// One call of an op on the device of its tensors: kernels, memory, and on a GPU the current stream and index errors.
// Nothing here waits for a GPU unless CHARLM_CUDA_CHECK=1, and all of it may happen while a stream is captured into a
// CUDA graph.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/core/DeviceGuard.h>

#include <vector>

#include "core/kernels.h"
#include "cpu/blocks.h"

namespace charlm {

// What an op needs of a GPU. csrc/cuda/runtime.cpp provides it; without CUDA there is none.
struct Gpu {
  const Kernels* kernels;
  Stream (*current_stream)(const at::Device&);
  bool (*is_capturing)(Stream);
  void (*wait_for_stream)(Stream);
  void (*wait_for_device)();              // the current one
  IndexError* (*allocate_index_error)();  // in host memory that kernels can write
  int64_t (*max_shared_bytes)(const at::Device&);
  int (*compute_capability)(const at::Device&);  // 10 * major + minor
  void (*check)(int error);                      // raises torch's error for a launch that failed
};

// The GPU's runtime, null in a build without CUDA.
const Gpu* gpu();
bool register_gpu(const Gpu* gpu);

// Runs the kernels of `gpu` on CPU tensors, as the emulator in tests/cuda_emulator does; null: the CPU's own kernels.
void run_cpu_ops_on(const Gpu* gpu);

// The type of `contiguous`, which holds the indices of `given` with the same dtype or as int64.
IndexType index_type(const at::Tensor& given, const at::Tensor& contiguous);

class Device {
 public:
  // On a GPU: raises the IndexError that an earlier call recorded on this device, if its kernel has run by now.
  // NotImplementedError in a build without CUDA.
  explicit Device(const at::Tensor& t);

  bool is_gpu() const { return gpu_ != nullptr; }

  const Kernels& kernels() const { return gpu_ ? *gpu_->kernels : cpu_kernels(); }
  template <class T>
  const TypedKernels<T>& kernels() const {
    return kernels().of<T>();
  }

  // Memory for an output: on the CPU in huge pages if it is large.
  at::Tensor empty(at::IntArrayRef shape, const at::TensorOptions& options) const {
    return gpu_ ? at::empty(shape, options) : new_output(shape, options);
  }

  // Runs a kernel. On the CPU: over n_rows rows, each of about `elements_per_row` elements, in blocks on torch's
  // threads.
  template <class Params>
  void run(Kernel<Params> kernel, const Params& params, int64_t n_rows, int64_t elements_per_row) const {
    if (gpu_) return run_on_gpu(kernel, params);
    Blocks(n_rows, elements_per_row).parallel_for([&](int64_t, int64_t begin, int64_t end) {
      Launch launch{begin, end};
      kernel(params, launch);
    });
  }

  // The sum that a kernel reports, on the CPU, over blocks that do not depend on the number of threads, in their order.
  // `finish(launch)` is called after each block.
  template <class Params, class Finish>
  static double sum_on_cpu(Kernel<Params> kernel, const Params& params, int64_t n_rows, int64_t elements_per_row,
                           int64_t scratch_bytes, Finish finish) {
    return Blocks(n_rows, elements_per_row).parallel_sum([&] {
      return [&, scratch = std::vector<char>(scratch_bytes)](int64_t begin, int64_t end) mutable {
        Launch launch{begin, end, scratch.data()};
        kernel(params, launch);
        finish(launch);
        return launch.sum;
      };
    });
  }

  // `workspace`: bytes of device memory that the kernel requests.
  template <class Params>
  void run_on_gpu(Kernel<Params> kernel, const Params& params, int64_t workspace_bytes = 0) const {
    Launch launch;
    const at::Tensor workspace = workspace_bytes > 0 ? new_workspace(workspace_bytes) : at::Tensor();
    if (workspace_bytes > 0) launch.workspace = workspace.mutable_data_ptr();
    launch.max_shared_bytes = gpu_->max_shared_bytes(device_);
    launch.compute_capability = gpu_->compute_capability(device_);
    launch.stream = stream_;
    check(kernel(params, launch));
  }

  // Sets one of two pointers to a gradient of the caller's, of which kernels read Compute<T>: a GPU's kernel can
  // convert it as it reads. The returned tensor keeps the memory.
  template <class T>
  at::Tensor gradient(const at::Tensor& given, const Compute<T>*& converted, const T*& unconverted) const {
    constexpr at::ScalarType kDtype = __is_same(T, BFloat16) ? at::kBFloat16 : at::kHalf;
    const bool as_given = is_gpu() && sizeof(T) == 2 && given.scalar_type() == kDtype;
    const at::ScalarType dtype = sizeof(T) == sizeof(double) ? at::kDouble : at::kFloat;
    const at::Tensor gradient = (as_given ? given : given.to(dtype)).contiguous();
    converted = as_given ? nullptr : static_cast<const Compute<T>*>(gradient.const_data_ptr());
    unconverted = as_given ? static_cast<const T*>(gradient.const_data_ptr()) : nullptr;
    return gradient;
  }

  // Waits for all work on the GPU, unless the stream is being captured, and raises its recorded IndexError.
  void wait() const;

  // Indices for a GPU's kernel: `contiguous` holds those of `given` from the `first` on, in the same order and with the
  // same dtype or int64; each must be in [0, limit).
  Indices gpu_indices(const at::Tensor& given, const at::Tensor& contiguous, int64_t limit, IndexKind kind,
                      int64_t first = 0) const;

 private:
  at::Tensor new_workspace(int64_t bytes) const;

  // Raises torch's error if the launch failed. With CHARLM_CUDA_CHECK=1 waits for the kernel and raises its IndexError,
  // unless the stream is being captured.
  void check(int error) const;

  const Gpu* gpu_;
  at::Device device_;
  c10::OptionalDeviceGuard guard_;
  Stream stream_ = nullptr;
  IndexError* index_error_ = nullptr;
};

}  // namespace charlm
