// kl_div on a GPU, element by element, in packs of 16 bytes. The formulas are in ops/kl_div.h. Each block adds up its
// elements, and one more block adds up the sums of the blocks in order: every run gives the same bits, on every GPU.
#include "cuda/row_packs.cuh"
#include "ops/kl_div.h"

namespace charlm::cuda {
namespace {

constexpr int kThreads = 256;
// Blocks that must fit in a multiprocessor.
template <class T>
constexpr int kResidentBlocks = sizeof(T) == 8 ? 2 : 3;
constexpr int kLoadsInFlight = 4;  // packs of each tensor that a thread loads before it uses the first

// Half types show nothing of the error of the hardware's own powers and logarithms.
template <class T>
__device__ __forceinline__ Compute<T> any_exp_of(Compute<T> x) {
  if constexpr (kIsHalf<T>) {
    return exp2f(x * 1.44269504f);
  } else {
    return exp(x);
  }
}

template <class T>
__device__ __forceinline__ Compute<T> log_of(Compute<T> x) {
#ifdef __CUDA_ARCH__
  if constexpr (kIsHalf<T>) return __log2f(x) * 0.693147181f;
#endif
  return log(x);
}

// grad_output of elements i to i + K - 1. kOne: all elements have the same.
template <bool kOne, int K, class T>
__device__ __forceinline__ void load_grad_output(const KlDivParams<T>& params, int64_t i, Compute<T> (&g)[K]) {
  if constexpr (kOne) {
    const Compute<T> one = load_gradient<T>(params.grad_output, params.unconverted_grad_output, 0);
#pragma unroll
    for (int k = 0; k < K; k++) g[k] = one;
  } else if (params.unconverted_grad_output) {
    T given[K];
    load_numbers<K>(params.unconverted_grad_output + i, given);
#pragma unroll
    for (int k = 0; k < K; k++) g[k] = to_compute(given[k]);
  } else {
    load_numbers<K>(params.grad_output + i, g);
  }
#pragma unroll
  for (int k = 0; k < K; k++) g[k] *= params.factor;
}

template <class T, bool kLogTarget, int K>
__device__ __forceinline__ void values_of(const Elements<T, K>& input, const Elements<T, K>& target,
                                          Compute<T> (&values)[K]) {
  using C = Compute<T>;
  C x[K], t[K];
  input.unpack(x);
  target.unpack(t);
#pragma unroll
  for (int k = 0; k < K; k++) {
    values[k] =
        kLogTarget ? any_exp_of<T>(t[k]) * (t[k] - x[k]) : (t[k] == 0 ? C(0) : t[k] * log_of<T>(t[k])) - t[k] * x[k];
  }
}

// A thread's packs of input and target: `first`, first + kThreads, ...; zeros, which add nothing to a sum, from `end`
// on.
template <class T, int K>
struct Loaded {
  Elements<T, K> input[kLoadsInFlight], target[kLoadsInFlight];

