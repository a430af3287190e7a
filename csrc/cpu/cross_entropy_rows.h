// cross_entropy on the CPU, one row of logits at a time. After the first pass the row is in cache, so a second pass is
// cheap. The formulas are in ops/cross_entropy.h.
#pragma once

#include "cpu/functions.h"
#include "cpu/rows.h"
#include "ops/cross_entropy.h"

namespace charlm::CHARLM_ISA {

// The terms of the coefficients d_c; kNone: all d_c are zero.
enum class Dense { kNone, kUniform, kWeight, kProbability, kWeightedProbability };

constexpr bool is_probability(Dense dense) {
  return dense == Dense::kProbability || dense == Dense::kWeightedProbability;
}

constexpr bool is_weighted(Dense dense) { return dense == Dense::kWeight || dense == Dense::kWeightedProbability; }

template <class T, bool kTransformed, Dense kDense>
class CrossEntropyRow {
  using C = Compute<T>;
  using V = Vec<C>;

 public:
  CrossEntropyRow(const CrossEntropyParams<T>& params, int64_t n)
      : params_(params),
        n_(n),
        logits_(params.logits + n * params.logits_stride),
        probabilities_(is_probability(kDense) ? params.probabilities + n * params.probabilities_stride : nullptr),
        smoothed_(params.label_smoothing / static_cast<C>(params.n_classes)),
        token_weight_(params.token_weight ? params.token_weight[n] : C(1)) {
    if constexpr (!is_probability(kDense)) {
      target_ = params.target.as_int64()[n];
      target_weight_ = ignored() || !params.weight ? C(1) : params.weight[target_];
    }
  }

  bool ignored() const { return !is_probability(kDense) && target_ == params_.ignore_index; }

  CHARLM_NOINLINE C forward() const {
    if (ignored()) return ignored_loss();
    return loss(sums<false>(nullptr, nullptr));
  }

  // Loss and gradient in one pass over the logits. It stores exp(z_c - M), where M is the largest logit so far, in the
  // memory of the gradient, or in `scratch` [V] for half types. Then each chunk is multiplied by a factor that corrects
  // its M and contains 1 / S and the coefficients of the loss.
  CHARLM_NOINLINE C forward_backward(C* scratch) const {
    if constexpr (kTransformed) {  // the gradient needs z_c, which the exponentials may overwrite
      const C loss = forward();
      backward();
      return loss;
    }
    T* grad = params_.grad + n_ * params_.grad_stride;
    if (ignored()) {
      zero(grad);
      return ignored_loss();
    }
    C* e = scratch;
    if constexpr (sizeof(T) == sizeof(C)) e = grad;
    const C target_logit = is_probability(kDense) ? C(0) : logit(target_);
    C chunk_max[kMaxChunks];
    const Sums w = sums<true>(e, chunk_max);
    const C row_loss = loss(w, target_logit), g = grad_loss();
    // A row of only -inf has no softmax: NaN, as in torch.
    const C softmax_factor = w.max == -INFINITY ? C(NAN) : (sparse() + dense_factor(w)) / w.sum;
    const C at_target = gradient_at_target(target_logit, w, g);
    for_each_chunk([&](int64_t chunk, int64_t begin, int64_t size) {
      const C rescale = chunk_max[chunk] == w.max ? C(1) : exp(broadcast<C>(chunk_max[chunk] - w.max))[0];
      const C factor = rescale * softmax_factor;
      for_each_vector<C>(size, [&](int64_t i, auto width) {
        const int64_t c = begin + i;
        store(grad + c, gradient(load(e + c, width, C(0)), factor, g, c, width), width);
      });
    });
    if constexpr (!is_probability(kDense)) store_one(grad + target_, at_target);
    return row_loss;
  }

  CHARLM_NOINLINE void backward() const {
    T* grad = params_.grad + n_ * params_.grad_stride;
    if (params_.grad_lse || params_.grad_entropy) return backward_with_metrics();
    if (ignored()) return zero(grad);
    const Sums w{params_.row_max[n_], params_.row_sum[n_], 0,
                 is_probability(kDense) ? params_.row_dense_sum[n_] : C(0)};
    const C m = w.max, g = grad_loss(), softmax_factor = (sparse() + dense_factor(w)) / w.sum;
    // The gradient may overwrite the logits: the entry of the target is computed first and stored last.
    const C at_target = is_probability(kDense) ? C(0) : gradient_at_target(logit(target_), w, g);
    for_each_vector_group<C, 2>(params_.n_classes, [&]<int K>(int64_t begin, auto width, Count<K>) {
      V z[K], e[K];
      prefetch<K * kLanes<C> * sizeof(T)>(logits_ + begin + kPrefetchDistance<T>);
      for (int k = 0; k < K; k++) z[k] = logits(begin + k * kLanes<C>, width);
      for (int k = 0; k < K; k++) e[k] = z[k] - m;
      exp<C, K>(e);
      for (int k = 0; k < K; k++) {
        const int64_t c = begin + k * kLanes<C>;
        store(grad + c, V(gradient(e[k], softmax_factor, g, c, width) * slope(z[k])), width);
      }
    });
    if constexpr (!is_probability(kDense)) store_one(grad + target_, at_target);
  }

