// One row of cross_entropy, for any number of threads that share it. The formulas are in ops/cross_entropy.h. A plain
// row has class indices and no smoothing, z-loss, softcap or logit_scale: all d_c are 0, and z = x.
#pragma once

#include "cuda/rows.cuh"
#include "ops/cross_entropy.h"

namespace charlm::cuda {
namespace {

template <class T>
bool is_plain(const CrossEntropyParams<T>& params) {
  return params.has_class_indices && params.label_smoothing == 0 && params.lse_square_scale == 0 &&
         params.logit_scale == 1 && params.softcap == 0;
}

// tanh(u), for half types with an error of 2e-7, or of 1e-6 |u| near 0, in a quarter of the instructions.
template <class T>
__device__ __forceinline__ Compute<T> tanh_of(Compute<T> u) {
  if constexpr (sizeof(T) >= sizeof(float)) return tanh(u);
  constexpr float kTwoLog2e = 2.88539008f;
  const float square = u * u, near = fmaf(u * square, fmaf(square, 0.133333333f, -0.333333333f), u);
  const float far = fmaf(-2, reciprocal_approximate(exp2_approximate(u * kTwoLog2e) + 1), 1);
  return square < 0.015625f ? near : far;
}

// Of row n; 1 if there is none.
template <class T>
__device__ __forceinline__ Compute<T> grad_loss_of(const CrossEntropyParams<T>& params, int64_t n) {
  if (!params.grad_loss && !params.unconverted_grad_loss) return 1;
  return load_gradient<T>(params.grad_loss, params.unconverted_grad_loss, n * params.grad_loss_stride);
}

template <class T>
__device__ __forceinline__ void store_loss(const CrossEntropyParams<T>& params, int64_t n, Compute<T> loss) {
  if (params.loss) params.loss[n] = loss;
  if (params.rounded_loss) params.rounded_loss[n] = from_compute<T>(loss);
}

template <class T, bool kPlain>
class CrossEntropyRow {
  using C = Compute<T>;

 public:
  using RowSoftmax = Softmax<T, !kPlain>;

  __device__ __forceinline__ CrossEntropyRow(const CrossEntropyParams<T>& params, int64_t n)
      : CrossEntropyRow(params, n, load_target(params, n)) {}
  // `target`: what load_target() gave, for a kernel that has more to load before it looks at it.
  __device__ __forceinline__ CrossEntropyRow(const CrossEntropyParams<T>& params, int64_t n, int64_t target)
      : params_(params), n_(n), token_weight_(params.token_weight ? params.token_weight[n] : C(1)), target_(target) {
    if (!has_class_indices()) return;
    is_ignored_ = params.may_ignore && target_ == params.ignore_index;
    is_bad_ = !is_ignored_ && !in_range(params.target, target_);
    if (params.weight && is_counted()) target_weight_ = params.weight[target_];
  }
  __device__ __forceinline__ static int64_t load_target(const CrossEntropyParams<T>& params, int64_t n) {
    return kPlain || params.has_class_indices ? load_index(params.target, n) : -1;
  }

  // What a counted row has read from memory, for a kernel that keeps it in shared memory.
  struct Saved {
    C token_weight, target_weight;
    int target;
  };
  __device__ __forceinline__ CrossEntropyRow(const CrossEntropyParams<T>& params, int64_t n, const Saved& saved)
      : params_(params),
        n_(n),
        token_weight_(saved.token_weight),
        target_weight_(saved.target_weight),
        target_(saved.target) {}
  __device__ __forceinline__ Saved saved() const { return {token_weight_, target_weight_, static_cast<int>(target_)}; }

  __device__ __forceinline__ int64_t target() const { return target_; }  // -1 without class indices

  __device__ __forceinline__ bool is_ignored() const { return is_ignored_; }
  __device__ __forceinline__ bool is_bad() const { return is_bad_; }
  __device__ __forceinline__ bool is_counted() const { return !is_ignored_ && !is_bad_; }
  // Until its IndexError is raised, a row with a bad target has loss 0 and gradient 0. If the gradient overwrites the
  // logits, they are left unchanged.
  template <CrossEntropyPass kPass>
  __device__ __forceinline__ bool has_zero_gradient() const {
    const bool is_bad = is_bad_ && params_.grad != params_.logits;
    if constexpr (kPass == CrossEntropyPass::kBackwardWithMetrics) return is_bad || (is_ignored_ && !has_metrics());
    return is_bad || is_ignored_;
  }
  template <CrossEntropyPass kPass>
  __device__ __forceinline__ bool has_gradient() const {
    if constexpr (kPass == CrossEntropyPass::kBackwardWithMetrics)
      return is_counted() || (is_ignored_ && has_metrics());
    return is_counted();
  }
  __device__ __forceinline__ void record_bad() const { record_index_error(params_.target, n_, target_); }

