// Softmax cross-entropy, a row of logits at a time: in cache after its first pass, a row is read again for free.
//
// With z = logit_scale * x, or softcap * tanh(logit_scale * x / softcap), m = max_c z_c, S = sum_c exp(z_c - m),
// lse = m + log S, class weights w, row weight t and e = label_smoothing, a row's loss is
//   class index y:     t * (sum_c q_c (lse - z_c) + lse_square_scale * w_y * lse^2),  q_c = (1 - e) w_y [c = y] + d_c,
//                                                                                     d_c = e / V * w_c
//   probabilities p:   t * (sum_c d_c (lse - z_c) + lse_square_scale * lse^2),        d_c = w_c ((1 - e) p_c + e / V)
// and its gradient with respect to z_c is, with u = w_y or 1 and Q = sum_c q_c,
//   t * (exp(z_c - m) / S * (Q + 2 * lse_square_scale * u * lse) - q_c).
// m and S are kept apart, and lse - z_c is computed as (m - z_c) + log S: logits far from zero lose nothing.
// Label smoothing: Szegedy et al. 2016; the squared lse (z-loss): PaLM, Chowdhery et al. 2022; softcap: Gemma 2, 2024.
#pragma once

#include "cross_entropy.h"
#include "vec.h"

namespace charlm::CHARLM_ISA {

// What the coefficients d_c are made of; kNone: all zero.
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
  CrossEntropyRow(const CrossEntropyRows<T>& rows, int64_t n)
      : rows_(rows),
        n_(n),
        logits_(rows.logits + n * rows.logits_stride),
        probabilities_(is_probability(kDense) ? rows.probabilities + n * rows.probabilities_stride : nullptr),
        smoothed_(rows.label_smoothing / static_cast<C>(rows.n_classes)),
        token_weight_(rows.token_weight ? rows.token_weight[n] : C(1)) {
    if constexpr (!is_probability(kDense)) {
      target_ = rows.target[n];
      target_weight_ = ignored() || !rows.weight ? C(1) : rows.weight[target_];
    }
  }

  bool ignored() const { return !is_probability(kDense) && target_ == rows_.ignore_index; }

  C forward() const {
    if (ignored()) {
      rows_.row_max[n_] = 0;
      rows_.row_sum[n_] = 1;
      return 0;
    }
    const C m = max_logit();
    V sum{}, dense_loss{}, dense_sum{};
    for_each_chunk([&](int64_t begin, int64_t size) {
      V chunk_sum{}, chunk_loss{};
      for_each_vector<C>(size, [&](int64_t i, auto width) {
        const int64_t c = begin + i;
        const V z = logits(c, width);
        chunk_sum += exp(z - m);
        if constexpr (kDense != Dense::kNone) {
          chunk_loss += only(width, dense(c, width) * (m - z));
          if constexpr (is_probability(kDense)) dense_sum += only(width, dense(c, width));
        }
      });
      sum += chunk_sum;
      dense_loss += chunk_loss;
    });
    const C total = m == -INFINITY ? C(1) : reduce_sum<C>(sum);
    rows_.row_max[n_] = m;
    rows_.row_sum[n_] = total;
    const C log_sum = log(total), lse = m + log_sum;
    C loss = reduce_sum<C>(dense_loss) + known_dense_sum(reduce_sum<C>(dense_sum)) * log_sum;
    if constexpr (!is_probability(kDense)) {
      loss += sparse() * ((m - logit(target_)) + log_sum);
    }
    if (rows_.lse_square_scale != 0) loss += rows_.lse_square_scale * target_weight_ * lse * lse;
    return token_weight_ * loss;
  }

  void backward() const {
    T* grad = rows_.grad + n_ * rows_.grad_stride;
    if (ignored()) {
      for_each_vector<C>(rows_.n_classes, [&](int64_t c, auto width) { store(grad + c, V{}, width); });
      return;
    }
    const C m = rows_.row_max[n_], sum = rows_.row_sum[n_], g = grad_loss();
    // What multiplies the softmax: the sum of all coefficients, and the derivative of the squared lse.
    C dense_factor = known_dense_sum(sum_of_probabilities());
    if (rows_.lse_square_scale != 0) {
      dense_factor += 2 * rows_.lse_square_scale * target_weight_ * (m + log(sum));
    }
    // The gradient may be written over the logits: the target's entry is computed first, and stored last. There the
    // coefficient of the target class is subtracted from its own share of the softmax, so that little is cancelled.
    C at_target = 0;
    if constexpr (!is_probability(kDense)) {
      const V z = broadcast<C>(logit(target_)), p = exp(z - m) / sum;
      const C d = kDense == Dense::kNone ? 0 : dense_at(target_);
      at_target = (g * ((p - 1) * sparse() + (p * dense_factor - d)) * slope(z))[0];
    }
    const C softmax_factor = (sparse() + dense_factor) / sum;
    for_each_vector<C>(rows_.n_classes, [&](int64_t c, auto width) {
      const V z = logits(c, width), e = exp(z - m);
      V value;
      if constexpr (kDense == Dense::kNone) {
        value = e * (softmax_factor * g);
      } else {
        value = (e * softmax_factor - dense(c, width)) * g;
      }
      store(grad + c, V(value * slope(z)), width);
    });
    if constexpr (!is_probability(kDense)) store_one(grad + target_, at_target);
  }

