// The activations of embedding_linear and their derivatives.
#pragma once

#include <math.h>

#include "cuda/cuda.cuh"
#include "ops/embedding_linear.h"

namespace charlm::cuda {
namespace {

template <class C>
constexpr C kInverseSqrt2 = C(0.70710678118654752440);
template <class C>
constexpr C kInverseSqrt2Pi = C(0.39894228040143267794);

template <class C>
__device__ __forceinline__ C normal_cdf(C x) {
  return C(0.5) * (C(1) + erf(x * kInverseSqrt2<C>));
}

// x = act(x). NaN stays NaN.
template <class C, int kWidth>
__device__ __forceinline__ void activate(Activation activation, C (&x)[kWidth]) {
  switch (activation) {  // the same for all threads
    case Activation::kNone:
      return;
    case Activation::kTanh:
#pragma unroll
      for (int i = 0; i < kWidth; i++) x[i] = tanh(x[i]);
      return;
    case Activation::kRelu:
#pragma unroll
      for (int i = 0; i < kWidth; i++) x[i] = x[i] <= C(0) ? C(0) : x[i];
      return;
    case Activation::kGelu:
#pragma unroll
      for (int i = 0; i < kWidth; i++) x[i] *= normal_cdf(x[i]);
      return;
  }
}

// grad *= act'(argument), where `kept` is the argument for kGelu, and otherwise act(argument).
template <class C, int kWidth>
__device__ __forceinline__ void activate_backward(Activation activation, const C (&kept)[kWidth], C (&grad)[kWidth]) {
  switch (activation) {
    case Activation::kNone:
      return;
    case Activation::kTanh:
#pragma unroll
      for (int i = 0; i < kWidth; i++) grad[i] *= C(1) - kept[i] * kept[i];
      return;
    case Activation::kRelu:
#pragma unroll
      for (int i = 0; i < kWidth; i++) grad[i] = kept[i] <= C(0) ? C(0) : grad[i];
      return;
    case Activation::kGelu:
#pragma unroll
      for (int i = 0; i < kWidth; i++) {
        const C x = kept[i];
        grad[i] *= normal_cdf(x) + x * kInverseSqrt2Pi<C> * exp(C(-0.5) * x * x);
      }
      return;
  }
}

}  // namespace
}  // namespace charlm::cuda
