// kl_divergence on a GPU. The formulas stand in ops/kl_divergence.h. Forward makes two passes over both rows; in the
// second they are in a cache.
#include "cuda/reduce.cuh"
#include "cuda/softmax.cuh"
#include "ops/kl_divergence.h"

namespace charlm::cuda {
namespace {

template <class C>
struct KlDivMaxima {
  C p = -INFINITY, q = -INFINITY;  // a NaN is dropped
  int64_t p_at = INT64_MAX;        // the first class that has p's maximum

  __device__ __forceinline__ static KlDivMaxima join(KlDivMaxima a, KlDivMaxima b) {
    const bool take_b = b.p > a.p || (b.p == a.p && b.p_at < a.p_at);
    return {take_b ? b.p : a.p, fmax(a.q, b.q), take_b ? b.p_at : a.p_at};
  }
  __device__ __forceinline__ KlDivMaxima shuffled(int by) const {
    return {shuffle_down(p, by), shuffle_down(q, by), shuffle_down(p_at, by)};
  }
};

template <class C>
struct KlDivSums {
  C p = 0, q = 0, cross = 0, farthest = 0;

  __device__ __forceinline__ static KlDivSums join(KlDivSums a, KlDivSums b) {
    return {a.p + b.p, a.q + b.q, a.cross + b.cross, fmax(a.farthest, b.farthest)};
  }
  __device__ __forceinline__ KlDivSums shuffled(int by) const {
    return {shuffle_down(p, by), shuffle_down(q, by), shuffle_down(cross, by), shuffle_down(farthest, by)};
  }
};

// One of the two rows, read as u and w.
template <class T>
class KlDivSide {
  using C = Compute<T>;

 public:
  __device__ __forceinline__ KlDivSide(const T* x, Distribution kind, C max)
      : x_(x), kind_(kind), reference_(max == -INFINITY ? C(0) : max) {}

  __device__ __forceinline__ C u(int64_t c) const {
    const C x = to_compute(x_[c]);
    return kind_ == Distribution::kProbs ? log(x) : x - reference_;
  }

  __device__ __forceinline__ C w(int64_t c, C u) const {
    if (kind_ == Distribution::kProbs) return to_compute(x_[c]);
    return u > 88 ? exp(u) : exp_of<T>(u);  // > 0: of no probability, but what torch's exp says of it
  }

