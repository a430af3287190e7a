// kl_divergence on a GPU. The formulas are in ops/kl_divergence.h. Here each u is relative to the maxima that are known
// so far, and so is the centre k, so that no common offset of logits costs digits.
#include "cuda/row_packs.cuh"
#include "ops/kl_divergence.h"

namespace charlm::cuda {
namespace {

template <class C>
__device__ __forceinline__ C reference_of(C max) {
  return max == -INFINITY ? C(0) : max;
}

// One of the two rows, read as u and w.
template <class T, bool kLogits>
class KlDivergenceSide {
  using C = Compute<T>;

 public:
  __device__ __forceinline__ KlDivergenceSide(Distribution kind, C max) : kind_(kind), reference_(reference_of(max)) {}

  __device__ __forceinline__ C u(C x) const {
    return !kLogits && kind_ == Distribution::kProbs ? log(x) : x - reference_;
  }

  __device__ __forceinline__ C w(C x, C u) const {
    if constexpr (kLogits) return exp_of<T>(u);
    if (kind_ == Distribution::kProbs) return x;
    return u > 88 ? exp(u) : exp_of<T>(u);  // u > 0 is no log-probability; torch's exp is defined there too
  }

 private:
  const Distribution kind_;
  const C reference_;
};

// For |k| < kNear the error of an exponent that has k as a part is 2^-14 at most, which half types do not show.
constexpr float kNear = 1024;

// What some threads know of a row. The maxima of distributions that are not logits stay -inf.
template <class T, bool kLogits>
struct KlDivergencePart {
  using C = Compute<T>;

  C p_max = -INFINITY, q_max = -INFINITY;  // NaN is ignored
  C q_at_p_max = 0;                        // u^q, relative to 0, of the class with p's maximum
  C p_sum = 0, q_sum = 0, cross = 0;
  C farthest = 0;  // the largest u^p - u^q, or for logits u^p - u^q - k

  // k: u^p - u^q of the largest logit of p, if that is a number.
  __device__ __forceinline__ C centre() const {
    const C nearest = q_at_p_max - reference_of(q_max);
    return p_max > -INFINITY && nearest > -kHuge<C> / 2 && nearest < INFINITY ? -nearest : C(0);
  }

  // If the largest logit of p has no finite u^q, then the result is infinite or NaN, and no shift of the centre
  // matters.
  __device__ __forceinline__ void rescale_p_to(C max, C q_at_max) {
    const C factor = exp_of<T>(p_max - max);
    C shift = (p_max - max) - (q_at_p_max - q_at_max);  // by which k becomes smaller
    if (!(fabs(shift) < kHuge<C> / 2)) shift = 0;
    p_sum *= factor;
    cross = cross == INFINITY && factor == 0 ? C(0) : cross * factor;
    cross += p_sum * shift;
    p_max = max;
    q_at_p_max = q_at_max;
  }

  template <class Op>
  __device__ __forceinline__ void rescale_q_to(const Op& op, C max) {
    q_sum *= exp_of<T>(q_max - max);
    if (!op.p_is_logits()) cross += p_sum * (max - reference_of(q_max));  // k stays 0
    q_max = max;
  }

  // The largest u^q, relative to 0, of the classes where p is `max`; NaN is ignored.
  template <class Op, int K, int P>
  __device__ __forceinline__ static C q_where_p_is(C max, const Op& op, const Elements<T, K> (&x)[2][P]) {
    const KlDivergenceSide<T, kLogits> q(op.q_kind(), 0);
    C largest = -INFINITY;
#pragma unroll
    for (int i = 0; i < P; i++) {
      C p[K], of_q[K];
      x[0][i].unpack(p);
      x[1][i].unpack(of_q);
#pragma unroll
      for (int k = 0; k < K; k++) {
        if (p[k] == max) largest = fmax(largest, q.u(of_q[k]));
      }
    }
    return largest;
  }

  // Of a row without any sums yet.
  template <class Op, int K, int P>
  __device__ __forceinline__ void set_maxima(const Op& op, const Elements<T, K> (&x)[2][P]) {
    if (op.p_is_logits()) p_max = largest(x[0]);
    if (op.q_is_logits()) q_max = largest(x[1]);
  }

  template <int kLanes, class Op, int K, int P>
  __device__ __forceinline__ void join_maxima(const Op& op, const Elements<T, K> (&x)[2][P]) {
    q_max = max_over_lanes(q_max, kLanes);
    p_max = max_over_lanes(p_max, kLanes);
    if (op.p_is_logits()) q_at_p_max = max_over_lanes(q_where_p_is(p_max, op, x), kLanes);
  }

  template <class Op, int K, int P>
  __device__ __forceinline__ void raise_maxima(const Op& op, const Elements<T, K> (&x)[2][P]) {
    if (op.p_is_logits()) {
      const C larger = largest(x[0]);
      if (larger > p_max) rescale_p_to(larger, q_where_p_is(larger, op, x));
    }
    if (op.q_is_logits()) {
      const C larger = largest(x[1]);
      if (larger > q_max) rescale_q_to(op, larger);
    }
  }

