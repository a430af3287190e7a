// One row of cross_entropy, for any number of threads that share it. The formulas stand in ops/cross_entropy.h. A plain
// row has class indices and none of smoothing, z-loss, softcap and logit_scale: all d_c are 0, and z = x.
#pragma once

#include "cuda/convert.cuh"
#include "cuda/index.cuh"
#include "cuda/softmax.cuh"
#include "ops/cross_entropy.h"

namespace charlm::cuda {
namespace {

// kBackwardWithMetrics: the gradient of the loss and those of lse and entropy, which ignored rows have too.
enum class GpuPass { kForward, kForwardBackward, kBackward, kTargetBackward, kBackwardWithMetrics };

template <class T>
bool is_plain(const CrossEntropyParams<T>& rows) {
  return rows.has_target && rows.label_smoothing == 0 && rows.lse_square_scale == 0 && rows.logit_scale == 1 &&
         rows.softcap == 0;
}

template <class T, bool kPlain>
class CrossEntropyRow {
  using C = Compute<T>;

 public:
  using RowSoftmax = Softmax<T, !kPlain>;

  __device__ __forceinline__ CrossEntropyRow(const CrossEntropyParams<T>& rows, int64_t n)
      : rows_(rows), n_(n), token_weight_(rows.token_weight ? rows.token_weight[n] : C(1)) {
    if (!has_target()) return;
    target_ = load_index(rows.target, n);
    is_ignored_ = rows.may_ignore && target_ == rows.ignore_index;
    is_bad_ = !is_ignored_ && !in_range(rows.target, target_);
    if (rows.weight && is_counted()) target_weight_ = rows.weight[target_];
  }

  __device__ __forceinline__ bool is_ignored() const { return is_ignored_; }
  __device__ __forceinline__ bool is_bad() const { return is_bad_; }
  __device__ __forceinline__ bool is_counted() const { return !is_ignored_ && !is_bad_; }
  // A row with a bad target has the loss 0 and no gradient, until its IndexError is raised; if the gradient is to be
  // written over the logits, these stay.
  template <GpuPass kPass>
  __device__ __forceinline__ bool has_zero_gradient() const {
    if constexpr (kPass == GpuPass::kBackwardWithMetrics) return is_bad_ && rows_.grad != rows_.logits;
    return is_ignored_ || (is_bad_ && rows_.grad != rows_.logits);
  }
  template <GpuPass kPass>
  __device__ __forceinline__ bool has_gradient() const {
    if constexpr (kPass == GpuPass::kBackwardWithMetrics) return !is_bad_;
    return is_counted();
  }
  __device__ __forceinline__ void record_bad() const { record_index_error(rows_.target, n_, target_); }

  __device__ __forceinline__ const T* logits() const { return rows_.logits + n_ * rows_.logits_stride; }
  __device__ __forceinline__ T* grad() const { return rows_.grad + n_ * rows_.grad_stride; }

  // x as z.
  __device__ __forceinline__ C transformed(T given) const {
    C x = to_compute(given);
    if constexpr (kPlain) return x;
    x *= rows_.logit_scale;
    return rows_.softcap > 0 ? rows_.softcap * tanh(x / rows_.softcap) : x;
  }

  // The target's z: of `x`, the row's logits. 0 where there is no target.
  __device__ __forceinline__ C target_logit(const T* x) const {
    return has_target() && is_counted() ? transformed(x[target_]) : C(0);
  }

  // Adds classes c, c + step, ... with logits z to `softmax`; those from `end` on, whose z must be -inf, add nothing.
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

  // After all classes were added. What is the same for every row is not taken from the sum, whose last bit depends on
  // who added it: a gradient made with the loss and one made later are the same bits.
  __device__ __forceinline__ void finish(RowSoftmax& softmax) const {
    if (softmax.sum == 0) softmax.sum = 1;  // a row of -inf; the sum tells, for a NaN too can leave -inf as the maximum
    if (!kPlain && has_target()) softmax.dense_sum = known_dense_sum();
  }

  // Of a finished softmax.
  __device__ __forceinline__ C loss(const RowSoftmax& softmax, C target_logit) const {
    const C log_sum = log(softmax.sum);
    C loss = 0;
    if constexpr (!kPlain) loss = softmax.dense_loss + softmax.dense_sum * log_sum;
    if (has_target()) loss += sparse() * ((softmax.max - target_logit) + log_sum);
    if constexpr (!kPlain) {
      const C lse = softmax.max + log_sum;
      if (rows_.lse_square_scale != 0) loss += rows_.lse_square_scale * target_weight_ * lse * lse;
    }
    return token_weight_ * loss;
  }