 private:
  const T* const x_;
  const Distribution kind_;
  const C reference_;
};

template <class T, bool kBlock>
__global__ void __launch_bounds__(kRowThreads, kMinBlocks)
    kl_divergence_forward_rows(const __grid_constant__ KlDivergenceParams<T> rows) {
  using C = Compute<T>;
  using Threads = RowThreads<kBlock>;
  CHARLM_SHARED(KlDivMaxima<C>, all_maxima, kMaxWarps);
  CHARLM_SHARED(KlDivSums<C>, all_sums, kMaxWarps);
  const bool p_is_logits = rows.p_kind == Distribution::kLogits, q_is_logits = rows.q_kind == Distribution::kLogits;
  for (int64_t n = Threads::first_row(); n < rows.n_rows; n += Threads::row_step()) {
    const T* const p_row = rows.p + n * rows.p_stride;
    const T* const q_row = rows.q + n * rows.q_stride;
    KlDivMaxima<C> maxima;
    for (int64_t c = Threads::first(); c < rows.n_classes; c += Threads::step()) {
      const C x = to_compute(p_row[c]);
      if (x > maxima.p) {
        maxima.p = x;
        maxima.p_at = c;
      }
      maxima.q = fmax(maxima.q, to_compute(q_row[c]));
    }
    maxima = Threads::join(maxima, all_maxima);
    const C p_max = p_is_logits ? maxima.p : C(0), q_max = q_is_logits ? maxima.q : C(0);
    const KlDivSide<T> p(p_row, rows.p_kind, p_max), q(q_row, rows.q_kind, q_max);
    const C nearest = p_is_logits && maxima.p_at < rows.n_classes ? q.u(maxima.p_at) : C(0);
    const C centre = nearest > -kHuge<C> && nearest < INFINITY ? -nearest : C(0);
    KlDivSums<C> sums;
    for (int64_t c = Threads::first(); c < rows.n_classes; c += Threads::step()) {
      const C u = p.u(c), w = p.w(c, u), u_q = q.u(c), difference = finite(u) - finite(u_q);
      sums.p += w;
      if (q_is_logits) sums.q += q.w(c, u_q);
      sums.cross += w * (difference - centre);
      sums.farthest = fmax(sums.farthest, difference);
    }
    sums = Threads::join(sums, all_sums);
    if (Threads::first() != 0) continue;
    const C p_sum = p_is_logits ? sums.p : C(1), q_sum = q_is_logits ? sums.q : C(1);
    const C mass = p_is_logits ? C(1) : sums.p, shift = log(q_sum) - log(p_sum);
    C mean = sums.cross / p_sum;
    if (sums.farthest > kHuge<C> / 2 && mean == mean) mean = INFINITY;
    C divergence = mean + (centre + mass * shift);
    if (divergence < 0) divergence = 0;                 // of rounding
    if (p_sum == 0 || q_sum == 0) divergence = C(NAN);  // a row of -inf
    rows.p_max[n] = p_max;
    rows.p_sum[n] = p_sum;
    rows.q_max[n] = q_max;
    rows.q_sum[n] = q_sum;
    rows.mass[n] = mass;
    rows.centre[n] = centre;
    rows.offset[n] = p_is_logits ? -mean : shift + 1;
    rows.output[n] = from_compute<T>(divergence);
  }
}

template <class T, bool kBlock>
__global__ void __launch_bounds__(kRowThreads, kMinBlocks)
    kl_divergence_backward_rows(const __grid_constant__ KlDivergenceParams<T> rows) {
  using C = Compute<T>;
  using Threads = RowThreads<kBlock>;
  for (int64_t n = Threads::first_row(); n < rows.n_rows; n += Threads::row_step()) {
    const KlDivSide<T> p(rows.p + n * rows.p_stride, rows.p_kind, rows.p_max[n]);
    const KlDivSide<T> q(rows.q + n * rows.q_stride, rows.q_kind, rows.q_max[n]);
    const C g = rows.grad_output[n], p_sum = rows.p_sum[n], q_sum = rows.q_sum[n], mass = rows.mass[n];
    const C p_factor = g / p_sum, q_factor = g / q_sum, ratio = q_sum / p_sum;
    const C centre = rows.centre[n], offset = rows.offset[n];
    for (int64_t c = Threads::first(); c < rows.n_classes; c += Threads::step()) {
      const C u = p.u(c), w = p.w(c, u), u_q = q.u(c);
      if (rows.p_grad) {
        const C difference = finite(u) - finite(u_q), inner = (difference - centre) + offset;
        C value = (w * p_factor) * inner;
        if (rows.p_kind == Distribution::kProbs) value = w == 0 ? C(0) : inner * g;
        const bool is_infinite = rows.p_kind == Distribution::kLogits ? offset == -INFINITY : difference > kHuge<C> / 2;
        rows.p_grad[n * rows.n_classes + c] = from_compute<T>(is_infinite ? C(0) : value);
      }
      if (rows.q_grad) {
        C value = -w * p_factor;
        if (rows.q_kind != Distribution::kLogProbs) {
          const C w_q = q.w(c, u_q);
          if (rows.q_kind == Distribution::kLogits) {
            value = (w_q * mass - w * ratio) * q_factor;  // exactly 0 where p = q, however it is contracted
          } else {
            value = w_q == 0 ? C(0) : value / w_q;
          }
        }
        rows.q_grad[n * rows.n_classes + c] = from_compute<T>(value);
      }
    }
  }
}

template <class T>
int kl_divergence_forward(const KlDivergenceParams<T>& rows, Launch& at) {
  const auto kernel =
      shares_block(rows.n_classes) ? kl_divergence_forward_rows<T, true> : kl_divergence_forward_rows<T, false>;
  return launch(kernel, row_blocks(rows.n_rows, rows.n_classes), kRowThreads, 0, at.stream, rows);
}

template <class T>
int kl_divergence_backward(const KlDivergenceParams<T>& rows, Launch& at) {
  const auto kernel =
      shares_block(rows.n_classes) ? kl_divergence_backward_rows<T, true> : kl_divergence_backward_rows<T, false>;
  return launch(kernel, row_blocks(rows.n_rows, rows.n_classes), kRowThreads, 0, at.stream, rows);
}

CHARLM_REGISTER_KERNELS(kl_divergence, {&kl_divergence_forward<T>, &kl_divergence_backward<T>});

}  // namespace
}  // namespace charlm::cuda
