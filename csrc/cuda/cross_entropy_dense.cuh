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

// Each pack of 16 bytes has two in registers: of its logits, which become z for float, and of its probabilities.
// With is_small_cap() they become floats.
template <class T, int kPacks>
class DenseNumbers {
  using C = Compute<T>;
  using Row = TermsRow<T, Terms::kAll>;
  using RowSoftmax = Softmax<T, true>;
  static constexpr int K = kPackSize<T>;
  static constexpr bool kIsHalf = sizeof(T) < sizeof(float);

 public:
  // All loads before the first is used.
  template <class Index>
  __device__ __forceinline__ void load(const CrossEntropyParams<T>& params, int64_t n, const RowPart<T, Index>& part,
                                       int n_threads) {
    part.load(0, n_threads, packs_);
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
                                      int left, int n_threads, int c) {
    if constexpr (kIsHalf) {
      if (is_small_cap(params, row.has_dense())) return add_capped(params, softmax, left, n_threads);
    }
#pragma unroll
    for (int i = 0; i < kPacks; i++) {
      if (i * n_threads >= left) break;
      C z[K], d[K];
      unpack<T>(packs_[i], z);
      row.template transform<K>(z);
      if constexpr (!kIsHalf) packs_[i] = packed<T>(z);
      softmax.template add<K>(z);
      if (!row.has_dense()) continue;
      row.template dense<K>(probabilities_[i], c + i * n_threads * K, d);
#pragma unroll
      for (int k = 0; k < K; k++) softmax.add_dense(z[k], d[k]);
    }
  }

  // Call after set_softmax(), before gradient().
  __device__ __forceinline__ void begin_gradients(const CrossEntropyParams<T>& params, const Row& row) {
    if constexpr (kIsHalf) {
      if (is_small_cap(params, row.has_dense())) factor_ = 4 * row.line().factor * exp_of<T>(max_ - row.max());
    }
  }

  // The gradients of pack i, whose first class is c.
  __device__ __forceinline__ uint4 gradient(const CrossEntropyParams<T>& params, const Row& row, int i, int c) const {
    C y[K];
    if constexpr (kIsHalf) {
      if (is_small_cap(params, row.has_dense())) {
        get(i, y);
#pragma unroll
        for (C& value : y) value *= factor_;
        return packed<T>(y);
      }
    }
    C d[K] = {};
    if (row.has_dense()) row.template dense<K>(probabilities_[i], c, d);
    unpack_again<T>(packs_[i], y);
    if constexpr (kIsHalf) row.template transform<K>(y);
    row.template gradients_of_others<K>(y, d);
    return packed<T>(y);
  }

 private:
  __device__ __forceinline__ void get(int i, float (&x)[8]) const {
    const uint4 a = packs_[i], b = probabilities_[i];
    const uint32_t words[] = {a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w};
#pragma unroll
    for (int k = 0; k < 8; k++) x[k] = __uint_as_float(words[k]);
  }
  __device__ __forceinline__ void set(int i, const float (&x)[8]) {
    uint32_t words[8];
#pragma unroll
    for (int k = 0; k < 8; k++) words[k] = __float_as_uint(x[k]);
    packs_[i] = uint4{words[0], words[1], words[2], words[3]};
    probabilities_[i] = uint4{words[4], words[5], words[6], words[7]};
  }

  // Leaves exp(z - max) r (1 - r) in the registers, where max is that of this thread.
  __device__ __forceinline__ void add_capped(const CrossEntropyParams<T>& params, RowSoftmax& softmax, int left,
                                             int n_threads) {
    constexpr float kTwoLog2e = 2.88539008f;
    const float rate = kTwoLog2e / params.softcap, scale = params.logit_scale;
    float least = INFINITY;
#pragma unroll
    for (int i = 0; i < kPacks; i++) {
      if (i * n_threads >= left) break;
      float r[K];
      unpack<T>(packs_[i], r);
#pragma unroll
      for (int k = 0; k < K; k++) {
        r[k] = reciprocal_approximate(exp2_approximate(r[k] * scale * rate) + 1);
        least = fmin(least, r[k]);
      }
      set(i, r);
    }
    softmax.max = max_ = params.softcap - 2 * params.softcap * least;
    const float to_exponent = -params.softcap * kTwoLog2e;
    float sums[2] = {};
#pragma unroll
    for (int i = 0; i < kPacks; i++) {
      if (i * n_threads >= left) break;
      float r[K];
      get(i, r);
#pragma unroll
      for (int k = 0; k < K; k++) {
        const float e = exp2_approximate((r[k] - least) * to_exponent);
        sums[k & 1] += e;
        r[k] = e * fmaf(-r[k], r[k], r[k]);
      }
      set(i, r);
    }
    softmax.sum = sums[0] + sums[1];
  }

  uint4 packs_[kPacks], probabilities_[kPacks];
  C max_ = 0, factor_ = 0;  // with is_small_cap()
};

}  // namespace
}  // namespace charlm::cuda
