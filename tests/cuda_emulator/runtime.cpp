// charlm::Gpu for the emulated kernels, in place of csrc/cuda/runtime.cpp. An emulated kernel has run when its launch
// returns, so there is no stream to wait for.
#include <c10/util/Exception.h>

#include <cstdlib>

#include "core/device.h"

namespace charlm {
namespace cuda {

Kernels& kernels() {
  static Kernels table{};
  return table;
}

}  // namespace cuda

namespace {

const Gpu emulator = {&cuda::kernels(),
                      [](const at::Device&) -> Stream { return nullptr; },
                      [](Stream) { return false; },
                      [](Stream) {},
                      [] {},
                      [] { return new IndexError; },
                      [](const at::Device&) -> int64_t { return 227 << 10; },  // an H100's
                      [](const at::Device&) -> int {
                        const char* const given = std::getenv("CHARLM_CUDA_EMULATOR_CAPABILITY");
                        return given ? std::atoi(given) : 90;
                      },
                      [](int error) { TORCH_CHECK(error == 0, "a launch returned ", error); }};

}  // namespace
}  // namespace charlm

// For charlm._C.run_cpu_ops_on_gpu.
extern "C" __attribute__((visibility("default"))) const charlm::Gpu* charlm_emulated_gpu() { return &charlm::emulator; }
