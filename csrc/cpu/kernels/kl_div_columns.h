// The divergence of rows of few classes, a vector of rows at a time (columns.h), and of whichever are left a row at a
// time. The formulas stand in kl_div_rows.h.
#pragma once

#include "columns.h"
#include "kl_div_rows.h"

namespace charlm::CHARLM_ISA {

// As many rows of few classes as a vector has lanes.
template <class T, Distribution kP, Distribution kQ>
class KlDivColumns {
  using C = Compute<T>;
  using V = Vec<C>;
  using P = KlDivSide<T, kP>;
  using Q = KlDivSide<T, kQ>;

 public:
  explicit KlDivColumns(const KlDivRows<T>& rows) : rows_(rows), p_(rows.n_classes), q_(rows.n_classes) {}

  // What KlDivRow::walk does, of rows [n, n + kLanes).
  CHARLM_NOINLINE void walk(int64_t n) {
    read(n);
    V p_max{}, q_max{}, centre{};
    if constexpr (P::kIsLogits) p_max = p_.max();
    if constexpr (Q::kIsLogits) q_max = q_.max();
    const P p(p_.data(), p_max);
    const Q q(q_.data(), q_max);
    if constexpr (P::kIsLogits) centre = centre_at(p_max, q_max);
    V p_sums[4] = {}, q_sums[4] = {}, crosses[4] = {}, far{};  // four chains: each addition to a long one rounds again
    int chain = 0;
    for_each_classes<2>(rows_.n_classes, [&]<int K>(int64_t c, Count<K>) {
      V u[K], w[K], u_q[K], w_q[K];
      p.read(c * kLanes<C>, Whole{}, u, w);
      q.read(c * kLanes<C>, Whole{}, u_q, w_q);
      for (int k = 0; k < K; k++) {
        const V difference = finite<C>(u[k]) - finite<C>(u_q[k]);
        p_sums[chain + k] += w[k];
        q_sums[chain + k] += w_q[k];
        crosses[chain + k] += w[k] * (difference - centre);
        far = max<C>(difference, far);
      }
      chain ^= 2;
    });
    const auto total = [](const V(&sums)[4]) -> V { return (sums[0] + sums[1]) + (sums[2] + sums[3]); };
    const V one = broadcast<C>(1), p_sum = total(p_sums), cross = total(crosses);
    const V mean = P::kIsLogits ? cross / p_sum : cross;
    const auto write = [n](C* to, V v) { store(to + n, v, Whole{}); };
    write(rows_.p_max, p_max);
    write(rows_.p_sum, P::kIsLogits ? p_sum : one);
    write(rows_.q_max, q_max);
    write(rows_.q_sum, Q::kIsLogits ? total(q_sums) : one);
    write(rows_.mass, P::kIsLogits ? one : p_sum);
    write(rows_.centre, centre);
    write(rows_.offset, select<C>((far > kFar<C> / 2) & (mean == mean), broadcast<C>(INFINITY), mean));
  }

  CHARLM_NOINLINE void backward(int64_t n) {
    read(n);
    const auto of_rows = [n](const C* x) { return load(x + n, Whole{}); };
    const KlDivFactors<C, kP, kQ> factors(of_rows(rows_.grad_output), of_rows(rows_.p_sum), of_rows(rows_.q_sum),
                                          of_rows(rows_.mass), of_rows(rows_.centre), of_rows(rows_.offset));
    const P p(p_.data(), of_rows(rows_.p_max));
    const Q q(q_.data(), of_rows(rows_.q_max));
    for_each_classes<2>(rows_.n_classes, [&]<int K>(int64_t c, Count<K>) {
      V u[K], w[K], u_q[K], w_q[K];
      p.read(c * kLanes<C>, Whole{}, u, w);
      q.read(c * kLanes<C>, Whole{}, u_q, w_q);
      for (int k = 0; rows_.p_grad && k < K; k++) p_.set(c + k, factors.of_p(u[k], w[k], u_q[k]));
      for (int k = 0; rows_.q_grad && k < K; k++) q_.set(c + k, factors.of_q(w[k], w_q[k]));
    });
    if (rows_.p_grad) p_.write(rows_.p_grad + n * rows_.n_classes, rows_.n_classes);
    if (rows_.q_grad) q_.write(rows_.q_grad + n * rows_.n_classes, rows_.n_classes);
  }

