// The instruction set in use: by default the fastest one that this machine supports.
#pragma once

#include <string>
#include <vector>

#include "core/kernels.h"

namespace charlm {

std::vector<std::string> compiled_isas();   // slowest first
std::vector<std::string> supported_isas();  // compiled, and supported by this machine
std::string cpu_isa();                      // the one in use
void set_cpu_isa(const std::string& name);  // ValueError for a name that is not supported

extern const Kernels baseline_kernels;
#ifdef CHARLM_HAVE_AVX2
extern const Kernels avx2_kernels;
#endif
#ifdef CHARLM_HAVE_AVX512
extern const Kernels avx512_kernels;
#endif

// The kernels of the instruction set in use.
const Kernels& cpu_kernels();

}  // namespace charlm