  __device__ __forceinline__ const T* logits() const { return params_.logits + n_ * params_.logits_stride; }
  __device__ __forceinline__ T* grad() const { return params_.grad + n_ * params_.grad_stride; }

  // z from a logit x.
  __device__ __forceinline__ C transformed(T x) const { return transformed_compute(to_compute(x)); }
  __device__ __forceinline__ C transformed_compute(C x) const {
    if constexpr (kPlain) return x;
    x *= params_.logit_scale;
    return params_.softcap > 0 ? params_.softcap * tanh_of<T>(over_softcap(x)) : x;
  }

  // The same for K logits. The branch is outside of the loop, so that no element waits for another.
  template <int K>
  __device__ __forceinline__ void transform(C (&x)[K]) const {
    if constexpr (kPlain) return;
#pragma unroll
    for (C& value : x) value *= params_.logit_scale;
    if (!(params_.softcap > 0)) return;
#pragma unroll
    for (C& value : x) value = params_.softcap * tanh_of<T>(over_softcap(value));
  }

  // z of the target class, where `x` are the logits of the row; 0 without a target.
  __device__ __forceinline__ C target_logit(const T* x) const {
    return has_class_indices() && is_counted() ? transformed(x[target_]) : C(0);
  }

  // Adds the classes c + k * step with logits z[k] to `softmax`. Classes from `end` on, whose z must be -inf, add
  // nothing.
  template <int K>
  __device__ __forceinline__ void add(RowSoftmax& softmax, const C (&z)[K], int64_t c, int step, int64_t end) const {
    softmax.template add<K>(z);
    if constexpr (!kPlain) {
      if (!has_dense()) return;
#pragma unroll
      for (int k = 0; k < K; k++) {
        if (c + k * step < end) softmax.add_dense(z[k], dense(c + k * step));
      }
    }
  }

  // Call after all classes have been added. A dense sum that is the same for all rows replaces the one that was added
  // up, whose last bit depends on the number of threads: backward then gives the same bits as forward_backward.
  __device__ __forceinline__ void finish(RowSoftmax& softmax) const {
    if (softmax.sum == 0) softmax.sum = 1;  // a row of -inf; the maximum is -inf for some rows with NaN too
    if (!kPlain && has_class_indices()) softmax.dense_sum = known_dense_sum();
  }

  // The loss from a finished softmax.
  __device__ __forceinline__ C loss(const RowSoftmax& softmax, C target_logit) const {
    const C log_sum = log(softmax.sum);
    C loss = 0;
    if constexpr (!kPlain) loss = softmax.dense_loss + softmax.dense_sum * log_sum;
    if (has_class_indices()) loss += sparse() * ((softmax.max - target_logit) + log_sum);
    if constexpr (!kPlain) {
      const C lse = softmax.max + log_sum;
      if (params_.lse_square_scale != 0) loss += params_.lse_square_scale * target_weight_ * lse * lse;
    }
    return token_weight_ * loss;
  }

  // Stores the values that the gradients need and, if requested, the loss of the row.
  __device__ __forceinline__ void store(const RowSoftmax& softmax, C loss) const {
    params_.row_max[n_] = softmax.max;
    params_.row_sum[n_] = softmax.sum;
    if (params_.row_dense_sum) params_.row_dense_sum[n_] = softmax.dense_sum;
    store_loss(params_, n_, loss);
  }

  __device__ __forceinline__ void store_uncounted() const {
    RowSoftmax none;
    none.max = 0;
    none.sum = 1;
    store(none, 0);
  }

  // The softmax that forward stored.
  __device__ __forceinline__ RowSoftmax stored() const {
    RowSoftmax softmax;
    softmax.max = params_.row_max[n_];
    softmax.sum = params_.row_sum[n_];
    if constexpr (!kPlain) {
      softmax.dense_sum = has_class_indices() ? known_dense_sum() : params_.row_dense_sum[n_];
    }
    return softmax;
  }

