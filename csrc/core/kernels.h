// The table of kernels of a device, as ATen's DispatchStub is one: a copy for each instruction set of the CPU
// (cpu/kernels.cpp) and one for a GPU (the .cu files; tests/cuda_emulator).
#pragma once

#include "ops/cross_entropy.h"
#include "ops/embedding.h"
#include "ops/embedding_linear.h"
#include "ops/entropy.h"
#include "ops/kl_div.h"
#include "ops/kl_divergence.h"

namespace charlm {

// A matrix product c[M, N] = start + a[M, K] b[K, N]. Rows of b and c are contiguous.
template <class C>
struct GemmParams {
  const C* a = nullptr;
  int64_t a_row_stride = 0, a_column_stride = 0;
  const C* b = nullptr;
  int64_t b_row_stride = 0;
  const C* start = nullptr;  // [N], optional
  bool adds = false;         // adds to c instead of `start`
  C* c = nullptr;
  int64_t c_row_stride = 0;
  int64_t n_rows = 0, n_columns = 0, n_inner = 0;  // M, N, K
};

template <class C>
using GemmKernel = void (*)(const GemmParams<C>&);

template <class T>
struct TypedKernels {
  CrossEntropyKernels<T> cross_entropy;
  EmbeddingKernels<T> embedding;
  EmbeddingLinearKernels<T> embedding_linear;
  EntropyKernels<T> entropy;
  KlDivKernels<T> kl_div;
  KlDivergenceKernels<T> kl_divergence;
  GemmKernel<Compute<T>> gemm;  // CPU
};

struct Kernels {
  TypedKernels<float> float32;
  TypedKernels<double> float64;
  TypedKernels<BFloat16> bfloat16;
  TypedKernels<Float16> float16;
  EmbeddingForward embedding_forward;  // of every dtype
  // CPU
  CountIgnored count_ignored;
  FirstOutOfRange first_out_of_range;
  int vector_bytes;

  template <class T>
  const TypedKernels<T>& of() const {
    return const_cast<Kernels*>(this)->of<T>();
  }

  template <class T>
  TypedKernels<T>& of();
};

template <>
inline TypedKernels<float>& Kernels::of<float>() {
  return float32;
}
template <>
inline TypedKernels<double>& Kernels::of<double>() {
  return float64;
}
template <>
inline TypedKernels<BFloat16>& Kernels::of<BFloat16>() {
  return bfloat16;
}
template <>
inline TypedKernels<Float16>& Kernels::of<Float16>() {
  return float16;
}

}  // namespace charlm