  // The gradient of the loss, and those of the row's lse and entropy H: p_c (grad_lse - grad_entropy (log p_c + H)). An
  // ignored row has the latter two.
  CHARLM_NOINLINE void backward_with_metrics() const {
    T* grad = params_.grad + n_ * params_.grad_stride;
    const bool counts = !ignored();
    const C grad_lse = params_.grad_lse ? params_.grad_lse[n_] : C(0);
    const C grad_entropy = params_.grad_entropy ? params_.grad_entropy[n_] : C(0);
    if (!counts && grad_lse == 0 && grad_entropy == 0) return zero(grad);  // its logits may be anything
    const Sums w{params_.row_max[n_], params_.row_sum[n_], 0,
                 is_probability(kDense) ? params_.row_dense_sum[n_] : C(0)};
    const C m = w.max, log_sum = log(w.sum), g = counts ? grad_loss() : C(0);
    const C softmax_factor = counts ? (sparse() + dense_factor(w)) / w.sum : C(0);
    const C entropy = params_.grad_entropy ? params_.entropy[n_] : C(0);
    const auto of_metrics = [&](V z) -> V {
      const V t = z - m, p = exp(t) / w.sum;
      // p comes first: where it is 0, grad_entropy times the clamped logarithm could be infinite.
      const V of_entropy = p * (max<C>(broadcast<C>(-kHuge<C>), t) - log_sum + entropy);
      return (p * grad_lse - grad_entropy * of_entropy) * slope(z);
    };
    const bool has_class_indices = counts && !is_probability(kDense);
    const C target_logit = has_class_indices ? logit(target_) : C(0);
    const C at_target =
        has_class_indices ? gradient_at_target(target_logit, w, g) + of_metrics(broadcast<C>(target_logit))[0] : C(0);
    for_each_vector<C>(params_.n_classes, [&](int64_t c, auto width) {
      const V z = logits(c, width);
      V value = of_metrics(z);
      if (counts) value += gradient(exp(z - m), softmax_factor, g, c, width) * slope(z);
      store(grad + c, value, width);
    });
    if (has_class_indices) store_one(grad + target_, at_target);
  }

  void target_backward() const {
    T* grad = params_.grad + n_ * params_.grad_stride;
    const C m = params_.row_max[n_], log_sum = log(params_.row_sum[n_]);
    const C scale = grad_loss() * (1 - params_.label_smoothing);
    for_each_vector<C>(params_.n_classes, [&](int64_t c, auto width) {
      V value = scale * ((m - logits(c, width)) + log_sum);
      if constexpr (is_weighted(kDense)) value *= load(params_.weight + c, width, C(0));
      store(grad + c, value, width);
    });
  }

  void metrics() const {
    const C m = max_logit(0, params_.n_classes);
    V sum{}, spread{};
    for_each_vector<C>(params_.n_classes, [&](int64_t c, auto width) {
      const V z = logits(c, width), e = exp(z - m);
      sum += e;
      spread += e == 0 ? V{} : e * (m - z);  // a class of probability 0 adds nothing, even if z = -inf
    });
    const C total = reduce_sum<C>(sum), log_sum = log(total);
    const int64_t predicted = total == total ? first(m) : first_nan_or(m);
    const C largest = logit(predicted);  // NaN, which m is not, where the row has one
    params_.lse[n_] = largest == INFINITY || largest == -INFINITY ? largest : largest + log_sum;
    params_.entropy[n_] = log_sum + reduce_sum<C>(spread) / total;
    params_.predicted_tokens[n_] = predicted;
    if (params_.row_max && params_.has_class_indices && params_.target.as_int64()[n_] == params_.ignore_index) {
      params_.row_max[n_] = m;
      params_.row_sum[n_] = total;
    }
  }

 private:
  // As for_each_chunk of cpu/rows.h, with larger chunks for a long row, so that there are at most kMaxChunks.
  static constexpr int64_t kChunkClasses = 8192 / sizeof(C), kMaxChunks = 64;