  template <class Op, int K, int P>
  __device__ __forceinline__ void add_to_sums(const Op& op, const Elements<T, K> (&x)[2][P]) {
    if constexpr (!kLogits) {
      add(op, x);
    } else if (kIsHalf<T> && fabs(centre()) < kNear) {
      add_logits<true>(x);
    } else {
      add_logits<false>(x);
    }
  }

  template <class Op, int K, int P>
  __device__ __forceinline__ void add(const Op& op, const Elements<T, K> (&x)[2][P]) {
    const KlDivergenceSide<T, false> p(op.p_kind(), p_max), q(op.q_kind(), q_max);
    const C k_centre = centre();
#pragma unroll
    for (int i = 0; i < P; i++) {
      C of_p[K], of_q[K];
      x[0][i].unpack(of_p);
      x[1][i].unpack(of_q);
#pragma unroll
      for (int k = 0; k < K; k++) {
        const C u = p.u(of_p[k]), u_q = q.u(of_q[k]), w = p.w(of_p[k], u), difference = finite(u) - finite(u_q);
        p_sum += w;
        if (op.q_is_logits()) q_sum += q.w(of_q[k], u_q);
        cross += w * (difference - k_centre);
        farthest = fmax(farthest, difference);
      }
    }
  }

  // u^q + k is the distance from q's logit at p's maximum. kFromThere: so is the exponent of q.
  template <bool kFromThere, int K, int P>
  __device__ __forceinline__ void add_logits(const Elements<T, K> (&x)[2][P]) {
    constexpr C kLog2e = 1.44269504f;
    const C k_centre = centre(), p_from = reference_of(p_max), q_reference = reference_of(q_max);
    const C q_from = k_centre == 0 ? q_reference : q_at_p_max, offset = -k_centre * kLog2e;
#pragma unroll
    for (int i = 0; i < P; i++) {
      C p[K], q[K];
      x[0][i].unpack(p);
      x[1][i].unpack(q);
#pragma unroll
      for (int k = 0; k < K; k++) {
        const C u = p[k] - p_from, v = q[k] - q_from, w = exp_of<T>(u), difference = finite(u) - finite(v);
        p_sum += w;
        if constexpr (kFromThere) {
          q_sum += exp2_approximate(fmaf(v, kLog2e, offset));
        } else {
          q_sum += exp_of<T>(q[k] - q_reference);
        }
        cross += w * difference;
        farthest = fmax(farthest, difference);
      }
    }
  }

  template <int kLanes>
  __device__ __forceinline__ void join_sums() {
    p_sum = sum_over_lanes(p_sum, kLanes);
    q_sum = sum_over_lanes(q_sum, kLanes);
    cross = sum_over_lanes(cross, kLanes);
    farthest = max_over_lanes(farthest, kLanes);
  }

  // For threads with different maxima.
  template <int kLanes, class Op>
  __device__ __forceinline__ void join(const Op& op) {
    const C larger_p = max_over_lanes(p_max, kLanes), larger_q = max_over_lanes(q_max, kLanes);
    const C q_at_larger = max_over_lanes(p_max == larger_p ? q_at_p_max : -INFINITY, kLanes);
    if (larger_p > -INFINITY) rescale_p_to(larger_p, q_at_larger);
    if (larger_q > q_max) rescale_q_to(op, larger_q);
    join_sums<kLanes>();
  }
};

// kLogits: both distributions are given as logits.
template <class Type, bool kLogits>
struct KlDivergenceOp {
  using T = Type;
  using C = Compute<T>;
  using Params = KlDivergenceParams<T>;
  using Part = KlDivergencePart<T, kLogits>;

  static constexpr int kInputs = 2;
  static constexpr bool kManyShapes = kLogits && sizeof(T) < 8;
  static constexpr int kResidentBlocks = sizeof(T) == 8 ? 1 : kLogits ? 3 : 2;  // of kRowThreads
  static constexpr int kMaxThreads = kResidentBlocks * kRowThreads;             // of a block

  const Params& params;

  __device__ __forceinline__ explicit KlDivergenceOp(const Params& params) : params(params) {}

  __device__ __forceinline__ Distribution p_kind() const { return kLogits ? Distribution::kLogits : params.p_kind; }
  __device__ __forceinline__ Distribution q_kind() const { return kLogits ? Distribution::kLogits : params.q_kind; }
  __device__ __forceinline__ bool p_is_logits() const { return p_kind() == Distribution::kLogits; }
  __device__ __forceinline__ bool q_is_logits() const { return q_kind() == Distribution::kLogits; }

  __device__ __forceinline__ const T* input(int j, int64_t n) const {
    return j == 0 ? params.p + n * params.p_stride : params.q + n * params.q_stride;
  }
  __device__ __forceinline__ T absent(int j) const {
    return (j == 0 ? p_kind() : q_kind()) == Distribution::kProbs ? T{} : kMinusInfinity<T>;
  }