  __device__ __forceinline__ Loaded(const T* inputs, const T* targets, int64_t first, int64_t end) {
    const auto load = [&](const T* x, Elements<T, K>(&loaded)[kLoadsInFlight]) {
#pragma unroll
      for (int i = 0; i < kLoadsInFlight; i++) {
        const int64_t p = first + i * kThreads;
        loaded[i] = x && p < end ? Elements<T, K>::load(x + p * K) : Elements<T, K>::filled(T{});
      }
    };
    load(targets, target);
    load(inputs, input);
  }
};

template <class T, int K>
using Packs = RowPacks<T, K, K == 1, int64_t>;

constexpr int64_t kBlockPacks = kThreads * kLoadsInFlight;

template <class T, int K, bool kLogTarget, bool kSum>
__global__ void __launch_bounds__(kThreads, kResidentBlocks<T>)
    kl_div_values(const __grid_constant__ KlDivParams<T> params, Compute<T>* sums) {
  using C = Compute<T>;
  CHARLM_SHARED(C, shared, kMaxWarps);
  const Packs<T, K> packs(params.target, params.n);
  C sum = 0;
  const auto use = [&]<int kCount>(const Elements<T, kCount>& input, const Elements<T, kCount>& target, int64_t i,
                                   bool exists) {
    C values[kCount];
    values_of<T, kLogTarget>(input, target, values);
    if constexpr (kSum) {
#pragma unroll
      for (int k = 0; k < kCount; k++) sum += values[k];
    } else if (exists) {
      store_elements<kCount>(params.output + i, values);
    }
  };
  for (int64_t first = blockIdx.x * kBlockPacks + threadIdx.x; first < packs.n_packs;
       first += gridDim.x * kBlockPacks) {
    const Loaded<T, K> x(params.input + packs.head, params.target + packs.head, first, packs.n_packs);
#pragma unroll
    for (int i = 0; i < kLoadsInFlight; i++) {
      const int64_t p = first + i * kThreads;
      use(x.input[i], x.target[i], packs.pack(p), p < packs.n_packs);
    }
  }
  if (blockIdx.x == 0 && threadIdx.x < packs.n_singles) {
    const int64_t i = packs.single(threadIdx.x);
    use(Elements<T, 1>::load(params.input + i), Elements<T, 1>::load(params.target + i), i, true);
  }
  if constexpr (kSum) {
    sum = sum_over_block(sum, shared);
    if (threadIdx.x == 0) sums[blockIdx.x] = sum;
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads) kl_div_total(const Compute<T>* sums, int n_sums, double divisor, T* total) {
  CHARLM_SHARED(double, shared, kMaxWarps);
  double sum = 0;
  for (int i = threadIdx.x; i < n_sums; i += kThreads) sum += sums[i];
  sum = sum_over_block(sum, shared);
  if (threadIdx.x == 0) *total = from_compute<T>(static_cast<Compute<T>>(sum / divisor));
}

template <bool kLogTarget, class T, int K>
__device__ __forceinline__ void write_gradients(const KlDivParams<T>& params, const Elements<T, K>& input,
                                                const Elements<T, K>& target, const Compute<T> (&g)[K], int64_t i) {
  using C = Compute<T>;
  C t[K], gradient[K], probability[K];
  target.unpack(t);
#pragma unroll
  for (int k = 0; k < K; k++) probability[k] = kLogTarget ? any_exp_of<T>(t[k]) : t[k];
  if (params.grad_input) {
#pragma unroll
    for (int k = 0; k < K; k++) gradient[k] = -probability[k] * g[k];
    store_elements<K>(params.grad_input + i, gradient);
  }
  if (params.grad_target) {
    C x[K];
    input.unpack(x);
#pragma unroll
    for (int k = 0; k < K; k++) {
      if constexpr (kLogTarget) {
        gradient[k] = (probability[k] * (t[k] - x[k]) + probability[k]) * g[k];
      } else {
        const C ratio = t[k] != 0 && t[k] - t[k] == 0 ? C(1) : C(NAN);  // t / t, as in torch
        gradient[k] = ((log_of<T>(t[k]) - x[k]) + ratio) * g[k];
      }
    }
    store_elements<K>(params.grad_target + i, gradient);
  }
}

template <class T, int K, bool kLogTarget, bool kOne>
__global__ void __launch_bounds__(kThreads, kOne ? kResidentBlocks<T> : 2)
    kl_div_gradients(const __grid_constant__ KlDivParams<T> params) {
  const Packs<T, K> packs(params.target, params.n);
  const int64_t first = blockIdx.x * kBlockPacks + threadIdx.x;
  const T* const input = params.grad_target ? params.input : nullptr;  // which that of input does not need
  const Loaded<T, K> x(input ? input + packs.head : nullptr, params.target + packs.head, first, packs.n_packs);
  Compute<T> g[kLoadsInFlight][K];
#pragma unroll
  for (int i = 0; i < kLoadsInFlight; i++) {
    const int64_t p = first + i * kThreads;
    if (p < packs.n_packs) load_grad_output<kOne>(params, packs.pack(p), g[i]);
  }
#pragma unroll
  for (int i = 0; i < kLoadsInFlight; i++) {
    const int64_t p = first + i * kThreads;
    if (p >= packs.n_packs) break;
    write_gradients<kLogTarget>(params, x.input[i], x.target[i], g[i], packs.pack(p));
  }
  if (blockIdx.x > 0 || threadIdx.x >= packs.n_singles) return;
  const int64_t i = packs.single(threadIdx.x);
  Compute<T> single[1];
  load_grad_output<kOne>(params, i, single);
  write_gradients<kLogTarget>(params, Elements<T, 1>::load(params.input + i), Elements<T, 1>::load(params.target + i),
                              single, i);
}

// Whether all tensors are aligned from the same element on.
template <class T>
bool have_packs(const KlDivParams<T>& params) {
  const int head = elements_to_alignment(params.target);
  const auto is_aligned = [&](const auto* p) { return !p || reinterpret_cast<uintptr_t>(p + head) % kPackBytes == 0; };
  return is_aligned(params.input) && is_aligned(params.output) && is_aligned(params.grad_input) &&
         is_aligned(params.grad_target) &&
         (params.grad_stride == 0 || (is_aligned(params.grad_output) && is_aligned(params.unconverted_grad_output)));
}

template <int K>
int kl_div_blocks(int64_t n, int most = INT32_MAX) {
  return blocks_for(ceil_div(n, K * kBlockPacks), most);
}

// Calls use<K, kLogTarget>().
template <class T, class Use>
int with_packs(const KlDivParams<T>& params, Use use) {
  if (have_packs(params)) {
    constexpr int K = kPackSize<T>;
    return params.log_target ? use.template operator()<K, true>() : use.template operator()<K, false>();
  }
  return params.log_target ? use.template operator()<1, true>() : use.template operator()<1, false>();
}

template <class T>
int kl_div_forward(const KlDivParams<T>& params, Launch& launch) {
  auto* const sums = static_cast<Compute<T>*>(launch.workspace);
  return with_packs(params, [&]<int K, bool kLogTarget>() -> int {
    if (params.output) {
      return launch_kernel(kl_div_values<T, K, kLogTarget, false>, kl_div_blocks<K>(params.n), kThreads, 0,
                           launch.stream, params, sums);
    }
    const int blocks = kl_div_blocks<K>(params.n, kKlDivWorkspace);
    const int error =
        launch_kernel(kl_div_values<T, K, kLogTarget, true>, blocks, kThreads, 0, launch.stream, params, sums);
    if (error != 0) return error;
    return launch_kernel(kl_div_total<T>, 1, kThreads, 0, launch.stream, sums, blocks, params.divisor, params.total);
  });
}

template <class T>
int kl_div_backward(const KlDivParams<T>& params, Launch& launch) {
  return with_packs(params, [&]<int K, bool kLogTarget>() -> int {
    const auto kernel =
        params.grad_stride == 0 ? kl_div_gradients<T, K, kLogTarget, true> : kl_div_gradients<T, K, kLogTarget, false>;
    return launch_kernel(kernel, kl_div_blocks<K>(params.n), kThreads, 0, launch.stream, params);
  });
}

CHARLM_REGISTER_KERNELS(kl_div, {&kl_div_forward<T>, &kl_div_backward<T>});

}  // namespace
}  // namespace charlm::cuda