  void target_backward() const {
    T* grad = rows_.grad + n_ * rows_.grad_stride;
    const C m = rows_.row_max[n_], log_sum = log(rows_.row_sum[n_]);
    const C scale = grad_loss() * (1 - rows_.label_smoothing);
    for_each_vector<C>(rows_.n_classes, [&](int64_t c, auto width) {
      V value = scale * ((m - logits(c, width)) + log_sum);
      if constexpr (is_weighted(kDense)) value *= load(rows_.weight + c, width, C(0));
      store(grad + c, value, width);
    });
  }

  void metrics(const CrossEntropyMetrics<T>& out) const {
    const C m = max_logit();
    V sum{}, spread{};
    for_each_vector<C>(rows_.n_classes, [&](int64_t c, auto width) {
      const V z = logits(c, width), e = exp(z - m);
      sum += e;
      spread += e == 0 ? V{} : e * (m - z);  // a class of probability 0 adds nothing, even where z = -inf
    });
    const C total = reduce_sum<C>(sum), log_sum = log(total);
    if (out.lse) out.lse[n_] = m == INFINITY || m == -INFINITY ? m : m + log_sum;
    if (out.entropy) out.entropy[n_] = log_sum + reduce_sum<C>(spread) / total;
    if (out.predicted_tokens) out.predicted_tokens[n_] = total == total ? first(m) : first_nan_or(m);
  }

 private:
  V transformed(V x) const {
    if constexpr (!kTransformed) return x;
    x *= rows_.logit_scale;
    return rows_.softcap > 0 ? rows_.softcap * tanh<C>(x / rows_.softcap) : x;
  }

  // dz/dx at z.
  V slope(V z) const {
    if constexpr (!kTransformed) return broadcast<C>(1);
    if (!(rows_.softcap > 0)) return broadcast<C>(rows_.logit_scale);
    const V t = z / rows_.softcap;
    return rows_.logit_scale * (1 - t * t);
  }

  // z_c for a vector of classes; -inf past the end of the row.
  template <class Width>
  V logits(int64_t c, Width width) const {
    if constexpr (!kTransformed || Width::kIsWhole) return transformed(load(logits_ + c, width, C(-INFINITY)));
    return only(width, transformed(load(logits_ + c, width, C(0))), -INFINITY);
  }

  C logit(int64_t c) const { return transformed(broadcast<C>(load_one(logits_ + c)))[0]; }

  static V only(Whole, V v, C = 0) { return v; }
  static V only(Part part, V v, C fill = 0) { return select<C>(first_lanes<C>(part.n), v, broadcast<C>(fill)); }

  template <class Width>
  V dense(int64_t c, Width width) const {
    V d = broadcast<C>(smoothed_);
    if constexpr (is_probability(kDense)) d += (1 - rows_.label_smoothing) * load(probabilities_ + c, width, C(0));
    if constexpr (is_weighted(kDense)) d *= load(rows_.weight + c, width, C(0));
    return d;
  }

  C dense_at(int64_t c) const { return is_weighted(kDense) ? smoothed_ * rows_.weight[c] : smoothed_; }

  // sum_c d_c: of probabilities it must be summed, else it is the same for each row.
  C known_dense_sum(C summed) const {
    if constexpr (kDense == Dense::kNone) return 0;
    return is_probability(kDense) ? summed : smoothed_ * rows_.weight_sum;
  }

  C sum_of_probabilities() const {
    if constexpr (!is_probability(kDense)) return 0;
    V sum{};
    for_each_vector<C>(rows_.n_classes, [&](int64_t c, auto width) { sum += only(width, dense(c, width)); });
    return reduce_sum<C>(sum);
  }

