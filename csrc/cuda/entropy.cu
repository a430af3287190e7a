// entropy on a GPU. The formulas are in ops/entropy.h.
#include "cuda/row_packs.cuh"
#include "ops/entropy.h"

namespace charlm::cuda {
namespace {

// 2^(z * log2 e - m * log2 e) takes two instructions less than exp_of(z - m). Its error grows with |m|: for |m| < kNear
// it is 2^-14 at most, which half types do not show.
constexpr float kNear = 1024;
constexpr float kLog2e = 1.44269504f, kLn2 = 0.693147181f;

template <class T>
__device__ __forceinline__ bool is_near(Compute<T> max) {
  return kIsHalf<T> && fabs(max) < kNear;  // false for NaN
}

// z, with what is below -2^14 replaced by it, which changes no sum if is_near(m): e^(z - m) is 0.
template <class T, int K>
__device__ __forceinline__ void unpack_near(Elements<T, K> x, float (&z)[K]) {
  constexpr float kLowest = -0x1p14f;
#ifdef __CUDA_ARCH__
  if constexpr (K > 1) {
    constexpr uint32_t kTwoLowest = __is_same(T, BFloat16) ? 0xc680c680 : 0xf400f400;
    x.bits.x = max_of_halves<T, true>(x.bits.x, kTwoLowest);
    x.bits.y = max_of_halves<T, true>(x.bits.y, kTwoLowest);
    x.bits.z = max_of_halves<T, true>(x.bits.z, kTwoLowest);
    x.bits.w = max_of_halves<T, true>(x.bits.w, kTwoLowest);
    return x.unpack(z);
  }
#endif
  x.unpack(z);
#pragma unroll
  for (int k = 0; k < K; k++) z[k] = z[k] < kLowest ? kLowest : z[k];
}

// What some threads know of a row: its maximum and the sums relative to it.
template <class T>
struct EntropyPart {
  using C = Compute<T>;

  C max = -INFINITY;  // NaN is ignored
  C sum = 0;          // sum_c e^(z_c - m)
  C cross = 0;        // sum_c e^(z_c - m) (z_c - m)

  // The logit that the sums are relative to: the maximum, or 0 while all logits are -inf.
  __device__ __forceinline__ C reference() const { return max == -INFINITY ? C(0) : max; }

  __device__ __forceinline__ void rescale_to(C larger) {
    const C distance = finite(reference() - larger);
    const C factor = exp_of<T>(max - larger);
    sum *= factor;
    cross = cross * factor + sum * distance;
    max = larger;
  }

  // Of a row without any sums yet.
  template <class Op, int K, int P>
  __device__ __forceinline__ void set_maxima(const Op&, const Elements<T, K> (&x)[1][P]) {
    max = largest(x[0]);
  }

  template <class Op, int K, int P>
  __device__ __forceinline__ void raise_maxima(const Op&, const Elements<T, K> (&x)[1][P]) {
    const C larger = largest(x[0]);
    if (larger > max) rescale_to(larger);
  }

  template <class Op, int K, int P>
  __device__ __forceinline__ void add_to_sums(const Op&, const Elements<T, K> (&x)[1][P]) {
    if constexpr (kIsHalf<T>) {
      if (is_near<T>(max)) return add_near(x[0]);
    }
    const C m = reference();
#pragma unroll
    for (int i = 0; i < P; i++) {
      C z[K];
      x[0][i].unpack(z);
#pragma unroll
      for (int k = 0; k < K; k++) {
        const C t = z[k] - m, e = exp_of<T>(t);
        sum += e;
        cross += e * finite(t);
      }
    }
  }

  template <int K, int P>
  __device__ __forceinline__ void add_near(const Elements<T, K> (&x)[P]) {
    const float offset = -max * kLog2e;
    float sums[2] = {0, 0}, crosses[2] = {0, 0};
#pragma unroll
    for (int i = 0; i < P; i++) {
      float z[K];
      unpack_near(x[i], z);
#pragma unroll
      for (int k = 0; k < K; k++) {
        const float t = fmaf(z[k], kLog2e, offset), e = exp2_approximate(t);
        sums[k % 2] += e;
        crosses[k % 2] = fmaf(e, t, crosses[k % 2]);
      }
    }
    sum += sums[0] + sums[1];
    cross += (crosses[0] + crosses[1]) * kLn2;
  }

