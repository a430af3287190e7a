// cross_entropy on a GPU: the choice of kernel, grid and block for each function of ops/cross_entropy.h.
//
//   V <= 256                                          chunks of whole rows (cross_entropy_small.cuh)
//   forward, fewer than 256 rows of > 16384 classes   several blocks for each row (cross_entropy_block.cuh)
//   forward otherwise                                 one block for each row (cross_entropy_block.cuh)
//   a gradient from a stored softmax                  several blocks for each row
#include "cuda/cross_entropy_block.cuh"
#include "cuda/cross_entropy_small.cuh"

namespace charlm::cuda {
namespace {

// ------------------------------------------------------------------------------------------------------- metrics
// The log-sum-exp, the entropy and the argmax of each row, and the rescaling of a gradient in place.

// The largest logit and the first class that has it. NaN counts as larger than any number.
template <class C>
struct Largest {
  C value = -INFINITY;
  int64_t c = INT64_MAX;

  __device__ __forceinline__ static Largest join(Largest a, Largest b) {
    const bool a_nan = a.value != a.value, b_nan = b.value != b.value;
    const bool same = a.value == b.value || (a_nan && b_nan);
    const bool take_b = same ? b.c < a.c : b_nan || (!a_nan && b.value > a.value);
    return take_b ? b : a;
  }
};

// One block for each row, which is read twice: for the maximum, then for the sums relative to it.
template <class T>
__global__ void __launch_bounds__(kMaxThreads, 1)
    cross_entropy_metrics_kernel(const __grid_constant__ CrossEntropyParams<T> params) {
  using C = Compute<T>;
  CHARLM_SHARED(Largest<C>, parts, kMaxWarps);
  CHARLM_SHARED(C, sums, kMaxWarps);
  CHARLM_SHARED(C, spreads, kMaxWarps);
  for (int64_t n = blockIdx.x; n < params.n_rows; n += gridDim.x) {
    const CrossEntropyRow<T, false> row(params, n);
    const T* const x = row.logits();
    Largest<C> largest;
    for (int64_t c = threadIdx.x; c < params.n_classes; c += blockDim.x) {
      largest = Largest<C>::join(largest, {row.transformed(x[c]), c});
    }
    __syncthreads();  // the parts of the previous row have been read
    largest = join_over_block(largest, parts, Largest<C>{}, &Largest<C>::join, [](const Largest<C>& a, int step) {
      return Largest<C>{shuffle_down(a.value, step), shuffle_down(a.c, step)};
    });
    const C m = largest.value;
    C sum = 0, spread = 0;
    for (int64_t c = threadIdx.x; c < params.n_classes; c += blockDim.x) {
      const C z = row.transformed(x[c]), e = exp_of<C>(z - m);
      sum += e;
      if (e != 0) spread += e * (m - z);  // a class of probability 0 adds nothing, even if z = -inf
    }
    sum = sum_over_block(sum, sums);
    spread = sum_over_block(spread, spreads);
    if (threadIdx.x != 0) continue;
    const C log_sum = log(sum);
    params.lse[n] = m == INFINITY || m == -INFINITY ? m : m + log_sum;
    params.entropy[n] = log_sum + spread / sum;
    params.predicted_tokens[n] = largest.c;
    if (params.row_max && row.is_ignored()) {
      params.row_max[n] = m;
      params.row_sum[n] = sum;
    }
  }
}

template <class T>
__global__ void __launch_bounds__(kMaxThreads)
    cross_entropy_scale_grad_kernel(T* grad, int64_t n_rows, int64_t n_classes, int64_t stride,
                                    const Compute<T>* factor) {
  const Compute<T> by = *factor;
  if (by == 1) return;
  for (int64_t n = blockIdx.x; n < n_rows; n += gridDim.x) {
    T* const y = grad + n * stride;
    const Span<T> span(y, y, n_classes);
    const auto scaled = [&](T value) { return from_compute<T>(to_compute(value) * by); };
    span.for_each_single([&](int64_t i) { y[i] = scaled(y[i]); });
    span.template for_each_pack<kLoadsInFlight>([&](int64_t p) { return load_pack(y + span.pack(p)); },
                                                [&](int64_t p, Pack<T> pack) {
#pragma unroll
                                                  for (T& value : pack.values) value = scaled(value);
                                                  store_pack(y + span.pack(p), pack);
                                                });
  }
}

// ------------------------------------------------------------------------------------------------------ launches

// Fewer rows than this, with more classes than this, get several blocks each.
constexpr int64_t kChunksBelowRows = 256;  // twice the multiprocessors of a large GPU
constexpr int64_t kChunksAboveClasses = 16384;

inline bool is_small(int64_t n_classes) { return n_classes <= kSmallMaxClasses; }

inline bool uses_chunks(int64_t n_rows, int64_t n_classes) {
  return n_rows < kChunksBelowRows && n_classes > kChunksAboveClasses;
}

// Launches the kernels of one call in order, until a launch fails.
template <class T, bool kPlain>
class Launcher {
 public:
  Launcher(const CrossEntropyParams<T>& params, const Launch& launch)
      : params_(params),
        launch_(launch),
        totals_(static_cast<Totals*>(launch.workspace)),
        losses_(reinterpret_cast<double*>(totals_ + kMaxTotals)),
        softmaxes_(reinterpret_cast<RowSoftmax*>(losses_ + kMaxBlocks)) {}

