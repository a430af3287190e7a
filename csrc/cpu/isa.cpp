#include "cpu/isa.h"

#include <c10/util/Exception.h>
#include <c10/util/StringUtil.h>

#include <atomic>

#ifdef CHARLM_HAVE_AVX2
#include <cpuid.h>
#endif

namespace charlm {
namespace {

#ifdef CHARLM_HAVE_AVX2
// Replaces __builtin_cpu_supports("f16c"), which Clang 14 lacks. Support by the operating system is checked with
// "avx2".
bool supports_f16c() {
  unsigned eax, ebx, ecx, edx;
  return __get_cpuid(1, &eax, &ebx, &ecx, &edx) && (ecx & bit_F16C);
}
#endif

struct Isa {
  const char* name;
  const Kernels* kernels;
  bool supported;
};

const std::vector<Isa>& isas() {
  static const std::vector<Isa> all = {
      {"baseline", &baseline_kernels, true},
#ifdef CHARLM_HAVE_AVX2
      {"avx2", &avx2_kernels, __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && supports_f16c()},
#endif
#ifdef CHARLM_HAVE_AVX512
      {"avx512", &avx512_kernels,
       __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vl")},
#endif
  };
  return all;
}

std::atomic<const Isa*>& current() {
  static std::atomic<const Isa*> isa = [] {
    const Isa* best = nullptr;
    for (const Isa& candidate : isas()) {
      if (candidate.supported) best = &candidate;
    }
    return best;
  }();
  return isa;
}

}  // namespace

std::vector<std::string> compiled_isas() {
  std::vector<std::string> names;
  for (const Isa& isa : isas()) names.emplace_back(isa.name);
  return names;
}

std::vector<std::string> supported_isas() {
  std::vector<std::string> names;
  for (const Isa& isa : isas()) {
    if (isa.supported) names.emplace_back(isa.name);
  }
  return names;
}

std::string cpu_isa() { return current().load()->name; }

void set_cpu_isa(const std::string& name) {
  for (const Isa& isa : isas()) {
    if (isa.supported && name == isa.name) {
      current() = &isa;
      return;
    }
  }
  TORCH_CHECK_VALUE(false, "instruction set '", name,
                    "' is not one that this machine can run: ", c10::Join(", ", supported_isas()));
}

const Kernels& cpu_kernels() { return *current().load(std::memory_order_relaxed)->kernels; }

}  // namespace charlm
