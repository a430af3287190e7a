// The numbers of a thread's packs with any options (Terms::kAll), from registers: their sums, and their gradients.
#pragma once

#include "cuda/cross_entropy_walk.cuh"

namespace charlm::cuda {
namespace {

// The largest softcap for which 1 / (e^(2u) + 1) gives z exactly enough.
constexpr float kMaxSmallCap = 1024;

// Half types with a softcap and no d_c, the usual case: no exponential is computed twice, and no tanh either. With
// r = 1 / (e^(2u) + 1), tanh u is 1 - 2r, and its derivative is 4 r (1 - r).
template <class T>
__device__ __forceinline__ bool is_small_cap(const CrossEntropyParams<T>& params, bool has_dense) {
  return sizeof(T) < sizeof(float) && params.softcap > 0 && params.softcap <= kMaxSmallCap && !has_dense;
}

// The gradient of a class that is not the target, from its z and its d_c.
template <class T>
class DenseGradient {
  using C = Compute<T>;
  using Row = TermsRow<T, Terms::kAll>;

 public:
  __device__ __forceinline__ explicit DenseGradient(const Row& row)
      : exponential_(row.max()),
        factor_(exponential_.corrected_factor(row.line().factor, row.max())),
        dense_factor_(row.dense_line_factor()) {}

  __device__ __forceinline__ C at(const Row& row, C z, C d) const {
    if constexpr (Exponential<T>::kIsExact) {
      return row.template gradient_of_other<CrossEntropyPass::kForwardBackward>(z, d);
    } else {
      return fma(exponential_(z), factor_, -d * dense_factor_) * row.cap_slope(z);
    }
  }

 private:
  const Exponential<T> exponential_;
  const C factor_, dense_factor_;
};

template <class T, Terms kTerms>
struct TermsGradient : GradientLine<T, kTerms == Terms::kPlain> {
  using GradientLine<T, kTerms == Terms::kPlain>::GradientLine;
};
template <class T>
struct TermsGradient<T, Terms::kAll> : DenseGradient<T> {
  using DenseGradient<T>::DenseGradient;
};

template <class T, int kPacks>
class DenseNumbers {
  using C = Compute<T>;
  using Row = TermsRow<T, Terms::kAll>;
  using RowSoftmax = Softmax<T, true>;
  static constexpr int K = kPackSize<T>;

 public:
  // The class probabilities of the part's packs, all before the first is used.
  template <class Index>
  __device__ __forceinline__ void load(const CrossEntropyParams<T>& params, int64_t n, const RowPart<T, Index>& part,
                                       int n_threads) {
    if (params.has_class_indices) return;
    const T* const from = params.probabilities + n * params.probabilities_stride + part.class_;
    const bool is_aligned = elements_to_alignment(from) == 0;
#pragma unroll
    for (int i = 0; i < kPacks; i++) {
      if (i * n_threads >= part.left) break;
      const T* const p = from + int64_t(i) * n_threads * K;
      probabilities_[i] = is_aligned ? load_bits(p) : load_any_bits(p);
    }
  }

  // Adds the packs, of which pack i exists if i * n_threads < left, to the softmax, which is empty.
  __device__ __forceinline__ void add(const CrossEntropyParams<T>& params, const Row& row, RowSoftmax& softmax,
                                      const uint4 (&packs)[kPacks], int left, int n_threads, int64_t c) {
    if constexpr (sizeof(T) < sizeof(float)) {
      if (is_small_cap(params, row.has_dense())) return add_capped(params, softmax, packs, left, n_threads);
    }
    C largest = -INFINITY;
#pragma unroll
    for (int i = 0; i < kPacks; i++) {
      if (i * n_threads >= left) break;
      C x[K];
      unpack<T>(packs[i], x);
#pragma unroll
      for (int k = 0; k < K; k++) {
        const C z = row.transformed_compute(x[k]);
        values_[i * K + k] = z;
        largest = fmax(largest, z);
      }
    }
    softmax.rescale_to(largest);
    const Exponential<T> exponential(softmax.max);
    C sums[2] = {}, dense_loss = 0, dense_sum = 0;
#pragma unroll
    for (int i = 0; i < kPacks; i++) {
      if (i * n_threads >= left) break;
#pragma unroll
      for (int k = 0; k < K; k++) sums[k & 1] += exponential(values_[i * K + k]);
      if (!row.has_dense()) continue;
      C d[K];
      row.template dense<K>(probabilities_[i], c + int64_t(i) * n_threads * K, d);
#pragma unroll
      for (int k = 0; k < K; k++) {
        dense_loss += d[k] * (exponential.from() - values_[i * K + k]);
        dense_sum += d[k];
      }
    }
    softmax.sum += exponential.corrected(sums[0] + sums[1]);
    softmax.dense_loss += dense_loss;
    softmax.dense_sum += dense_sum;
  }

