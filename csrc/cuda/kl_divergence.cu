// kl_divergence on a GPU. The formulas are in ops/kl_divergence.h. Forward makes two passes over both rows; the second
// reads them from a cache.
#include "cuda/rows.cuh"
#include "ops/kl_divergence.h"

namespace charlm::cuda {
namespace {

template <class C>
struct KlDivergenceMaxima {
  C p = -INFINITY, q = -INFINITY;  // NaN is ignored
  int64_t p_argmax = INT64_MAX;    // the first class that has p's maximum

  __device__ __forceinline__ static KlDivergenceMaxima join(KlDivergenceMaxima a, KlDivergenceMaxima b) {
    const bool take_b = b.p > a.p || (b.p == a.p && b.p_argmax < a.p_argmax);
    return {take_b ? b.p : a.p, fmax(a.q, b.q), take_b ? b.p_argmax : a.p_argmax};
  }
  __device__ __forceinline__ KlDivergenceMaxima shuffled(int step) const {
    return {shuffle_down(p, step), shuffle_down(q, step), shuffle_down(p_argmax, step)};
  }
};

template <class C>
struct KlDivergenceSums {
  C p = 0, q = 0, cross = 0, farthest = 0;

  __device__ __forceinline__ static KlDivergenceSums join(KlDivergenceSums a, KlDivergenceSums b) {
    return {a.p + b.p, a.q + b.q, a.cross + b.cross, fmax(a.farthest, b.farthest)};
  }
  __device__ __forceinline__ KlDivergenceSums shuffled(int step) const {
    return {shuffle_down(p, step), shuffle_down(q, step), shuffle_down(cross, step), shuffle_down(farthest, step)};
  }
};

// One of the two rows, read as u and w.
template <class T>
class KlDivergenceSide {
  using C = Compute<T>;

 public:
  __device__ __forceinline__ KlDivergenceSide(const T* x, Distribution kind, C max)
      : x_(x), kind_(kind), reference_(max == -INFINITY ? C(0) : max) {}

  __device__ __forceinline__ C u(int64_t c) const {
    const C x = to_compute(x_[c]);
    return kind_ == Distribution::kProbs ? log(x) : x - reference_;
  }

  __device__ __forceinline__ C w(int64_t c, C u) const {
    if (kind_ == Distribution::kProbs) return to_compute(x_[c]);
    return u > 88 ? exp(u) : exp_of<T>(u);  // u > 0 is no log-probability; torch's exp is defined there too
  }

