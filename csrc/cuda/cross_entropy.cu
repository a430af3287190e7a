// cross_entropy on a GPU: the choice of kernel, grid and block for each function of ops/cross_entropy.h.
//
//   V <= 256, and up to 512 or 2048            a warp works on whole rows (cross_entropy_small.cuh)
//   loss and gradient                          rows in registers (cross_entropy_registers.cuh), or in shared memory
//                                              where that file has no kernel (cross_entropy_block.cuh)
//   losses, gradients from a stored softmax    one pass (cross_entropy_streams.cuh)
//   backward of a gradient that forward made   one launch of few blocks, which end at once if grad_loss is 1
#include "cuda/cross_entropy_block.cuh"
#include "cuda/cross_entropy_registers.cuh"
#include "cuda/cross_entropy_small.cuh"
#include "cuda/cross_entropy_streams.cuh"

namespace charlm::cuda {
namespace {

// ------------------------------------------------------------------------------------------------------- metrics
// The log-sum-exp, the entropy and the argmax of each row.

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

// ------------------------------------------------------------------------------------------------------ launches

// Few long rows are shared by more blocks than their length asks for, until about one for each multiprocessor.
constexpr int64_t kFewBlocks = 128;
constexpr int64_t kChunksBelowRows = 256;  // without clusters
constexpr int64_t kChunksAboveClasses = 16384;

inline bool has_few_rows(int64_t n_rows, int64_t n_classes) {
  return n_rows < kChunksBelowRows && n_classes > kChunksAboveClasses;
}

// log2 of the blocks that share each of few rows.
inline int log2_cluster_of(int64_t n_rows, int log2_least, bool has_clusters) {
  int log2 = log2_least;
  while (has_clusters && n_rows > 0 && 1 << log2 < kMaxCluster && n_rows << (log2 + 1) <= kFewBlocks) log2++;
  return log2;
}

// Blocks of a launch whose clusters each take `n_rows_at_once` of n_rows at a time.
inline int cluster_blocks(int64_t n_rows, int n_rows_at_once, int log2_cluster) {
  return blocks_for(ceil_div(n_rows, n_rows_at_once), kMaxBlocks >> log2_cluster) << log2_cluster;
}

// Launches the kernels of one call in order, until a launch fails.
template <class T>
class Launcher {
 public:
  Launcher(const CrossEntropyParams<T>& params, const Launch& launch)
      : params_(params), launch_(launch), has_clusters_(launch.compute_capability >= kSm90) {
    if (params.mean) reduction_.known_divisor = divisor(params, {static_cast<double>(params.n_rows), params.n_rows});
    reduction_.totals = static_cast<Totals*>(launch.workspace);
    reduction_.losses = reinterpret_cast<double*>(reduction_.totals + kMaxTotals);
    reduction_.n_finished = reinterpret_cast<unsigned*>(reduction_.losses + kMaxBlocks);
  }

  static int64_t workspace_bytes(int64_t n_rows, int64_t n_classes) {
    const int64_t chunks = has_few_rows(n_rows, n_classes) ? n_rows * chunks_of<T>(n_classes) : 0;
    return kMaxTotals * sizeof(Totals) + kMaxBlocks * sizeof(double) + kTicketBytes + chunks * sizeof(Softmax<T, true>);
  }

  template <CrossEntropyPass kPass>
  int losses() {
    constexpr bool kWithGradient = kPass == CrossEntropyPass::kForwardBackward;
    prepare((kWithGradient && needs_totals(params_)) || params_.reduced_loss);
    const Terms terms = terms_of(params_);
    if (small(kPass)) return error_;
    if constexpr (kWithGradient) {
      switch (terms) {
        case Terms::kPlain:
          return forward_backward<Terms::kPlain>();
        case Terms::kUniform:
          return forward_backward<Terms::kUniform>();
        case Terms::kAll:
          return forward_backward<Terms::kAll>();
      }
    } else {
      switch (terms) {
        case Terms::kPlain:
          return forward<Terms::kPlain>();
        case Terms::kUniform:
          return forward<Terms::kUniform>();
        case Terms::kAll:
          return forward<Terms::kAll>();
      }
    }
    return error_;
  }