  // Call before gradient(). `scale`: the factor of each row in the reduction.
  __device__ __forceinline__ void set_softmax(const RowSoftmax& softmax, double scale) {
    max_ = softmax.max;
    sum_ = softmax.sum;
    g_ = static_cast<C>(grad_loss_of(params_, n_) * scale * token_weight_);
    if constexpr (!kPlain) {
      dense_factor_ = softmax.dense_sum;
      if (params_.lse_square_scale != 0) {
        dense_factor_ += 2 * params_.lse_square_scale * target_weight_ * (max_ + log(sum_));
      }
    }
    softmax_factor_ = (kPlain ? sparse() : sparse() + dense_factor_) / sum_;
    log_sum_ = log(sum_);
  }

  // d loss / d x_c, from z_c.
  template <CrossEntropyPass kPass>
  __device__ __forceinline__ C gradient(C z, int64_t c) const {
    if (has_class_indices() && c == target_) return gradient_of_target<kPass>(z);
    return gradient_of_other<kPass>(z, has_dense() ? dense(c) : C(0));
  }

  // Of the target class: its coefficient is subtracted from its own share of the softmax, which avoids cancellation.
  template <CrossEntropyPass kPass>
  __device__ __forceinline__ C gradient_of_target(C z) const {
    const C p = exp_of<T>(z - max_) / sum_;
    C value = (p - 1) * sparse();
    if constexpr (!kPlain) value += p * dense_factor_ - (has_dense() ? dense(target_) : C(0));
    return finished_gradient<kPass>(g_ * value, z, p);
  }

  // Of another class, where `d` is its d_c.
  template <CrossEntropyPass kPass>
  __device__ __forceinline__ C gradient_of_other(C z, C d) const {
    const C e = exp_of<T>(z - max_);
    if constexpr (kPlain) return e * (softmax_factor_ * g_);
    return finished_gradient<kPass>((e * softmax_factor_ - d) * g_, z, e / sum_);
  }

  // Turns the z of K other classes, whose d_c are `d`, into their gradients.
  template <int K>
  __device__ __forceinline__ void gradients_of_others(C (&z)[K], const C (&d)[K]) const {
    C slopes[K];
#pragma unroll
    for (C& slope : slopes) slope = params_.logit_scale;
    if (params_.softcap > 0) {
#pragma unroll
      for (int k = 0; k < K; k++) slopes[k] = softcap_slope(z[k]);
    }
#pragma unroll
    for (int k = 0; k < K; k++) z[k] = (exp_of<T>(z[k] - max_) * softmax_factor_ - d[k]) * g_ * slopes[k];
  }

  // The gradient of another class is e * factor - constant, if all d_c are equal and there is no softcap.
  struct Line {
    C factor, constant;

    __device__ __forceinline__ C at(C e) const {
      if constexpr (kPlain) return e * factor;
      return fma(e, factor, -constant);
    }
  };
  __device__ __forceinline__ Line line() const {
    const C g = kPlain ? g_ : g_ * params_.logit_scale;
    return {softmax_factor_ * g, kPlain ? C(0) : uniform_dense() * g};
  }
  __device__ __forceinline__ C max() const { return max_; }

  __device__ __forceinline__ bool has_dense() const {
    return !kPlain && (!params_.has_class_indices || params_.label_smoothing > 0);
  }

  // d_c without weight and probabilities.
  __device__ __forceinline__ C uniform_dense() const {
    return kPlain ? C(0) : params_.label_smoothing / static_cast<C>(params_.n_classes);
  }

  // d_c
  __device__ __forceinline__ C dense(int64_t c) const {
    C d = uniform_dense();
    if (!has_class_indices()) d += (1 - params_.label_smoothing) * to_compute(probabilities()[c]);
    return params_.weight ? d * params_.weight[c] : d;
  }