  __device__ __forceinline__ void finish(const Part& part, int64_t n) const {
    const C centre = part.centre();
    const C p_sum = p_is_logits() ? part.p_sum : C(1), q_sum = q_is_logits() ? part.q_sum : C(1);
    const C mass = p_is_logits() ? C(1) : part.p_sum, shift = log(q_sum) - log(p_sum);
    C mean = part.cross / p_sum;
    if (part.farthest > kHuge<C> / 2 && mean == mean) mean = INFINITY;
    C divergence = mean + (centre + mass * shift);
    if (divergence < 0) divergence = 0;                 // from rounding
    if (p_sum == 0 || q_sum == 0) divergence = C(NAN);  // a row of -inf
    params.p_max[n] = p_is_logits() ? part.p_max : C(0);
    params.p_sum[n] = p_sum;
    params.q_max[n] = q_is_logits() ? part.q_max : C(0);
    params.q_sum[n] = q_sum;
    params.mass[n] = mass;
    params.centre[n] = centre;
    params.offset[n] = p_is_logits() ? -mean : shift + 1;
    params.output[n] = from_compute<T>(divergence);
  }

  class Gradient {
   public:
    __device__ __forceinline__ Gradient(const KlDivergenceOp& op, int64_t n)
        : op_(op),
          p_(op.p_kind(), op.params.p_max[n]),
          q_(op.q_kind(), op.params.q_max[n]),
          first_(n * op.params.n_classes),
          mass_(kLogits ? C(1) : op.params.mass[n]),
          centre_(op.params.centre[n]) {
      const C p_sum = op.params.p_sum[n], q_sum = op.params.q_sum[n];
      g_ = load_gradient<T>(op.params.grad_output, op.params.unconverted_grad_output, n);
      p_factor_ = g_ / p_sum;
      q_factor_ = g_ / q_sum;
      ratio_ = q_sum / p_sum;
      offset_ = op.params.offset[n];
      const bool is_infinite = op.p_is_logits() && offset_ == -INFINITY;
      p_gradient_factor_ = is_infinite ? C(0) : p_factor_;
      if (is_infinite) offset_ = 0;
    }

    template <int K>
    __device__ __forceinline__ void write(const Elements<T, K> (&x)[2], int64_t c) const {
      C p[K], q[K];
      x[0].unpack(p);
      x[1].unpack(q);
#pragma unroll
      for (int k = 0; k < K; k++) {
        const C u = p_.u(p[k]), w = p_.w(p[k], u), u_q = q_.u(q[k]);
        p[k] = p_gradient(u, w, u_q);
        q[k] = q_gradient(w, q[k], u_q);
      }
      if (op_.params.p_grad) store_elements<K>(op_.params.p_grad + first_ + c, p);
      if (op_.params.q_grad) store_elements<K>(op_.params.q_grad + first_ + c, q);
    }

   private:
    __device__ __forceinline__ C p_gradient(C u, C w, C u_q) const {
      const C difference = finite(u) - finite(u_q), inner = (difference - centre_) + offset_;
      const C value = (w * p_gradient_factor_) * inner;
      if (op_.p_is_logits()) return value;
      if (difference > kHuge<C> / 2) return 0;
      if (op_.p_kind() == Distribution::kLogProbs) return value;
      return w == 0 ? C(0) : inner * g_;
    }

    __device__ __forceinline__ C q_gradient(C w, C x, C u_q) const {
      const C value = -w * p_factor_;
      if (op_.q_kind() == Distribution::kLogProbs) return value;
      const C w_q = q_.w(x, u_q);
      if (op_.q_kind() == Distribution::kProbs) return w_q == 0 ? C(0) : value / w_q;
      return (w_q * mass_ - w * ratio_) * q_factor_;  // exactly 0 if p = q, however the compiler contracts it
    }

    const KlDivergenceOp& op_;
    const KlDivergenceSide<T, kLogits> p_, q_;
    const int64_t first_;
    const C mass_, centre_;
    C g_, p_factor_, p_gradient_factor_, q_factor_, ratio_, offset_;
  };
};

template <class T>
bool are_logits(const KlDivergenceParams<T>& params) {
  return params.p_kind == Distribution::kLogits && params.q_kind == Distribution::kLogits;
}

template <class T>
int kl_divergence_forward(const KlDivergenceParams<T>& params, Launch& launch) {
  const Rows<T> inputs[] = {{params.p, params.p_stride}, {params.q, params.q_stride}};
  return are_logits(params) ? launch_forward<KlDivergenceOp<T, true>>(params, inputs, launch)
                            : launch_forward<KlDivergenceOp<T, false>>(params, inputs, launch);
}

template <class T>
int kl_divergence_backward(const KlDivergenceParams<T>& params, Launch& launch) {
  const Rows<T> tensors[] = {{params.p, params.p_stride},
                             {params.q, params.q_stride},
                             {params.p_grad, params.n_classes},
                             {params.q_grad, params.n_classes}};
  return are_logits(params) ? launch_backward<KlDivergenceOp<T, true>>(params, tensors, launch)
                            : launch_backward<KlDivergenceOp<T, false>>(params, tensors, launch);
}

CHARLM_REGISTER_KERNELS(kl_divergence, {&kl_divergence_forward<T>, &kl_divergence_backward<T>});

}  // namespace
}  // namespace charlm::cuda