  // Keeps what the gradients need, and the loss where each row's is wanted.
  __device__ __forceinline__ void store(const RowSoftmax& softmax, C loss) const {
    rows_.row_max[n_] = softmax.max;
    rows_.row_sum[n_] = softmax.sum;
    if (rows_.row_dense_sum) rows_.row_dense_sum[n_] = softmax.dense_sum;
    if (rows_.loss) rows_.loss[n_] = loss;
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
    softmax.max = rows_.row_max[n_];
    softmax.sum = rows_.row_sum[n_];
    if constexpr (!kPlain) {
      softmax.dense_sum = has_target() ? known_dense_sum() : rows_.row_dense_sum[n_];
    }
    return softmax;
  }

  // Must precede gradient(). `scale` is what the reduction multiplies each row with.
  __device__ __forceinline__ void set_softmax(const RowSoftmax& softmax, double scale) {
    max_ = softmax.max;
    sum_ = softmax.sum;
    const C grad_loss = rows_.grad_loss ? rows_.grad_loss[n_ * rows_.grad_loss_stride] : C(1);
    g_ = static_cast<C>(grad_loss * scale * token_weight_);
    if constexpr (!kPlain) {
      dense_factor_ = softmax.dense_sum;
      if (rows_.lse_square_scale != 0) {
        dense_factor_ += 2 * rows_.lse_square_scale * target_weight_ * (max_ + log(sum_));
      }
    }
    softmax_factor_ = (sparse() + dense_factor_) / sum_;
    log_sum_ = log(sum_);
  }

  // d loss / d x_c, from z_c. The coefficient of the target class is subtracted from its own share of the softmax:
  // little is cancelled.
  template <GpuPass kPass>
  __device__ __forceinline__ T gradient(C z, int64_t c) const {
    const C e = exp_of<T>(z - max_);
    C value;
    if constexpr (kPlain) {
      value = c == target_ ? g_ * ((e / sum_ - 1) * sparse()) : e * (softmax_factor_ * g_);
    } else {
      const C d = has_dense() ? dense(c) : C(0);
      if (has_target() && c == target_) {
        const C p = e / sum_;
        value = g_ * ((p - 1) * sparse() + (p * dense_factor_ - d));
      } else {
        value = (e * softmax_factor_ - d) * g_;
      }
      if constexpr (kPass == GpuPass::kBackwardWithMetrics) {
        value = (is_ignored_ ? C(0) : value) + (e / sum_) * metrics_factor(z);
      }
      value *= slope(z);
    }
    return from_compute<T>(value);
  }

  // d loss / d p_c, from z_c.
  __device__ __forceinline__ T target_gradient(C z, int64_t c) const {
    const C value = g_ * (1 - rows_.label_smoothing) * ((max_ - z) + log_sum_);
    return from_compute<T>(rows_.weight ? value * rows_.weight[c] : value);
  }

 private:
  __device__ __forceinline__ bool has_target() const { return kPlain || rows_.has_target; }

  __device__ __forceinline__ bool has_dense() const {
    return !kPlain && (!rows_.has_target || rows_.label_smoothing > 0);
  }

  __device__ __forceinline__ C n_classes() const { return static_cast<C>(rows_.n_classes); }

  // sum_c d_c of class indices.
  __device__ __forceinline__ C known_dense_sum() const {
    return rows_.weight ? rows_.label_smoothing / n_classes() * *rows_.weight_sum : rows_.label_smoothing;
  }

  // d_c
  __device__ __forceinline__ C dense(int64_t c) const {
    C d = rows_.label_smoothing / n_classes();
    if (!has_target()) {
      d += (1 - rows_.label_smoothing) * to_compute(rows_.probabilities[n_ * rows_.probabilities_stride + c]);
    }
    return rows_.weight ? d * rows_.weight[c] : d;
  }

  // The coefficient of the target class alone: (1 - e) w_y, or nothing.
  __device__ __forceinline__ C sparse() const {
    return has_target() ? (1 - rows_.label_smoothing) * target_weight_ : C(0);
  }

  // grad_lse - grad_entropy (log p_c + H)
  __device__ __forceinline__ C metrics_factor(C z) const {
    C factor = rows_.grad_lse ? rows_.grad_lse[n_] : C(0);
    if (rows_.grad_entropy) factor -= rows_.grad_entropy[n_] * (finite(z - max_) - log_sum_ + rows_.entropy[n_]);
    return factor;
  }

  // dz/dx at z.
  __device__ __forceinline__ C slope(C z) const {
    if (!(rows_.softcap > 0)) return rows_.logit_scale;
    const C t = z / rows_.softcap;
    return rows_.logit_scale * (1 - t * t);
  }

  const CrossEntropyParams<T>& rows_;
  const int64_t n_;
  const C token_weight_;
  C target_weight_ = 1;
  int64_t target_ = -1;
  bool is_ignored_ = false, is_bad_ = false;
  C max_ = 0, sum_ = 1, log_sum_ = 0, g_ = 0, softmax_factor_ = 0, dense_factor_ = 0;
};

}  // namespace
}  // namespace charlm::cuda
