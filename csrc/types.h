// The element types that kernels read and write. The two half types are bare bits, so that no kernel needs a
// torch header: arithmetic is in Compute<T>, and each result is rounded once, when it is stored.
#pragma once

#include <stdint.h>

namespace charlm {

struct BFloat16 {
  uint16_t bits;
};

struct Float16 {
  uint16_t bits;
};

template <class T>
struct ComputeType {
  using type = float;
};

template <>
struct ComputeType<double> {
  using type = double;
};

template <class T>
using Compute = typename ComputeType<T>::type;

}  // namespace charlm