  template <class F>
  void for_each_chunk(F&& f) const {
    const int64_t n = params_.n_classes;
    const int64_t size = n <= kChunkClasses * kMaxChunks ? kChunkClasses : (n / kMaxChunks / kLanes<C> + 1) * kLanes<C>;
    for (int64_t chunk = 0, begin = 0; begin < n; chunk++, begin += size) {
      f(chunk, begin, n - begin < size ? n - begin : size);
    }
  }

  // The sums of one row.
  struct Sums {
    C max;         // m
    C sum;         // S
    C dense_loss;  // sum_c d_c (m - z_c)
    C dense_sum;   // sum_c d_c
  };

  // The exponentials of a chunk are relative to the largest logit so far. With kStore they are written to `e`, and that
  // logit to `chunk_max`. If a chunk has a larger maximum, the sums so far are rescaled to it.
  template <bool kStore>
  Sums sums(C* e, C* chunk_max) const {
    Sums w{-INFINITY, 0, 0, 0};
    for_each_chunk([&](int64_t chunk, int64_t begin, int64_t size) {
      const C largest = max_logit(begin, size);
      const C m = largest > w.max ? largest : w.max, reference = m == -INFINITY ? C(0) : m;
      if (chunk > 0 && m > w.max) {
        w.sum *= exp(broadcast<C>(w.max - m))[0];
        if constexpr (kDense != Dense::kNone) w.dense_loss += (m - w.max) * w.dense_sum;
      }
      w.max = m;
      if constexpr (kStore) chunk_max[chunk] = m;
      V sum[4] = {}, dense_loss{}, dense_sum{};
      const auto step = [&]<int K>(int64_t c, auto width, Count<K>, V* chains) {
        prefetch<K * kLanes<C> * sizeof(T)>(logits_ + c + size);  // the next chunk, or the next row
        V z[K], ez[K];
        for (int k = 0; k < K; k++) z[k] = logits(c + k * kLanes<C>, width);
        for (int k = 0; k < K; k++) ez[k] = z[k] - reference;
        exp<C, K>(ez);
        for (int k = 0; k < K; k++) chains[k] += ez[k];
        for (int k = 0; kStore && k < K; k++) store(e + c + k * kLanes<C>, ez[k], width);
        for (int k = 0; kDense != Dense::kNone && k < K; k++) {
          const V d = masked(width, dense(c + k * kLanes<C>, width));
          dense_loss += masked(width, d * (reference - z[k]));
          dense_sum += d;
        }
      };
      for_each_vector_group<C, 4>(size, [&]<int K>(int64_t i, auto width, Count<K>) {
        if constexpr (K == 4) {  // four sums, two exponentials at a time
          step(begin + i, width, Count<2>{}, sum);
          step(begin + i + 2 * kLanes<C>, width, Count<2>{}, sum + 2);
        } else {
          step(begin + i, width, Count<1>{}, sum);
        }
      });
      w.sum += reduce_sum<C>((sum[0] + sum[1]) + (sum[2] + sum[3]));
      if constexpr (kDense != Dense::kNone) {
        w.dense_loss += reduce_sum<C>(dense_loss);
        w.dense_sum += reduce_sum<C>(dense_sum);
      }
    });
    if (w.sum == 0) w.sum = 1;  // a row of -inf; the maximum is -inf for some rows with NaN too
    params_.row_max[n_] = w.max;
    params_.row_sum[n_] = w.sum;
    if constexpr (is_probability(kDense)) params_.row_dense_sum[n_] = w.dense_sum;
    return w;
  }

  C loss(const Sums& w) const { return loss(w, is_probability(kDense) ? C(0) : logit(target_)); }

  C loss(const Sums& w, C target_logit) const {
    const C log_sum = log(w.sum), lse = w.max + log_sum;
    C loss = w.dense_loss + known_dense_sum(w.dense_sum) * log_sum;
    if constexpr (!is_probability(kDense)) loss += sparse() * ((w.max - target_logit) + log_sum);
    if (params_.lse_square_scale != 0) loss += params_.lse_square_scale * target_weight_ * lse * lse;
    return token_weight_ * loss;
  }

  C ignored_loss() const {
    params_.row_max[n_] = 0;
    params_.row_sum[n_] = 1;
    return 0;
  }

  void zero(T* grad) const {
    for_each_vector<C>(params_.n_classes, [&](int64_t c, auto width) { store(grad + c, V{}, width); });
  }

  // d loss / d z_c without the coefficient of the target, from e = exp(z_c - ...).
  template <class Width>
  V gradient(V e, C softmax_factor, C g, int64_t c, Width width) const {
    if constexpr (kDense == Dense::kNone) return e * (softmax_factor * g);
    return fma<C>(e, broadcast(softmax_factor), -dense(c, width)) * g;
  }