  static int64_t workspace_bytes(int64_t n_rows, int64_t n_classes) {
    const int64_t chunks = uses_chunks(n_rows, n_classes) ? n_rows * chunks_of<T>(n_classes) : 0;
    return kMaxTotals * sizeof(Totals) + kMaxBlocks * sizeof(double) + chunks * sizeof(RowSoftmax);
  }

  template <CrossEntropyPass kPass>
  int losses() {
    launch_totals();
    int n_losses = block_blocks(params_);
    if (is_small(params_.n_classes)) {
      n_losses = launch_small(kPass);
    } else if (!uses_chunks(params_.n_rows, params_.n_classes)) {
      constexpr int64_t kOtherShared = kMaxWarps * sizeof(RowSoftmax);
      const int64_t n_packs =
          kPass == CrossEntropyPass::kForward ? 0 : (params_.n_classes + kPackSize<T> - 1) / kPackSize<T>;
      const int64_t max_kept = (launch_.max_shared_bytes - kOtherShared) / kPackBytes,
                    n_kept = n_packs < max_kept ? n_packs : max_kept;
      next(cross_entropy_block<T, kPass, kPlain>, n_losses,
           pass_threads<T>(params_.n_classes, kBlockThreads<T, kPlain>), n_kept * kPackBytes, params_, n_kept, totals_,
           n_totals_, losses_);
    } else {
      next(cross_entropy_chunk_softmax<T, kPlain>, chunk_blocks(params_), kChunkThreads, 0, params_, softmaxes_);
      next(cross_entropy_join_chunks<T, kPlain>, n_losses, kWarp, 0, params_, softmaxes_, losses_);
      if constexpr (kPass == CrossEntropyPass::kForwardBackward) launch_chunk_gradient<CrossEntropyPass::kBackward>();
    }
    if (params_.reduced_loss) {
      next(cross_entropy_reduce<T>, 1, kMaxThreads, 0, params_, totals_, n_totals_, losses_, n_losses);
    }
    return error_;
  }

  template <CrossEntropyPass kPass>
  int gradient() {
    launch_totals();
    if (is_small(params_.n_classes)) {
      launch_small(kPass);
    } else {
      launch_chunk_gradient<kPass>();
    }
    return error_;
  }

 private:
  using RowSoftmax = Softmax<T, !kPlain>;