 private:
  void read(int64_t n) {
    p_.read(rows_.p + n * rows_.p_stride, rows_.p_stride);
    q_.read(rows_.q + n * rows_.q_stride, rows_.q_stride);
  }

  // D_c of the first class with the largest logit of p.
  V centre_at(V p_max, V q_max) const {
    V at_largest{};
    for (int64_t c = rows_.n_classes - 1; c >= 0; c--) at_largest = select<C>(p_[c] == p_max, q_[c], at_largest);
    T q[kLanes<C>];
    store(q, at_largest, Whole{});
    V u[1], w[1];
    Q(q, q_max).read(0, Whole{}, u, w);
    return centre_of<C>(u[0]);
  }

  const KlDivRows<T>& rows_;
  Columns<T> p_, q_;
};

// Calls f.template operator()<Row, Turned>() with the types that these kinds need.
template <class T, class F>
void with_kl_div_kinds(const KlDivRows<T>& rows, F&& f) {
  const auto with_both = [&]<Distribution kP, Distribution kQ>() {
    f.template operator()<KlDivRow<T, kP, kQ>, KlDivColumns<T, kP, kQ>>();
  };
  const auto with_q = [&]<Distribution kP>() {
    switch (rows.q_kind) {
      case Distribution::kLogits:
        return with_both.template operator()<kP, Distribution::kLogits>();
      case Distribution::kLogProbs:
        return with_both.template operator()<kP, Distribution::kLogProbs>();
      case Distribution::kProbs:
        return with_both.template operator()<kP, Distribution::kProbs>();
    }
  };
  switch (rows.p_kind) {
    case Distribution::kLogits:
      return with_q.template operator()<Distribution::kLogits>();
    case Distribution::kLogProbs:
      return with_q.template operator()<Distribution::kLogProbs>();
    case Distribution::kProbs:
      return with_q.template operator()<Distribution::kProbs>();
  }
}

template <class T>
void kl_div_forward(const KlDivRows<T>& rows, int64_t begin, int64_t end) {
  using C = Compute<T>;
  using V = Vec<C>;
  with_kl_div_kinds(rows, [&]<class Row, class Turned>() {
    Turned columns(rows);
    for_rows<C>(
        begin, end, rows.n_classes, [&](int64_t n) { columns.walk(n); }, [&](int64_t n) { Row(rows, n).walk(); });
  });
  const bool p_is_logits = rows.p_kind == Distribution::kLogits;
  // The logarithms of a vector of rows at once.
  for_each_vector<C>(end - begin, [&](int64_t i, auto width) {
    const int64_t n = begin + i;
    const V p_sum = load(rows.p_sum + n, width, C(1)), q_sum = load(rows.q_sum + n, width, C(1));
    const V mean = load(rows.offset + n, width, C(0));
    const Mask<C> known = (p_sum == p_sum) & (q_sum == q_sum);  // log is of numbers only
    const V shift = select<C>(known, V(log<C>(q_sum) - log<C>(p_sum)), broadcast<C>(NAN));
    const V outer = load(rows.centre + n, width, C(0)) + load(rows.mass + n, width, C(0)) * shift;
    V divergence = mean + outer;
    divergence = select<C>(divergence < 0, V{}, divergence);                             // of rounding
    divergence = select<C>((p_sum == 0) | (q_sum == 0), broadcast<C>(NAN), divergence);  // a row of -inf
    store(rows.offset + n, p_is_logits ? V(V{} - mean) : V(shift + 1), width);
    store(rows.output + n, divergence, width);
  });
}

template <class T>
void kl_div_backward(const KlDivRows<T>& rows, int64_t begin, int64_t end) {
  with_kl_div_kinds(rows, [&]<class Row, class Turned>() {
    Turned columns(rows);
    for_rows<Compute<T>>(
        begin, end, rows.n_classes, [&](int64_t n) { columns.backward(n); },
        [&](int64_t n) { Row(rows, n).backward(); });
  });
}

}  // namespace charlm::CHARLM_ISA
