// kl_divergence on the CPU. Rows with few classes are processed a vector of rows at a time (cpu/rows.h), all others one
// by one. The formulas are in ops/kl_divergence.h.
#pragma once

#include "cpu/functions.h"
#include "cpu/rows.h"
#include "ops/kl_divergence.h"

namespace charlm::CHARLM_ISA {

// One of the two rows, or a vector of rows in transposed layout, read as u and w.
template <class T, Distribution kKind>
class KlDivergenceSide {
  using C = Compute<T>;
  using V = Vec<C>;

 public:
  static constexpr bool kIsLogits = kKind == Distribution::kLogits;

  // `max`: the largest logit, or 0 for other kinds.
  KlDivergenceSide(const T* x, V max) : x_(x), reference_(select<C>(max == -INFINITY, V{}, max)) {}

  // u and w of K vectors from class c on; -inf and 0 past the end of a row.
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
  return max<C>(broadcast<C>(-kHuge<C>), u);  // NaN stays NaN
}

// D_c of the most probable class from its u^q_c, since its u^p_c is 0; 0 if that is not finite.
template <class C>
CHARLM_INLINE Vec<C> centre_of(Vec<C> u_q) {
  const Mask<C> above = u_q > -kHuge<C>, below = u_q < INFINITY;
  return select<C>(above & below, Vec<C>{} - u_q, Vec<C>{});
}

// The values of a row that the gradients of its classes share.
template <class C, Distribution kP, Distribution kQ>
struct KlDivergenceFactors {
  using V = Vec<C>;
  static constexpr bool kOfLogits = kP == Distribution::kLogits;

  V g, centre, offset, mass, p_factor, q_factor, ratio;

  KlDivergenceFactors(V grad_output, V p_sum, V q_sum, V row_mass, V row_centre, V row_offset)
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
    return select<C>(difference > kHuge<C> / 2, V{}, value);
  }

  V of_q(V w, V w_q) const {
    // Exactly 0 if p = q, however the compiler contracts it.
    if constexpr (kQ == Distribution::kLogits) return (w_q * mass - w * ratio) * q_factor;
    const V value = V{} - w * p_factor;
    if constexpr (kQ == Distribution::kProbs) return select<C>(w_q == 0, V{}, value / w_q);
    return value;
  }
};

template <class T, Distribution kP, Distribution kQ>
class KlDivergenceRow {
  using C = Compute<T>;
  using V = Vec<C>;
  using P = KlDivergenceSide<T, kP>;
  using Q = KlDivergenceSide<T, kQ>;

 public:
  KlDivergenceRow(const KlDivergenceParams<T>& params, int64_t n)
      : params_(params), n_(n), p_(params.p + n * params.p_stride), q_(params.q + n * params.q_stride) {}