 private:
  const T* const x_;
  const Distribution kind_;
  const C reference_;
};

template <class T, bool kBlock>
__global__ void __launch_bounds__(kRowThreads, kMinResidentBlocks)
    kl_divergence_forward_rows(const __grid_constant__ KlDivergenceParams<T> params) {
  using C = Compute<T>;
  using Threads = RowThreads<kBlock>;
  CHARLM_SHARED(KlDivergenceMaxima<C>, all_maxima, kMaxWarps);
  CHARLM_SHARED(KlDivergenceSums<C>, all_sums, kMaxWarps);
  const bool p_is_logits = params.p_kind == Distribution::kLogits, q_is_logits = params.q_kind == Distribution::kLogits;
  for (int64_t n = Threads::first_row(); n < params.n_rows; n += Threads::row_step()) {
    const T* const p_row = params.p + n * params.p_stride;
    const T* const q_row = params.q + n * params.q_stride;
    KlDivergenceMaxima<C> maxima;
    for (int64_t c = Threads::first(); c < params.n_classes; c += Threads::step()) {
      const C x = to_compute(p_row[c]);
      if (x > maxima.p) {
        maxima.p = x;
        maxima.p_argmax = c;
      }
      maxima.q = fmax(maxima.q, to_compute(q_row[c]));
    }
    maxima = Threads::join(maxima, all_maxima);
    const C p_max = p_is_logits ? maxima.p : C(0), q_max = q_is_logits ? maxima.q : C(0);
    const KlDivergenceSide<T> p(p_row, params.p_kind, p_max), q(q_row, params.q_kind, q_max);
    const C nearest = p_is_logits && maxima.p_argmax < params.n_classes ? q.u(maxima.p_argmax) : C(0);
    const C centre = nearest > -kHuge<C> && nearest < INFINITY ? -nearest : C(0);
    KlDivergenceSums<C> sums;
    for (int64_t c = Threads::first(); c < params.n_classes; c += Threads::step()) {
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
    if (divergence < 0) divergence = 0;                 // from rounding
    if (p_sum == 0 || q_sum == 0) divergence = C(NAN);  // a row of -inf
    params.p_max[n] = p_max;
    params.p_sum[n] = p_sum;
    params.q_max[n] = q_max;
    params.q_sum[n] = q_sum;
    params.mass[n] = mass;
    params.centre[n] = centre;
    params.offset[n] = p_is_logits ? -mean : shift + 1;
    params.output[n] = from_compute<T>(divergence);
  }
}

template <class T, bool kBlock>
__global__ void __launch_bounds__(kRowThreads, kMinResidentBlocks)
    kl_divergence_backward_rows(const __grid_constant__ KlDivergenceParams<T> params) {
  using C = Compute<T>;
  using Threads = RowThreads<kBlock>;
  for (int64_t n = Threads::first_row(); n < params.n_rows; n += Threads::row_step()) {
    const KlDivergenceSide<T> p(params.p + n * params.p_stride, params.p_kind, params.p_max[n]);
    const KlDivergenceSide<T> q(params.q + n * params.q_stride, params.q_kind, params.q_max[n]);
    const C g = params.grad_output[n], p_sum = params.p_sum[n], q_sum = params.q_sum[n], mass = params.mass[n];
    const C p_factor = g / p_sum, q_factor = g / q_sum, ratio = q_sum / p_sum;
    const C centre = params.centre[n], offset = params.offset[n];
    for (int64_t c = Threads::first(); c < params.n_classes; c += Threads::step()) {
      const C u = p.u(c), w = p.w(c, u), u_q = q.u(c);
      if (params.p_grad) {
        const C difference = finite(u) - finite(u_q), inner = (difference - centre) + offset;
        C value = (w * p_factor) * inner;
        if (params.p_kind == Distribution::kProbs) value = w == 0 ? C(0) : inner * g;
        const bool is_infinite =
            params.p_kind == Distribution::kLogits ? offset == -INFINITY : difference > kHuge<C> / 2;
        params.p_grad[n * params.n_classes + c] = from_compute<T>(is_infinite ? C(0) : value);
      }
      if (params.q_grad) {
        C value = -w * p_factor;
        if (params.q_kind != Distribution::kLogProbs) {
          const C w_q = q.w(c, u_q);
          if (params.q_kind == Distribution::kLogits) {
            value = (w_q * mass - w * ratio) * q_factor;  // exactly 0 if p = q, however the compiler contracts it
          } else {
            value = w_q == 0 ? C(0) : value / w_q;
          }
        }
        params.q_grad[n * params.n_classes + c] = from_compute<T>(value);
      }
    }
  }
}

template <class T>
int kl_divergence_forward(const KlDivergenceParams<T>& params, Launch& launch) {
  const auto kernel =
      shares_block(params.n_classes) ? kl_divergence_forward_rows<T, true> : kl_divergence_forward_rows<T, false>;
  return launch_kernel(kernel, row_blocks(params.n_rows, params.n_classes), kRowThreads, 0, launch.stream, params);
}

template <class T>
int kl_divergence_backward(const KlDivergenceParams<T>& params, Launch& launch) {
  const auto kernel =
      shares_block(params.n_classes) ? kl_divergence_backward_rows<T, true> : kl_divergence_backward_rows<T, false>;
  return launch_kernel(kernel, row_blocks(params.n_rows, params.n_classes), kRowThreads, 0, launch.stream, params);
}

CHARLM_REGISTER_KERNELS(kl_divergence, {&kl_divergence_forward<T>, &kl_divergence_backward<T>});

}  // namespace
}  // namespace charlm::cuda