  // The coefficient of the target class alone: (1 - e) w_y, or nothing.
  C sparse() const { return is_probability(kDense) ? C(0) : (1 - rows_.label_smoothing) * target_weight_; }

  C grad_loss() const {
    return static_cast<C>(rows_.grad_loss[n_ * rows_.grad_loss_stride] * rows_.grad_scale * token_weight_);
  }

  // A row in chunks whose sums are added up: the rounding of a sum grows with the length of its chain.
  template <class F>
  void for_each_chunk(F&& f) const {
    constexpr int64_t kChunk = 1024;
    for (int64_t c = 0; c < rows_.n_classes; c += kChunk) {
      f(c, rows_.n_classes - c < kChunk ? rows_.n_classes - c : kChunk);
    }
  }

  C max_logit() const {
    V largest[4];
    for (V& v : largest) v = broadcast<C>(-INFINITY);
    int64_t c = 0;
    for (; c + 4 * kLanes<C> <= rows_.n_classes; c += 4 * kLanes<C>) {
      for (int i = 0; i < 4; i++) largest[i] = max<C>(largest[i], logits(c + i * kLanes<C>, Whole{}));
    }
    for_each_vector<C>(rows_.n_classes - c,
                       [&](int64_t rest, auto width) { largest[0] = max<C>(largest[0], logits(c + rest, width)); });
    return reduce_max<C>(max<C>(max<C>(largest[0], largest[1]), max<C>(largest[2], largest[3])));
  }

  int64_t first(C value) const {
    int64_t c = 0;
    while (c + kLanes<C> < rows_.n_classes && !any<C>(logits(c, Whole{}) == value)) c += kLanes<C>;
    while (c + 1 < rows_.n_classes && logit(c) != value) c++;
    return c;
  }

  int64_t first_nan_or(C value) const {
    for (int64_t c = 0; c < rows_.n_classes; c++) {
      if (const C z = logit(c); z != z) return c;
    }
    return first(value);
  }

  const CrossEntropyRows<T>& rows_;
  const int64_t n_;
  const T* const logits_;
  const T* const probabilities_;
  const C smoothed_;  // e / V
  const C token_weight_;
  int64_t target_ = 0;
  C target_weight_ = 1;
};

// Calls f.template operator()<Row>() with the row type that these options need.
template <class T, class F>
auto with_row_type(const CrossEntropyRows<T>& rows, F f) {
  const bool transformed = rows.logit_scale != 1 || rows.softcap > 0;
  const auto with_dense = [&]<Dense kDense>() {
    return transformed ? f.template operator()<CrossEntropyRow<T, true, kDense>>()
                       : f.template operator()<CrossEntropyRow<T, false, kDense>>();
  };
  if (!rows.target) {
    return rows.weight ? with_dense.template operator()<Dense::kWeightedProbability>()
                       : with_dense.template operator()<Dense::kProbability>();
  }
  if (rows.label_smoothing == 0) return with_dense.template operator()<Dense::kNone>();
  return rows.weight ? with_dense.template operator()<Dense::kWeight>()
                     : with_dense.template operator()<Dense::kUniform>();
}

template <class T>
double cross_entropy_forward(const CrossEntropyRows<T>& rows, int64_t begin, int64_t end) {
  return with_row_type(rows, [&]<class Row>() {
    double sum = 0;
    for (int64_t n = begin; n < end; n++) {
      const Compute<T> loss = Row(rows, n).forward();
      if (rows.loss) store_one(rows.loss + n, loss);
      sum += loss;
    }
    return sum;
  });
}

template <class T>
void cross_entropy_backward(const CrossEntropyRows<T>& rows, int64_t begin, int64_t end) {
  with_row_type(rows, [&]<class Row>() {
    for (int64_t n = begin; n < end; n++) Row(rows, n).backward();
  });
}

template <class T>
void cross_entropy_target_backward(const CrossEntropyRows<T>& rows, int64_t begin, int64_t end) {
  with_row_type(rows, [&]<class Row>() {
    for (int64_t n = begin; n < end; n++) Row(rows, n).target_backward();
  });
}

template <class T>
void cross_entropy_metrics(const CrossEntropyRows<T>& rows, const CrossEntropyMetrics<T>& out, int64_t begin,
                           int64_t end) {
  with_row_type(rows, [&]<class Row>() {
    for (int64_t n = begin; n < end; n++) Row(rows, n).metrics(out);
  });
}

}  // namespace charlm::CHARLM_ISA