  // Two passes over both rows; the second reads them from a cache. Writes p_max, p_sum, q_max, q_sum, mass, centre, and
  // W / S_p or infinity as `offset`.
  CHARLM_NOINLINE void forward() const {
    const int64_t n_classes = params_.n_classes;
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
      for_each_vector_group<C, 2>(size, [&]<int K>(int64_t i, auto width, Count<K>) {
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
    params_.p_max[n_] = p_largest.value;
    params_.p_sum[n_] = P::kIsLogits ? p_sum : C(1);
    params_.q_max[n_] = q_max;
    params_.q_sum[n_] = Q::kIsLogits ? q_sum : C(1);
    params_.mass[n_] = P::kIsLogits ? C(1) : p_sum;
    params_.centre[n_] = centre;
    params_.offset[n_] = farthest > kHuge<C> / 2 && mean == mean ? C(INFINITY) : mean;
  }

  CHARLM_NOINLINE void backward() const {
    const auto of_row = [this](const C* x) { return broadcast(x[n_]); };
    const KlDivergenceFactors<C, kP, kQ> factors(of_row(params_.grad_output), of_row(params_.p_sum),
                                                 of_row(params_.q_sum), of_row(params_.mass), of_row(params_.centre),
                                                 of_row(params_.offset));
    T* const p_grad = params_.p_grad ? params_.p_grad + n_ * params_.n_classes : nullptr;
    T* const q_grad = params_.q_grad ? params_.q_grad + n_ * params_.n_classes : nullptr;
    const P p(p_, of_row(params_.p_max));
    const Q q(q_, of_row(params_.q_max));
    for_each_vector_group<C, 2>(params_.n_classes, [&]<int K>(int64_t c, auto width, Count<K>) {
      prefetch<K * kLanes<C> * sizeof(T)>(p_ + c + kPrefetchDistance<T>);
      prefetch<K * kLanes<C> * sizeof(T)>(q_ + c + kPrefetchDistance<T>);
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
  const KlDivergenceParams<T>& params_;
  const int64_t n_;
  const T* const p_;
  const T* const q_;
};

// ---------------------------------------------------------------------------------------------------- transposed
// kLanes rows with few classes.
template <class T, Distribution kP, Distribution kQ>
class KlDivergenceColumns {
  using C = Compute<T>;
  using V = Vec<C>;
  using P = KlDivergenceSide<T, kP>;
  using Q = KlDivergenceSide<T, kQ>;

 public:
  explicit KlDivergenceColumns(const KlDivergenceParams<T>& params)
      : params_(params), p_(params.n_classes), q_(params.n_classes) {}

  // KlDivergenceRow::forward for the rows [n, n + kLanes).
  CHARLM_NOINLINE void forward(int64_t n) {
    read(n);
    V p_max{}, q_max{}, centre{};
    if constexpr (P::kIsLogits) p_max = p_.max();
    if constexpr (Q::kIsLogits) q_max = q_.max();
    const P p(p_.data(), p_max);
    const Q q(q_.data(), q_max);
    if constexpr (P::kIsLogits) centre = centre_at(p_max, q_max);
    V p_sums[4] = {}, q_sums[4] = {}, crosses[4] = {}, far{};  // four chains: shorter sums round less
    int chain = 0;
    for_each_classes<2>(params_.n_classes, [&]<int K>(int64_t c, Count<K>) {
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
    write(params_.p_max, p_max);
    write(params_.p_sum, P::kIsLogits ? p_sum : one);
    write(params_.q_max, q_max);
    write(params_.q_sum, Q::kIsLogits ? total(q_sums) : one);
    write(params_.mass, P::kIsLogits ? one : p_sum);
    write(params_.centre, centre);
    write(params_.offset, select<C>((far > kHuge<C> / 2) & (mean == mean), broadcast<C>(INFINITY), mean));
  }

  CHARLM_NOINLINE void backward(int64_t n) {
    read(n);
    const auto of_rows = [n](const C* x) { return load(x + n, Whole{}); };
    const KlDivergenceFactors<C, kP, kQ> factors(of_rows(params_.grad_output), of_rows(params_.p_sum),
                                                 of_rows(params_.q_sum), of_rows(params_.mass), of_rows(params_.centre),
                                                 of_rows(params_.offset));
    const P p(p_.data(), of_rows(params_.p_max));
    const Q q(q_.data(), of_rows(params_.q_max));
    for_each_classes<2>(params_.n_classes, [&]<int K>(int64_t c, Count<K>) {
      V u[K], w[K], u_q[K], w_q[K];
      p.read(c * kLanes<C>, Whole{}, u, w);
      q.read(c * kLanes<C>, Whole{}, u_q, w_q);
      for (int k = 0; params_.p_grad && k < K; k++) p_.set(c + k, factors.of_p(u[k], w[k], u_q[k]));
      for (int k = 0; params_.q_grad && k < K; k++) q_.set(c + k, factors.of_q(w[k], w_q[k]));
    });
    if (params_.p_grad) p_.write(params_.p_grad + n * params_.n_classes, params_.n_classes);
    if (params_.q_grad) q_.write(params_.q_grad + n * params_.n_classes, params_.n_classes);
  }

 private:
  void read(int64_t n) {
    p_.read(params_.p + n * params_.p_stride, params_.p_stride);
    q_.read(params_.q + n * params_.q_stride, params_.q_stride);
  }

  // D_c of the first class with the largest logit of p.
  V centre_at(V p_max, V q_max) const {
    V at_largest{};
    for (int64_t c = params_.n_classes - 1; c >= 0; c--) at_largest = select<C>(p_[c] == p_max, q_[c], at_largest);
    T q[kLanes<C>];
    store(q, at_largest, Whole{});
    V u[1], w[1];
    Q(q, q_max).read(0, Whole{}, u, w);
    return centre_of<C>(u[0]);
  }

  const KlDivergenceParams<T>& params_;
  Columns<T> p_, q_;
};

// Calls f.template operator()<Row, Columns>() with the types for these kinds of distributions.
template <class T, class F>
void with_kl_divergence_kinds(const KlDivergenceParams<T>& params, F&& f) {
  const auto with_both = [&]<Distribution kP, Distribution kQ>() {
    f.template operator()<KlDivergenceRow<T, kP, kQ>, KlDivergenceColumns<T, kP, kQ>>();
  };
  const auto with_q = [&]<Distribution kP>() {
    switch (params.q_kind) {
      case Distribution::kLogits:
        return with_both.template operator()<kP, Distribution::kLogits>();
      case Distribution::kLogProbs:
        return with_both.template operator()<kP, Distribution::kLogProbs>();
      case Distribution::kProbs:
        return with_both.template operator()<kP, Distribution::kProbs>();
    }
  };
  switch (params.p_kind) {
    case Distribution::kLogits:
      return with_q.template operator()<Distribution::kLogits>();
    case Distribution::kLogProbs:
      return with_q.template operator()<Distribution::kLogProbs>();
    case Distribution::kProbs:
      return with_q.template operator()<Distribution::kProbs>();
  }
}

template <class T>
int kl_divergence_forward(const KlDivergenceParams<T>& params, Launch& launch) {
  const int64_t begin = launch.begin, end = launch.end;
  using C = Compute<T>;
  using V = Vec<C>;
  with_kl_divergence_kinds(params, [&]<class Row, class RowColumns>() {
    RowColumns columns(params);
    for_rows<C>(
        begin, end, params.n_classes, [&](int64_t n) { columns.forward(n); },
        [&](int64_t n) { Row(params, n).forward(); });
  });
  const bool p_is_logits = params.p_kind == Distribution::kLogits;
  // Logarithms for a vector of rows at once.
  for_each_vector<C>(end - begin, [&](int64_t i, auto width) {
    const int64_t n = begin + i;
    const V p_sum = load(params.p_sum + n, width, C(1)), q_sum = load(params.q_sum + n, width, C(1));
    const V mean = load(params.offset + n, width, C(0));
    const Mask<C> known = (p_sum == p_sum) & (q_sum == q_sum);  // log() does not propagate NaN
    const V shift = select<C>(known, V(log<C>(q_sum) - log<C>(p_sum)), broadcast<C>(NAN));
    const V outer = load(params.centre + n, width, C(0)) + load(params.mass + n, width, C(0)) * shift;
    V divergence = mean + outer;
    divergence = select<C>(divergence < 0, V{}, divergence);                             // from rounding
    divergence = select<C>((p_sum == 0) | (q_sum == 0), broadcast<C>(NAN), divergence);  // a row of -inf
    store(params.offset + n, p_is_logits ? V(V{} - mean) : V(shift + 1), width);
    store(params.output + n, divergence, width);
  });
  return 0;
}

template <class T>
int kl_divergence_backward(const KlDivergenceParams<T>& params, Launch& launch) {
  with_kl_divergence_kinds(params, [&]<class Row, class RowColumns>() {
    RowColumns columns(params);
    for_rows<Compute<T>>(
        launch.begin, launch.end, params.n_classes, [&](int64_t n) { columns.backward(n); },
        [&](int64_t n) { Row(params, n).backward(); });
  });
  return 0;
}

}  // namespace charlm::CHARLM_ISA
