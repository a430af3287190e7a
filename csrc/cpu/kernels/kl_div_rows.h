// The divergence KL(P || Q) = sum_c p_c (log p_c - log q_c) of rows of distributions, in nats (Kullback and Leibler
// 1951). Each side is logits x, for which with m = max_c x_c and S = sum_c exp(x_c - m)
//   u_c = x_c - m,   w_c = exp(u_c),   log p_c = u_c - log S,   p_c = w_c / S,
// or log-probabilities, u = x, or probabilities, u = log x and w = x; for these m = 0 and S = 1. With
// l = log S_q - log S_p, M = sum_c p_c and D_c = u^p_c - u^q_c
//   KL = W / S_p + k + M l,   W = sum_c w^p_c (D_c - k).
// Of two identical rows each D_c is 0, and so are l and KL, to the bit. For logits p, k is D_c of the most probable
// class (else 0): where p has hardly another, nothing is cancelled. The gradients:
//   of logits p: p_c (D_c - k - W / S_p)      of logits q: q_c M - p_c
//   of log p:    p_c (D_c + l + 1)            of log q:    -p_c
//   of p:             D_c + l + 1             of q:        -p_c / q_c
// A class of p_c = 0 adds nothing to KL, whatever q_c is, and its own gradient is 0. A class of p_c > 0 = q_c makes KL
// infinite; of the gradients the infinite ones are given as 0: that of p_c, of q_c as a probability, and, where p are
// logits, of the whole row of p.
#pragma once

#include "kl_div.h"
#include "probability.h"
#include "row_chunks.h"

namespace charlm::CHARLM_ISA {

// One of the two rows, or of the two sides of rows turned around, read as u and w.
template <class T, Distribution kKind>
class KlDivSide {
  using C = Compute<T>;
  using V = Vec<C>;

 public:
  static constexpr bool kIsLogits = kKind == Distribution::kLogits;

  // `max`: of logits; else 0.
  KlDivSide(const T* x, V max) : x_(x), reference_(select<C>(max == -INFINITY, V{}, max)) {}

  // u and w of K vectors from class c on; past the end of a row -inf and 0.
  template <int K, class Width>
  void read(int64_t c, Width width, V (&u)[K], V (&w)[K]) const {
    if constexpr (kKind == Distribution::kProbs) {
      for (int k = 0; k < K; k++) w[k] = load(x_ + c + k * kLanes<C>, width, C(0));
      for (int k = 0; k < K; k++) u[k] = log_of_probability<C>(w[k]);
    } else {
      for (int k = 0; k < K; k++) u[k] = load(x_ + c + k * kLanes<C>, width, C(-INFINITY)) - reference_;
      for (int k = 0; k < K; k++) w[k] = u[k];
      if constexpr (kIsLogits) {
        exp<C, K>(w);
      } else {
        exp_of_log_probabilities<C, K>(w);
      }
    }
  }

 private:
  const T* x_;
  V reference_;
};

template <class C>
CHARLM_INLINE Vec<C> finite(Vec<C> u) {
  return max<C>(broadcast<C>(-kFar<C>), u);  // NaN stays
}

// D_c of the most probable class, where it is a number, of u^q_c: u^p_c is 0.
template <class C>
CHARLM_INLINE Vec<C> centre_of(Vec<C> u_q) {
  const Mask<C> above = u_q > -kFar<C>, below = u_q < INFINITY;
  return select<C>(above & below, Vec<C>{} - u_q, Vec<C>{});
}

// What the gradients are made of, the same for all classes of a row.
template <class C, Distribution kP, Distribution kQ>
struct KlDivFactors {
  using V = Vec<C>;
  static constexpr bool kOfLogits = kP == Distribution::kLogits;

  V g, centre, offset, mass, p_factor, q_factor, ratio;

  KlDivFactors(V grad_output, V p_sum, V q_sum, V row_mass, V row_centre, V row_offset)
      : g(grad_output),
        centre(row_centre),
        offset(row_offset),
        mass(row_mass),
        p_factor(grad_output / p_sum),
        q_factor(grad_output / q_sum),
        ratio(q_sum / p_sum) {}

  V of_p(V u, V w, V u_q) const {
    const V difference = finite<C>(u) - finite<C>(u_q), inner = (difference - centre) + offset;
    if constexpr (kOfLogits) return select<C>(offset == -INFINITY, V{}, (w * p_factor) * inner);
    V value = kP == Distribution::kProbs ? inner * g : (w * p_factor) * inner;
    if constexpr (kP == Distribution::kProbs) value = select<C>(w == 0, V{}, value);
    return select<C>(difference > kFar<C> / 2, V{}, value);
  }