  template <CrossEntropyPass kPass>
  int gradient() {
    constexpr bool kIsBackward = kPass == CrossEntropyPass::kBackward;
    const bool is_precomputed = kIsBackward && params_.grad_is_precomputed;
    if (!is_precomputed) prepare(needs_totals(params_));
    const Terms terms = terms_of(params_);
    if (!is_precomputed && small(kPass)) return error_;
    if constexpr (kIsBackward) {
      if (terms == Terms::kPlain) stream<kPass, Terms::kPlain>();
      if (terms == Terms::kUniform) stream<kPass, Terms::kUniform>();
      if (terms == Terms::kAll) stream<kPass, Terms::kAll>();
    } else {
      stream<kPass, Terms::kAll>();
    }
    return error_;
  }

 private:
  static constexpr int64_t kTicketBytes = 16;

  template <class Kernel, class... Arguments>
  void next(const LaunchOptions& options, Kernel kernel, int blocks, int threads, int64_t shared_bytes,
            const Arguments&... arguments) {
    if (error_ == cudaSuccess)
      error_ = launch_kernel(options, kernel, blocks, threads, shared_bytes, launch_.stream, arguments...);
  }

  // Launches a kernel that calls divisor() or reduce_losses(). Only the first one after prepare() can be dependent.
  template <class Kernel, class... Arguments>
  void next_with_reduction(int log2_cluster, Kernel kernel, int blocks, int threads, int64_t shared_bytes,
                           const Arguments&... arguments) {
    next({1 << log2_cluster, reduction_.is_dependent}, kernel, blocks, threads, shared_bytes, arguments..., reduction_);
    reduction_.is_dependent = false;
  }

  // The first of two kernels, if the second needs it.
  void prepare(bool is_needed) {
    if (!is_needed) return;
    reduction_.is_dependent = has_clusters_;
    if (needs_totals(params_)) {
      reduction_.n_totals = blocks_for(ceil_div(params_.n_rows, kTargetsInFlight * kTotalsThreads), kMaxTotals);
    }
    next({}, cross_entropy_prepare<T>, reduction_.n_totals > 0 ? reduction_.n_totals : 1, kTotalsThreads, 0, params_,
         reduction_);
  }

  // Whether there is a kernel of whole rows for a warp.
  bool small(CrossEntropyPass pass) {
    const SmallPlan<T> plan = small_plan(params_, pass, launch_.compute_capability);
    if (!plan.kernel) return false;
    next_with_reduction(0, plan.kernel, plan.blocks, kSmallThreads, plan.shared_bytes, params_, plan.layout);
    return true;
  }

  // ------------------------------------------------------------------------------------------------------ losses

  template <Terms kTerms>
  int forward() {
    const int64_t n_packs = params_.n_classes / kPackSize<T>;
    if (n_packs <= kWarp * 8) {
      next_with_reduction(0, cross_entropy_forward<T, kTerms, kWarp>,
                          cluster_blocks(params_.n_rows, kStreamThreads / kWarp, 0), kStreamThreads, 0, params_, 0);
    } else if (has_few_rows(params_.n_rows, params_.n_classes) && !has_clusters_) {
      chunks<kTerms == Terms::kPlain>();
    } else {
      const bool is_long = n_packs >= kStreamThreads * kStreamPacks * 2;
      const int log2_cluster = log2_cluster_of(params_.n_rows, 0, has_clusters_ && is_long);
      next_with_reduction(log2_cluster, cross_entropy_forward<T, kTerms, kStreamThreads>,
                          cluster_blocks(params_.n_rows, 1, log2_cluster), kStreamThreads, 0, params_, log2_cluster);
    }
    return error_;
  }

