// The table of kernels of a device, as ATen's DispatchStub is one: a copy for each instruction set of the CPU
// (cpu/kernels.cpp) and one for a GPU (the .cu files; tests/cuda_emulator).
#pragma once

#include "cpu/gemm/gemm_arguments.h"
#include "ops/cross_entropy.h"
#include "ops/embedding.h"
#include "ops/embedding_linear.h"
#include "ops/entropy.h"
#include "ops/kl_div.h"
#include "ops/kl_divergence.h"

namespace charlm {

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