  // d[k] = d_c of the classes c + k, K of them.
  template <int K>
  __device__ __forceinline__ void dense(int64_t c, C (&d)[K]) const {
    uint4 bits;
    if (!has_class_indices()) bits = __builtin_bit_cast(uint4, load_any_pack(probabilities() + c));
    dense<K>(bits, c, d);
  }
  // `bits`: their probabilities, if the row has them.
  template <int K>
  __device__ __forceinline__ void dense(uint4 bits, int64_t c, C (&d)[K]) const {
    const C uniform = uniform_dense();
#pragma unroll
    for (int k = 0; k < K; k++) d[k] = uniform;
    if (!has_class_indices()) {
      const C factor = 1 - params_.label_smoothing;
      const auto p = __builtin_bit_cast(Pack<T>, bits);
#pragma unroll
      for (int k = 0; k < K; k++) d[k] += factor * to_compute(p.values[k]);
    }
    if (params_.weight) {
#pragma unroll
      for (int k = 0; k < K; k += kPackSize<C>) {
        const Pack<C> w = load_any_pack(params_.weight + c + k);
#pragma unroll
        for (int j = 0; j < kPackSize<C>; j++) d[k + j] *= w.values[j];
      }
    }
  }

  // d loss / d p_c for a probability target, from z_c.
  __device__ __forceinline__ C target_gradient(C z, int64_t c) const {
    const C value = g_ * (1 - params_.label_smoothing) * ((max_ - z) + log_sum_);
    return params_.weight ? value * params_.weight[c] : value;
  }

 private:
  __device__ __forceinline__ bool has_class_indices() const { return kPlain || params_.has_class_indices; }

  __device__ __forceinline__ const T* probabilities() const {
    return params_.probabilities + n_ * params_.probabilities_stride;
  }

  // sum_c d_c for class indices, the same for all rows.
  __device__ __forceinline__ C known_dense_sum() const {
    return params_.weight ? uniform_dense() * *params_.weight_sum : params_.label_smoothing;
  }

  // The coefficient of the target class: (1 - e) w_y, or 0 for probabilities.
  __device__ __forceinline__ C sparse() const {
    if constexpr (kPlain) return target_weight_;
    return has_class_indices() ? (1 - params_.label_smoothing) * target_weight_ : C(0);
  }

  // Whether lse or entropy of the row has a gradient.
  __device__ __forceinline__ bool has_metrics() const {
    return (params_.grad_lse && params_.grad_lse[n_] != 0) || (params_.grad_entropy && params_.grad_entropy[n_] != 0);
  }

  // p (grad_lse - grad_entropy (log p + H)). p comes first: where it is 0, grad_entropy times the clamped logarithm
  // could be infinite.
  __device__ __forceinline__ C metrics_gradient(C z, C p) const {
    C value = params_.grad_lse ? p * params_.grad_lse[n_] : C(0);
    if (params_.grad_entropy) {
      value -= params_.grad_entropy[n_] * (p * (finite(z - max_) - log_sum_ + params_.entropy[n_]));
    }
    return value;
  }

  template <CrossEntropyPass kPass>
  __device__ __forceinline__ C finished_gradient(C value, C z, C p) const {
    if constexpr (kPass == CrossEntropyPass::kBackwardWithMetrics) {
      value = (is_ignored_ ? C(0) : value) + metrics_gradient(z, p);
    }
    return kPlain ? value : value * slope(z);
  }

  // x / softcap. Half types: by its reciprocal, which is the same for all elements, in place of a division for each.
  __device__ __forceinline__ C over_softcap(C x) const {
    if constexpr (sizeof(T) >= sizeof(float)) {
      return x / params_.softcap;
    } else {
      constexpr float kLargest = 0x1.fffffep127f;
      return x * fminf(1 / params_.softcap, kLargest);
    }
  }

  __device__ __forceinline__ C softcap_slope(C z) const {
    const C t = over_softcap(z);
    return params_.logit_scale * (1 - t * t);
  }

  // dz/dx at z.
  __device__ __forceinline__ C slope(C z) const {
    if (!(params_.softcap > 0)) return params_.logit_scale;
    return softcap_slope(z);
  }

  const CrossEntropyParams<T>& params_;
  const int64_t n_;
  const C token_weight_;
  C target_weight_ = 1;
  int64_t target_ = -1;
  bool is_ignored_ = false, is_bad_ = false;
  C max_ = 0, sum_ = 1, log_sum_ = 0, g_ = 0, softmax_factor_ = 0, dense_factor_ = 0;
};

}  // namespace
}  // namespace charlm::cuda
