// The kernels of one instruction set, and the choice among those compiled. isa.cpp is compiled once for each.
#pragma once

#include "../../pointwise_kl_div.h"
#include "cross_entropy.h"
#include "embedding.h"
#include "embedding_linear.h"
#include "entropy.h"
#include "gemm.h"
#include "kl_div.h"

namespace charlm {

struct EmbeddingForwards {
  EmbeddingForward<int8_t> int8;
  EmbeddingForward<int16_t> int16;
  EmbeddingForward<int32_t> int32;
  EmbeddingForward<int64_t> int64;
  EmbeddingForward<uint8_t> uint8;
  EmbeddingForward<uint16_t> uint16;
  EmbeddingForward<uint32_t> uint32;
  EmbeddingForward<uint64_t> uint64;
};

template <class T>
struct TypedKernels {
  CrossEntropyKernels<T> cross_entropy;
  EmbeddingKernels<T> embedding;
  EmbeddingLinearKernels<T> embedding_linear;
  GemmKernel<Compute<T>> gemm;
  EntropyKernels<T> entropy;
  KlDivKernels<T> kl_div;
  PointwiseKlDivKernels<T> pointwise_kl_div;
};

struct Kernels {
  int vector_bytes;
  CountIgnored count_ignored;
  FirstOutOfRange first_out_of_range;
  EmbeddingForwards embedding_forward;
  TypedKernels<float> float32;
  TypedKernels<double> float64;
  TypedKernels<BFloat16> bfloat16;
  TypedKernels<Float16> float16;

  template <class T>
  const TypedKernels<T>& of() const;
};

template <>
inline const TypedKernels<float>& Kernels::of<float>() const {
  return float32;
}
template <>
inline const TypedKernels<double>& Kernels::of<double>() const {
  return float64;
}
template <>
inline const TypedKernels<BFloat16>& Kernels::of<BFloat16>() const {
  return bfloat16;
}
template <>
inline const TypedKernels<Float16>& Kernels::of<Float16>() const {
  return float16;
}

extern const Kernels baseline_kernels;
#ifdef CHARLM_HAVE_AVX2
extern const Kernels avx2_kernels;
#endif
#ifdef CHARLM_HAVE_AVX512
extern const Kernels avx512_kernels;
#endif

}  // namespace charlm