  template <bool kPlain>
  void chunks() {
    using RowSoftmax = Softmax<T, !kPlain>;
    reduction_.is_dependent = false;  // these kernels do not wait: they are launched in order
    auto* const softmaxes =
        reinterpret_cast<RowSoftmax*>(reinterpret_cast<char*>(reduction_.n_finished) + kTicketBytes);
    next({}, cross_entropy_chunk_softmax<T, kPlain>, chunk_blocks(params_), kChunkThreads, 0, params_, softmaxes);
    next_with_reduction(0, cross_entropy_join_chunks<T, kPlain>, block_blocks(params_), kWarp, 0, params_, softmaxes);
  }

  // ------------------------------------------------------------------------------------------- loss and gradient

  template <Terms kTerms>
  int forward_backward() {
    if constexpr (sizeof(T) < sizeof(double)) {
      if (registers<kTerms>()) return error_;
    }
    if (has_few_rows(params_.n_rows, params_.n_classes)) {
      forward<kTerms>();
      stream<CrossEntropyPass::kBackward, kTerms>();
      return error_;
    }
    constexpr bool kPlain = kTerms == Terms::kPlain;
    using RowSoftmax = Softmax<T, !kPlain>;
    constexpr int64_t kOtherShared = kMaxWarps * (sizeof(RowSoftmax) + sizeof(double)) + 64;
    const int64_t n_packs = ceil_div(params_.n_classes, kPackSize<T>);
    const int64_t max_kept = (launch_.max_shared_bytes - kOtherShared) / kPackBytes,
                  n_kept = n_packs < max_kept ? n_packs : max_kept;
    next_with_reduction(0, cross_entropy_block<T, kPlain>, block_blocks(params_),
                        pass_threads<T>(params_.n_classes, kBlockThreads), n_kept * kPackBytes, params_, n_kept);
    return error_;
  }

  template <Terms kTerms, int kThreads, int kPacks>
  bool registers_of(int log2_cluster) {
    using Shape = RegisterShape<T, kTerms, kThreads, kPacks>;
    const int blocks = kPacks == 2 ? blocks_for(ceil_div(params_.n_rows, Shape::kRows),
                                                kSmallMultiprocessors * Shape::kResidentBlocks * kSmallWaves)
                                   : cluster_blocks(params_.n_rows, Shape::kRows, log2_cluster);
    next_with_reduction(log2_cluster, cross_entropy_registers<T, kTerms, kThreads, kPacks>, blocks,
                        Shape::kBlockThreads, 0, params_, log2_cluster);
    return true;
  }

  // The kernel whose threads can hold a row, if there is one. Shares of a copy that these shapes reached in prototypes
  // on an H200, bf16: 8192 classes 128 x 8 96 %; 32000 256 x 8 x 2 blocks 97 %; 65536 256 x 8 x 4 and 128256 256 x 8 x
  // 8 92 % (with cache hints, which cost 6 %). More packs for a thread spill; fewer load too little at a time.
  template <Terms kTerms>
  bool registers() {
    const int64_t n_packs = params_.n_classes / kPackSize<T>;
    // The least log2 of blocks of `packs` packs that hold the row.
    const auto log2_blocks = [&](int64_t packs) {
      int log2 = 0;
      while (packs << log2 < n_packs) log2++;
      return log2;
    };
    const int most = has_clusters_ ? kMaxCluster : 1;
    const auto cluster = [&](int log2_least) { return log2_cluster_of(params_.n_rows, log2_least, has_clusters_); };
    if constexpr (kTerms == Terms::kAll) {
      if (n_packs <= kWarp * 2) return registers_of<kTerms, kWarp, 2>(0);
    }
    if (n_packs <= kWarp * 4) return registers_of<kTerms, kWarp, 4>(0);
    if constexpr (kTerms == Terms::kAll) {
      if (n_packs <= 128 * 4) return registers_of<kTerms, 128, 4>(0);
      const int log2 = log2_blocks(256 * 4);
      if (1 << log2 <= most) return registers_of<kTerms, 256, 4>(cluster(log2));
      const int log2_of_512 = log2_blocks(512 * 4);
      return 1 << log2_of_512 <= most && registers_of<kTerms, 512, 4>(cluster(log2_of_512));
    } else {
      if (n_packs <= 64 * 8) return registers_of<kTerms, 64, 8>(0);
      if (n_packs <= 128 * 8) return registers_of<kTerms, 128, 8>(0);
      const int log2 = log2_blocks(256 * 8);
      if (1 << log2 <= most) return registers_of<kTerms, 256, 8>(cluster(log2));
      const int log2_of_512 = log2_blocks(512 * 8);
      if (1 << log2_of_512 <= most) return registers_of<kTerms, 512, 8>(cluster(log2_of_512));
      if constexpr (kTerms == Terms::kPlain) {  // without clusters
        if (n_packs <= 1024 * 8) return registers_of<kTerms, 1024, 8>(0);
      }
      return false;
    }
  }

