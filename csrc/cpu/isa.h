// Which compiled instruction set is in use: the best that this machine can run, until another is asked for.
#pragma once

#include <string>
#include <vector>

#include "kernels/kernels.h"

namespace charlm {

std::vector<std::string> compiled_isas();   // slowest first
std::vector<std::string> supported_isas();  // those of them that this machine can run
std::string cpu_isa();                      // the one in use
void set_cpu_isa(const std::string& name);  // ValueError for a name that is not supported

const Kernels& cpu_kernels();

}  // namespace charlm