  template <int kLanes, class Op, int K, int P>
  __device__ __forceinline__ void join_maxima(const Op&, const Elements<T, K> (&)[1][P]) {
    max = max_over_lanes(max, kLanes);
  }

  template <int kLanes>
  __device__ __forceinline__ void join_sums() {
    sum = sum_over_lanes(sum, kLanes);
    cross = sum_over_lanes(cross, kLanes);
  }

  // For threads with different maxima.
  template <int kLanes, class Op>
  __device__ __forceinline__ void join(const Op&) {
    const C larger = max_over_lanes(max, kLanes);
    if (larger > max) rescale_to(larger);
    join_sums<kLanes>();
  }
};

template <class Type>
struct EntropyOp {
  using T = Type;
  using C = Compute<T>;
  using Params = EntropyParams<T>;
  using Part = EntropyPart<T>;

  static constexpr int kInputs = 1;
  static constexpr bool kManyShapes = sizeof(T) < 8;
  static constexpr int kResidentBlocks = sizeof(T) < 8 ? 4 : 2;      // of kRowThreads
  static constexpr int kMaxThreads = kResidentBlocks * kRowThreads;  // of a block

  const Params& params;

  __device__ __forceinline__ explicit EntropyOp(const Params& params) : params(params) {}

  __device__ __forceinline__ const T* input(int, int64_t n) const { return params.logits + n * params.logits_stride; }
  __device__ __forceinline__ T absent(int) const { return kMinusInfinity<T>; }

  __device__ __forceinline__ void finish(const Part& part, int64_t n) const {
    const C distance = -part.cross / part.sum;  // NaN for a row without a softmax
    params.row_max[n] = part.max;
    params.row_sum[n] = part.sum;
    params.row_distance[n] = distance;
    params.entropy[n] = from_compute<T>(log(part.sum) + distance);
  }

  class Gradient {
   public:
    __device__ __forceinline__ Gradient(const EntropyOp& op, int64_t n)
        : row_(op.params.grad + n * op.params.n_classes),
          m_(op.params.row_max[n]),
          distance_(op.params.row_distance[n]),
          factor_(load_gradient<T>(op.params.grad_output, op.params.unconverted_grad_output, n) /
                  op.params.row_sum[n]) {}

    template <int K>
    __device__ __forceinline__ void write(const Elements<T, K> (&x)[1], int64_t c) const {
      constexpr float kLargestFactor = 0x1p64f;  // so that no product with t overflows
      C z[K];
      if constexpr (kIsHalf<T>) {
        if (is_near<T>(m_) && fabs(factor_) < kLargestFactor) {
          const float offset = -m_ * kLog2e, slope = -kLn2 * factor_, at_zero = -distance_ * factor_;
          unpack_near(x[0], z);
#pragma unroll
          for (int k = 0; k < K; k++) {
            const float t = fmaf(z[k], kLog2e, offset);
            z[k] = exp2_approximate(t) * fmaf(t, slope, at_zero);
          }
          return store_elements<K>(row_ + c, z);
        }
      }
      x[0].unpack(z);
#pragma unroll
      for (int k = 0; k < K; k++) {
        const C t = z[k] - m_;
        z[k] = (exp_of<T>(t) * factor_) * (-finite(t) - distance_);
      }
      store_elements<K>(row_ + c, z);
    }

   private:
    T* const row_;
    const C m_, distance_, factor_;
  };
};

template <class T>
int entropy_forward(const EntropyParams<T>& params, Launch& launch) {
  const Rows<T> inputs[] = {{params.logits, params.logits_stride}};
  return launch_forward<EntropyOp<T>>(params, inputs, launch);
}

template <class T>
int entropy_backward(const EntropyParams<T>& params, Launch& launch) {
  const Rows<T> tensors[] = {{params.logits, params.logits_stride}, {params.grad, params.n_classes}};
  return launch_backward<EntropyOp<T>>(params, tensors, launch);
}

CHARLM_REGISTER_KERNELS(entropy, {&entropy_forward<T>, &entropy_backward<T>});

}  // namespace
}  // namespace charlm::cuda