  // The coefficient of softmax(z) in dL/dz from smoothing and z-loss.
  C dense_factor(const Sums& w) const {
    const C factor = known_dense_sum(w.dense_sum);
    if (params_.lse_square_scale == 0) return factor;
    return factor + 2 * params_.lse_square_scale * target_weight_ * (w.max + log(w.sum));
  }

  // The coefficient of the target class is subtracted from its own share of the softmax, which avoids cancellation.
  C gradient_at_target(C target_logit, const Sums& w, C g) const {
    if constexpr (is_probability(kDense)) return 0;
    const V z = broadcast<C>(target_logit), p = exp(z - w.max) / w.sum;
    const C d = kDense == Dense::kNone ? 0 : dense_at(target_);
    return (g * ((p - 1) * sparse() + (p * dense_factor(w) - d)) * slope(z))[0];
  }

  V transformed(V x) const {
    if constexpr (!kTransformed) return x;
    x *= params_.logit_scale;
    return params_.softcap > 0 ? params_.softcap * tanh<C>(x / params_.softcap) : x;
  }

  // dz/dx at z.
  V slope(V z) const {
    if constexpr (!kTransformed) return broadcast<C>(1);
    if (!(params_.softcap > 0)) return broadcast<C>(params_.logit_scale);
    const V t = z / params_.softcap;
    return params_.logit_scale * (1 - t * t);
  }

  // z_c for a vector of classes; -inf past the end of the row.
  template <class Width>
  V logits(int64_t c, Width width) const {
    if constexpr (!kTransformed || Width::kIsWhole) return transformed(load(logits_ + c, width, C(-INFINITY)));
    return masked(width, transformed(load(logits_ + c, width, C(0))), -INFINITY);
  }

  C logit(int64_t c) const { return transformed(broadcast<C>(load_one(logits_ + c)))[0]; }

  static V masked(Whole, V v, C = 0) { return v; }
  static V masked(Part part, V v, C fill = 0) { return select<C>(first_lanes<C>(part.n), v, broadcast<C>(fill)); }

  template <class Width>
  V dense(int64_t c, Width width) const {
    V d = broadcast<C>(smoothed_);
    if constexpr (is_probability(kDense)) d += (1 - params_.label_smoothing) * load(probabilities_ + c, width, C(0));
    if constexpr (is_weighted(kDense)) d *= load(params_.weight + c, width, C(0));
    return d;
  }

  C dense_at(int64_t c) const { return is_weighted(kDense) ? smoothed_ * params_.weight[c] : smoothed_; }

  // sum_c d_c: `summed` for probabilities; for class indices it is the same for each row.
  C known_dense_sum(C summed) const {
    if constexpr (kDense == Dense::kNone) return 0;
    return is_probability(kDense)
               ? summed
               : smoothed_ * (params_.weight ? *params_.weight_sum : static_cast<C>(params_.n_classes));
  }

  // The coefficient of the target class: (1 - e) w_y, or 0 for probabilities.
  C sparse() const { return is_probability(kDense) ? C(0) : (1 - params_.label_smoothing) * target_weight_; }

  C grad_loss() const {
    return static_cast<C>(params_.grad_loss[n_ * params_.grad_loss_stride] * params_.grad_scale * token_weight_);
  }

  C max_logit(int64_t begin, int64_t size) const {
    V largest[4];
    for (V& v : largest) v = broadcast<C>(-INFINITY);
    int64_t c = begin;
    for (; c + 4 * kLanes<C> <= begin + size; c += 4 * kLanes<C>) {
      for (int i = 0; i < 4; i++) largest[i] = max<C>(largest[i], logits(c + i * kLanes<C>, Whole{}));
    }
    for_each_vector<C>(begin + size - c,
                       [&](int64_t rest, auto width) { largest[0] = max<C>(largest[0], logits(c + rest, width)); });
    return reduce_max<C>(max<C>(max<C>(largest[0], largest[1]), max<C>(largest[2], largest[3])));
  }

  int64_t first(C value) const {
    int64_t c = 0;
    while (c + kLanes<C> < params_.n_classes && !any<C>(logits(c, Whole{}) == value)) c += kLanes<C>;
    while (c + 1 < params_.n_classes && logit(c) != value) c++;
    return c;
  }

  int64_t first_nan_or(C value) const {
    for (int64_t c = 0; c < params_.n_classes; c++) {
      if (const C z = logit(c); z != z) return c;
    }
    return first(value);
  }

  const CrossEntropyParams<T>& params_;
  const int64_t n_;
  const T* const logits_;
  const T* const probabilities_;
  const C smoothed_;  // e / V
  const C token_weight_;
  int64_t target_ = 0;
  C target_weight_ = 1;
};

}  // namespace charlm::CHARLM_ISA