  template <class Kernel, class... Arguments>
  void next(Kernel kernel, int blocks, int threads, int64_t shared_bytes, const Arguments&... arguments) {
    if (error_ == cudaSuccess)
      error_ = launch_kernel(kernel, blocks, threads, shared_bytes, launch_.stream, arguments...);
  }

  void launch_totals() {
    if (!needs_totals(params_)) return;
    n_totals_ = blocks_for(ceil_div(params_.n_rows, kTargetsInFlight * kTotalsThreads), kMaxTotals);
    next(cross_entropy_totals<T>, n_totals_, kTotalsThreads, 0, params_, totals_);
  }

  // Returns the number of blocks.
  int launch_small(CrossEntropyPass pass) {
    const SmallPlan<T> plan = small_plan(params_, pass, launch_.compute_capability);
    next(plan.kernel, plan.blocks, kSmallThreads, plan.shared_bytes, params_, plan.layout, totals_, n_totals_, losses_);
    return plan.blocks;
  }

  template <CrossEntropyPass kPass>
  void launch_chunk_gradient() {
    next(cross_entropy_chunk_gradient<T, kPass, kPlain>, chunk_blocks(params_),
         pass_threads<T>(params_.n_classes, kChunkThreads), 0, params_, totals_, n_totals_);
  }

  const CrossEntropyParams<T>& params_;
  const Launch& launch_;
  Totals* const totals_;  // [kMaxTotals]
  double* const losses_;  // [kMaxBlocks]
  RowSoftmax* const softmaxes_;
  int n_totals_ = 0;
  cudaError_t error_ = cudaSuccess;
};

template <class T>
int64_t cross_entropy_workspace(int64_t n_rows, int64_t n_classes) {
  return Launcher<T, false>::workspace_bytes(n_rows, n_classes);
}

template <class T, CrossEntropyPass kPass>
int cross_entropy_losses(const CrossEntropyParams<T>& params, Launch& launch) {
  return is_plain(params) ? Launcher<T, true>(params, launch).template losses<kPass>()
                          : Launcher<T, false>(params, launch).template losses<kPass>();
}

template <class T>
int cross_entropy_backward(const CrossEntropyParams<T>& params, Launch& launch) {
  if (params.grad_lse || params.grad_entropy) {
    return Launcher<T, false>(params, launch).template gradient<CrossEntropyPass::kBackwardWithMetrics>();
  }
  return is_plain(params) ? Launcher<T, true>(params, launch).template gradient<CrossEntropyPass::kBackward>()
                          : Launcher<T, false>(params, launch).template gradient<CrossEntropyPass::kBackward>();
}

template <class T>
int cross_entropy_target_backward(const CrossEntropyParams<T>& params, Launch& launch) {
  return Launcher<T, false>(params, launch).template gradient<CrossEntropyPass::kTargetBackward>();
}

template <class T>
int cross_entropy_metrics(const CrossEntropyParams<T>& params, Launch& launch) {
  return launch_kernel(cross_entropy_metrics_kernel<T>, block_blocks(params),
                       pass_threads<T>(params.n_classes, kMaxThreads), 0, launch.stream, params);
}

template <class T>
int scale_gradient(const ScaleParams<T>& params, Launch& launch) {
  return launch_kernel(cross_entropy_scale_grad_kernel<T>, blocks_for(params.n_rows),
                       pass_threads<T>(params.n_columns, kMaxThreads), 0, launch.stream, params.grad, params.n_rows,
                       params.n_columns, params.stride, params.factor);
}

CHARLM_REGISTER_KERNELS(cross_entropy, {&cross_entropy_losses<T, CrossEntropyPass::kForward>,
                                        &cross_entropy_losses<T, CrossEntropyPass::kForwardBackward>,
                                        &cross_entropy_backward<T>, &cross_entropy_target_backward<T>,
                                        &cross_entropy_metrics<T>, &scale_gradient<T>, &cross_entropy_workspace<T>});

}  // namespace
}  // namespace charlm::cuda