  // ---------------------------------------------------------------------------------------------------- gradient

  template <CrossEntropyPass kPass, Terms kTerms>
  void stream() {
    const bool is_rescale = kPass == CrossEntropyPass::kBackward && params_.grad_is_precomputed;
    const int threads = is_rescale ? kRescaleThreads : kStreamThreads;
    next_with_reduction(0, cross_entropy_gradient<T, kPass, kTerms>,
                        blocks_for(ceil_div(params_.n_rows * items_of<T>(params_.n_classes), threads / kWarp),
                                   is_rescale ? kRescaleBlocks : kMaxBlocks),
                        threads, 0, params_);
  }

  const CrossEntropyParams<T>& params_;
  const Launch& launch_;
  const bool has_clusters_;
  Reduction reduction_;
  cudaError_t error_ = cudaSuccess;
};

template <class T>
int64_t cross_entropy_workspace(int64_t n_rows, int64_t n_classes) {
  return Launcher<T>::workspace_bytes(n_rows, n_classes);
}

template <class T, CrossEntropyPass kPass>
int cross_entropy_losses(const CrossEntropyParams<T>& params, Launch& launch) {
  return Launcher<T>(params, launch).template losses<kPass>();
}

template <class T>
int cross_entropy_backward(const CrossEntropyParams<T>& params, Launch& launch) {
  if (params.grad_lse || params.grad_entropy) {
    return Launcher<T>(params, launch).template gradient<CrossEntropyPass::kBackwardWithMetrics>();
  }
  return Launcher<T>(params, launch).template gradient<CrossEntropyPass::kBackward>();
}

template <class T>
int cross_entropy_target_backward(const CrossEntropyParams<T>& params, Launch& launch) {
  return Launcher<T>(params, launch).template gradient<CrossEntropyPass::kTargetBackward>();
}

template <class T>
int cross_entropy_metrics(const CrossEntropyParams<T>& params, Launch& launch) {
  return launch_kernel(cross_entropy_metrics_kernel<T>, block_blocks(params),
                       pass_threads<T>(params.n_classes, kMaxThreads), 0, launch.stream, params);
}

template <class T>
int scale_gradient(const ScaleParams<T>& given, Launch& launch) {
  ScaleParams<T> params = given;
  if (params.stride == params.n_columns && params.n_rows > 0) {  // as one row
    params.n_columns *= params.n_rows;
    params.n_rows = 1;
  }
  return launch_kernel(cross_entropy_scale_gradient<T>, kRescaleBlocks, kRescaleThreads, 0, launch.stream, params);
}

CHARLM_REGISTER_KERNELS(cross_entropy, {&cross_entropy_losses<T, CrossEntropyPass::kForward>,
                                        &cross_entropy_losses<T, CrossEntropyPass::kForwardBackward>,
                                        &cross_entropy_backward<T>, &cross_entropy_target_backward<T>,
                                        &cross_entropy_metrics<T>, &scale_gradient<T>, &cross_entropy_workspace<T>});

}  // namespace
}  // namespace charlm::cuda