  V of_q(V w, V w_q) const {
    // Exactly 0 where p = q, however it is contracted.
    if constexpr (kQ == Distribution::kLogits) return (w_q * mass - w * ratio) * q_factor;
    const V value = V{} - w * p_factor;
    if constexpr (kQ == Distribution::kProbs) return select<C>(w_q == 0, V{}, value / w_q);
    return value;
  }
};

template <class T, Distribution kP, Distribution kQ>
class KlDivRow {
  using C = Compute<T>;
  using V = Vec<C>;
  using P = KlDivSide<T, kP>;
  using Q = KlDivSide<T, kQ>;

 public:
  KlDivRow(const KlDivRows<T>& rows, int64_t n)
      : rows_(rows), n_(n), p_(rows.p + n * rows.p_stride), q_(rows.q + n * rows.q_stride) {}

  // Two walks over both rows, the second one in a near cache. Writes p_max, p_sum, q_max, q_sum, mass, centre, and as
  // `offset` W / S_p, or infinity.
  CHARLM_NOINLINE void walk() const {
    const int64_t n_classes = rows_.n_classes;
    Largest<T> p_largest{0, 0};
    C q_max = 0, centre = 0;
    if constexpr (P::kIsLogits) p_largest = largest_of(p_, n_classes);
    if constexpr (Q::kIsLogits) q_max = max_of(q_, n_classes);
    const P p(p_, broadcast(p_largest.value));
    const Q q(q_, broadcast(q_max));
    if constexpr (P::kIsLogits) {
      V u[1], w[1];
      q.read(p_largest.index, Part{1}, u, w);
      centre = centre_of<C>(u[0])[0];
    }
    C p_sum = 0, q_sum = 0, cross = 0, farthest = 0;
    for_each_chunk<C>(n_classes, [&](int64_t begin, int64_t size) {
      V p_sums[2] = {}, q_sums[2] = {}, crosses[2] = {}, far{};
      for_each_vectors<C, 2>(size, [&]<int K>(int64_t i, auto width, Count<K>) {
        V u[K], w[K], u_q[K], w_q[K];
        p.read(begin + i, width, u, w);
        q.read(begin + i, width, u_q, w_q);
        for (int k = 0; k < K; k++) {
          const V difference = finite<C>(u[k]) - finite<C>(u_q[k]);
          p_sums[k] += w[k];
          if constexpr (Q::kIsLogits) q_sums[k] += w_q[k];
          crosses[k] += w[k] * (difference - centre);
          far = max<C>(difference, far);
        }
      });
      p_sum += reduce_sum<C>(p_sums[0] + p_sums[1]);
      if constexpr (Q::kIsLogits) q_sum += reduce_sum<C>(q_sums[0] + q_sums[1]);
      cross += reduce_sum<C>(crosses[0] + crosses[1]);
      const C far_of_chunk = reduce_max<C>(far);
      farthest = far_of_chunk > farthest ? far_of_chunk : farthest;
    });
    const C mean = P::kIsLogits ? cross / p_sum : cross;
    rows_.p_max[n_] = p_largest.value;
    rows_.p_sum[n_] = P::kIsLogits ? p_sum : C(1);
    rows_.q_max[n_] = q_max;
    rows_.q_sum[n_] = Q::kIsLogits ? q_sum : C(1);
    rows_.mass[n_] = P::kIsLogits ? C(1) : p_sum;
    rows_.centre[n_] = centre;
    rows_.offset[n_] = farthest > kFar<C> / 2 && mean == mean ? C(INFINITY) : mean;
  }

  CHARLM_NOINLINE void backward() const {
    const auto of_row = [this](const C* x) { return broadcast(x[n_]); };
    const KlDivFactors<C, kP, kQ> factors(of_row(rows_.grad_output), of_row(rows_.p_sum), of_row(rows_.q_sum),
                                          of_row(rows_.mass), of_row(rows_.centre), of_row(rows_.offset));
    T* const p_grad = rows_.p_grad ? rows_.p_grad + n_ * rows_.n_classes : nullptr;
    T* const q_grad = rows_.q_grad ? rows_.q_grad + n_ * rows_.n_classes : nullptr;
    const P p(p_, of_row(rows_.p_max));
    const Q q(q_, of_row(rows_.q_max));
    for_each_vectors<C, 2>(rows_.n_classes, [&]<int K>(int64_t c, auto width, Count<K>) {
      prefetch<K * kLanes<C> * sizeof(T)>(p_ + c + kAhead<T>);
      prefetch<K * kLanes<C> * sizeof(T)>(q_ + c + kAhead<T>);
      V u[K], w[K], u_q[K], w_q[K];
      p.read(c, width, u, w);
      q.read(c, width, u_q, w_q);
      for (int k = 0; p_grad && k < K; k++) {
        store(p_grad + c + k * kLanes<C>, factors.of_p(u[k], w[k], u_q[k]), width);
      }
      for (int k = 0; q_grad && k < K; k++) store(q_grad + c + k * kLanes<C>, factors.of_q(w[k], w_q[k]), width);
    });
  }

 private:
  const KlDivRows<T>& rows_;
  const int64_t n_;
  const T* const p_;
  const T* const q_;
};

}  // namespace charlm::CHARLM_ISA
