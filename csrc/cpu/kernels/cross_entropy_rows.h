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
#include "functions.h"

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

  CHARLM_NOINLINE C forward() const {
    if (ignored()) return ignored_loss();
    return loss(walk<false>(nullptr, nullptr));
  }

  // Loss and gradient at once. exp(z_c - M), M the largest logit so far, goes to `e`: to the gradient's own memory, or,
  // for half types, to `scratch` [V]. Then each chunk is multiplied by what its M, the sum and the loss make of it.
  CHARLM_NOINLINE C forward_backward(C* scratch) const {
    if constexpr (kTransformed) {  // the gradient needs z_c, which it would have written over
      const C loss = forward();
      backward();
      return loss;
    }
    T* grad = rows_.grad + n_ * rows_.grad_stride;
    if (ignored()) {
      zero(grad);
      return ignored_loss();
    }
    C* e = scratch;
    if constexpr (sizeof(T) == sizeof(C)) e = grad;
    const C target_logit = is_probability(kDense) ? C(0) : logit(target_);
    C chunk_max[kMaxChunks];
    const Walk w = walk<true>(e, chunk_max);
    const C row_loss = loss(w, target_logit), g = grad_loss();
    // A row of nothing but -inf has no softmax: NaN, as in torch.
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
    T* grad = rows_.grad + n_ * rows_.grad_stride;
    if (ignored()) return zero(grad);
    const Walk w{rows_.row_max[n_], rows_.row_sum[n_], 0, is_probability(kDense) ? rows_.row_dense_sum[n_] : C(0)};
    const C m = w.max, g = grad_loss(), softmax_factor = (sparse() + dense_factor(w)) / w.sum;
    // The gradient may be written over the logits: the target's entry is computed first, and stored last.
    const C at_target = is_probability(kDense) ? C(0) : gradient_at_target(logit(target_), w, g);
    for_each_vectors<C, 2>(rows_.n_classes, [&]<int K>(int64_t begin, auto width, Count<K>) {
      V z[K], e[K];
      prefetch<K * kLanes<C> * sizeof(T)>(logits_ + begin + kLogitsAhead);
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
    const C m = max_logit(0, rows_.n_classes);
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
  // A row is walked in chunks that stay in a first-level cache, and whose sums are added up: the rounding of a sum
  // grows with the length of its chain.
  static constexpr int64_t kChunk = 8192 / sizeof(C), kMaxChunks = 64;
  // Elements ahead at which a single walk asks for logits: the processor's own prefetch stops at each page.
  static constexpr int64_t kLogitsAhead = 4096 / sizeof(T);

  template <class F>
  void for_each_chunk(F&& f) const {
    const int64_t n = rows_.n_classes;
    const int64_t size = n <= kChunk * kMaxChunks ? kChunk : (n / kMaxChunks / kLanes<C> + 1) * kLanes<C>;
    for (int64_t chunk = 0, begin = 0; begin < n; chunk++, begin += size) {
      f(chunk, begin, n - begin < size ? n - begin : size);
    }
  }

  // What one walk over a row finds.
  struct Walk {
    C max;         // m
    C sum;         // S
    C dense_loss;  // sum_c d_c (m - z_c)
    C dense_sum;   // sum_c d_c
  };

  // Each chunk's exponentials are taken relative to the largest logit so far, which `chunk_max` keeps if they are
  // stored in `e`; sums that are relative to a smaller one are corrected when a larger comes.
  template <bool kStore>
  Walk walk(C* e, C* chunk_max) const {
    Walk w{-INFINITY, 0, 0, 0};
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
      const auto step = [&]<int K>(int64_t c, auto width, Count<K>, V* sums) {
        prefetch<K * kLanes<C> * sizeof(T)>(logits_ + c + size);  // the next chunk, or the next row
        V z[K], ez[K];
        for (int k = 0; k < K; k++) z[k] = logits(c + k * kLanes<C>, width);
        for (int k = 0; k < K; k++) ez[k] = z[k] - reference;
        exp<C, K>(ez);
        for (int k = 0; k < K; k++) sums[k] += ez[k];
        for (int k = 0; kStore && k < K; k++) store(e + c + k * kLanes<C>, ez[k], width);
        for (int k = 0; kDense != Dense::kNone && k < K; k++) {
          const V d = only(width, dense(c + k * kLanes<C>, width));
          dense_loss += only(width, d * (reference - z[k]));
          dense_sum += d;
        }
      };
      for_each_vectors<C, 4>(size, [&]<int K>(int64_t i, auto width, Count<K>) {
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
    if (w.sum == 0) w.sum = 1;  // a row of -inf: its sum tells, for a NaN too can leave -inf as the maximum
    rows_.row_max[n_] = w.max;
    rows_.row_sum[n_] = w.sum;
    if constexpr (is_probability(kDense)) rows_.row_dense_sum[n_] = w.dense_sum;
    return w;
  }

  C loss(const Walk& w) const { return loss(w, is_probability(kDense) ? C(0) : logit(target_)); }

  C loss(const Walk& w, C target_logit) const {
    const C log_sum = log(w.sum), lse = w.max + log_sum;
    C loss = w.dense_loss + known_dense_sum(w.dense_sum) * log_sum;
    if constexpr (!is_probability(kDense)) loss += sparse() * ((w.max - target_logit) + log_sum);
    if (rows_.lse_square_scale != 0) loss += rows_.lse_square_scale * target_weight_ * lse * lse;
    return token_weight_ * loss;
  }

  C ignored_loss() const {
    rows_.row_max[n_] = 0;
    rows_.row_sum[n_] = 1;
    return 0;
  }

  void zero(T* grad) const {
    for_each_vector<C>(rows_.n_classes, [&](int64_t c, auto width) { store(grad + c, V{}, width); });
  }

  // d loss / d z_c, the target's own coefficient left out, from e = exp(z_c - ...).
  template <class Width>
  V gradient(V e, C softmax_factor, C g, int64_t c, Width width) const {
    if constexpr (kDense == Dense::kNone) return e * (softmax_factor * g);
    return fma<C>(e, broadcast(softmax_factor), -dense(c, width)) * g;
  }

  // What multiplies the softmax beside the target's own coefficient: the sum of the others, and the derivative of the
  // squared lse.
  C dense_factor(const Walk& w) const {
    const C factor = known_dense_sum(w.dense_sum);
    if (rows_.lse_square_scale == 0) return factor;
    return factor + 2 * rows_.lse_square_scale * target_weight_ * (w.max + log(w.sum));
  }

  // The coefficient of the target class is subtracted from its own share of the softmax: little is cancelled.
  C gradient_at_target(C target_logit, const Walk& w, C g) const {
    if constexpr (is_probability(kDense)) return 0;
    const V z = broadcast<C>(target_logit), p = exp(z - w.max) / w.sum;
    const C d = kDense == Dense::kNone ? 0 : dense_at(target_);
    return (g * ((p - 1) * sparse() + (p * dense_factor(w) - d)) * slope(z))[0];
  }

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

  // The coefficient of the target class alone: (1 - e) w_y, or nothing.
  C sparse() const { return is_probability(kDense) ? C(0) : (1 - rows_.label_smoothing) * target_weight_; }

  C grad_loss() const {
    return static_cast<C>(rows_.grad_loss[n_ * rows_.grad_loss_stride] * rows_.grad_scale * token_weight_);
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

}  // namespace charlm::CHARLM_ISA