  // What makes gradients of the numbers; call after set_softmax().
  class Gradient {
   public:
    __device__ __forceinline__ Gradient(const CrossEntropyParams<T>& params, const Row& row,
                                        const DenseNumbers& numbers)
        : dense_(row), is_small_cap_(is_small_cap(params, row.has_dense())) {
      if constexpr (sizeof(T) < sizeof(float)) {
        if (is_small_cap_) factor_ = 4 * row.line().factor * exp_of<T>(numbers.max_ - row.max());
      }
    }

    __device__ __forceinline__ C at(const Row& row, C z, C d) const { return dense_.at(row, z, d); }

   private:
    friend DenseNumbers;
    const DenseGradient<T> dense_;
    const bool is_small_cap_;
    C factor_ = 0;
  };

  // The gradients of pack i, whose first class is c.
  __device__ __forceinline__ uint4 gradient(const Row& row, const Gradient& gradient, int i, int64_t c) const {
    C y[K];
    if (gradient.is_small_cap_) {
#pragma unroll
      for (int k = 0; k < K; k++) y[k] = values_[i * K + k] * gradient.factor_;
    } else {
      C d[K] = {};
      if (row.has_dense()) row.template dense<K>(probabilities_[i], c, d);
#pragma unroll
      for (int k = 0; k < K; k++) y[k] = gradient.at(row, values_[i * K + k], d[k]);
    }
    return packed<T>(y);
  }

 private:
  // Leaves exp(z - max) r (1 - r) in the values, where max is that of this thread.
  __device__ __forceinline__ void add_capped(const CrossEntropyParams<T>& params, RowSoftmax& softmax,
                                             const uint4 (&packs)[kPacks], int left, int n_threads) {
    constexpr float kTwoLog2e = 2.88539008f;
    const C rate = kTwoLog2e / params.softcap, scale = params.logit_scale;
    C least = INFINITY;
#pragma unroll
    for (int i = 0; i < kPacks; i++) {
      if (i * n_threads >= left) break;
      C x[K];
      unpack<T>(packs[i], x);
#pragma unroll
      for (int k = 0; k < K; k++) {
        const C r = reciprocal_approximate(exp2_approximate(x[k] * scale * rate) + 1);
        values_[i * K + k] = r;
        least = fmin(least, r);
      }
    }
    softmax.max = max_ = params.softcap - 2 * params.softcap * least;
    const C to_exponent = -params.softcap * kTwoLog2e;
    C sums[2] = {};
#pragma unroll
    for (int i = 0; i < kPacks; i++) {
      if (i * n_threads >= left) break;
#pragma unroll
      for (int k = 0; k < K; k++) {
        const C r = values_[i * K + k], e = exp2_approximate((r - least) * to_exponent);
        sums[k & 1] += e;
        values_[i * K + k] = e * fma(-r, r, r);
      }
    }
    softmax.sum = sums[0] + sums[1];
  }

  C values_[kPacks * K];  // z, or what add_capped() makes of it
  C max_;
  uint4 probabilities_[kPacks];
};

}  // namespace
}  // namespace charlm::cuda
