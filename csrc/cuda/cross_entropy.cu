// cross_entropy on a GPU: the choice of kernel, grid and block for each function of ops/cross_entropy.h:
//
//   V <= 256                                   tiles of whole rows (cross_entropy_tile.cuh)
//   else, forward, fewer than 256 rows of
//   more than 16384 classes                    several blocks for each row (cross_entropy_chunks.cuh)
//   else, forward                              a block for each row (cross_entropy_block.cuh)
//   else, a gradient from a stored softmax     several blocks for each row
#include "cuda/cross_entropy_block.cuh"
#include "cuda/cross_entropy_chunks.cuh"
#include "cuda/cross_entropy_tile.cuh"

namespace charlm::cuda {
namespace {

// ------------------------------------------------------------------------------------------------------- metrics
// The log-sum-exp, the entropy and the arg max of each row, and the scaling of a gradient in place.

// The largest logit and the first class that has it; a NaN is larger than any number.
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

// A block for each row, which is read twice: for the maximum, then for the sums relative to it.
template <class T>
__global__ void __launch_bounds__(kMaxThreads)
    cross_entropy_metrics_kernel(const __grid_constant__ CrossEntropyParams<T> rows) {
  using C = Compute<T>;
  CHARLM_SHARED(Largest<C>, parts, kMaxWarps);
  CHARLM_SHARED(C, sums, kMaxWarps);
  CHARLM_SHARED(C, spreads, kMaxWarps);
  for (int64_t n = blockIdx.x; n < rows.n_rows; n += gridDim.x) {
    const CrossEntropyRow<T, false> row(rows, n);
    const T* const x = row.logits();
    Largest<C> largest;
    for (int64_t c = threadIdx.x; c < rows.n_classes; c += blockDim.x) {
      largest = Largest<C>::join(largest, {row.transformed(x[c]), c});
    }
    __syncthreads();  // the parts of the row before have been read
    largest = join_over_block(largest, parts, Largest<C>{}, &Largest<C>::join, [](const Largest<C>& a, int step) {
      return Largest<C>{shuffle_down(a.value, step), shuffle_down(a.c, step)};
    });
    const C m = largest.value;
    C sum = 0, spread = 0;
    for (int64_t c = threadIdx.x; c < rows.n_classes; c += blockDim.x) {
      const C z = row.transformed(x[c]), e = exp_of<C>(z - m);
      sum += e;
      if (e != 0) spread += e * (m - z);  // a class of probability 0 adds nothing, even where z = -inf
    }
    sum = sum_over_block(sum, sums);
    spread = sum_over_block(spread, spreads);
    if (threadIdx.x != 0) continue;
    const C log_sum = log(sum);
    rows.lse[n] = m == INFINITY || m == -INFINITY ? m : m + log_sum;
    rows.entropy[n] = log_sum + spread / sum;
    rows.predicted_tokens[n] = largest.c;
    if (rows.row_max && row.is_ignored()) {
      rows.row_max[n] = m;
      rows.row_sum[n] = sum;
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

constexpr int64_t kFewRows = 256;  // twice the multiprocessors of a large GPU
constexpr int64_t kLongRow = 16384;

inline bool uses_tiles(int64_t n_classes) { return n_classes <= kTileMaxClasses; }

inline bool uses_chunks(int64_t n_rows, int64_t n_classes) { return n_rows < kFewRows && n_classes > kLongRow; }

// The kernels of one call, launched one after the other until one fails.
template <class T, bool kPlain>
class Launcher {
 public:
  Launcher(const CrossEntropyParams<T>& rows, const Launch& at)
      : rows_(rows),
        at_(at),
        totals_(static_cast<Totals*>(at.workspace)),
        losses_(reinterpret_cast<double*>(totals_ + kMaxTotals)),
        softmaxes_(reinterpret_cast<RowSoftmax*>(losses_ + kMaxBlocks)) {}

  static int64_t workspace_bytes(int64_t n_rows, int64_t n_classes) {
    const int64_t chunks = uses_chunks(n_rows, n_classes) ? n_rows * chunks_of<T>(n_classes) : 0;
    return kMaxTotals * sizeof(Totals) + kMaxBlocks * sizeof(double) + chunks * sizeof(RowSoftmax);
  }

  template <GpuPass kPass>
  int forward() {
    launch_totals();
    int n_losses = block_blocks(rows_);
    if (uses_tiles(rows_.n_classes)) {
      n_losses = tile_blocks(rows_);
      launch_tile<kPass>();
    } else if (!uses_chunks(rows_.n_rows, rows_.n_classes)) {
      constexpr int64_t kOtherShared = kMaxWarps * sizeof(RowSoftmax);
      const int64_t n_packs = kPass == GpuPass::kForward ? 0 : (rows_.n_classes + kPackSize<T> - 1) / kPackSize<T>;
      const int64_t room = (at_.max_shared_bytes - kOtherShared) / kPackBytes, n_kept = n_packs < room ? n_packs : room;
      next(cross_entropy_block<T, kPass, kPlain>, n_losses, pass_threads<T>(rows_.n_classes, kBlockThreads<T, kPlain>),
           n_kept * kPackBytes, rows_, n_kept, totals_, n_totals_, losses_);
    } else {
      next(cross_entropy_chunk_softmax<T, kPlain>, chunk_blocks(rows_), kChunkThreads, 0, rows_, softmaxes_);
      next(cross_entropy_join_chunks<T, kPlain>, n_losses, kWarp, 0, rows_, softmaxes_, losses_);
      if constexpr (kPass == GpuPass::kForwardBackward) launch_chunk_gradient<GpuPass::kBackward>();
    }
    if (rows_.reduced_loss) {
      next(cross_entropy_reduce<T>, 1, kMaxThreads, 0, rows_, totals_, n_totals_, losses_, n_losses);
    }
    return error_;
  }

  template <GpuPass kPass>
  int gradient() {
    launch_totals();
    if (uses_tiles(rows_.n_classes)) {
      launch_tile<kPass>();
    } else {
      launch_chunk_gradient<kPass>();
    }
    return error_;
  }

 private:
  using RowSoftmax = Softmax<T, !kPlain>;

  template <class Kernel, class... Arguments>
  void next(Kernel kernel, int blocks, int threads, int64_t shared_bytes, const Arguments&... arguments) {
    if (error_ == cudaSuccess) error_ = launch(kernel, blocks, threads, shared_bytes, at_.stream, arguments...);
  }

  void launch_totals() {
    if (!needs_totals(rows_)) return;
    const int64_t blocks = ceil_div(rows_.n_rows, kTargetsInFlight * kTotalsThreads);
    n_totals_ = static_cast<int>(blocks < 1 ? 1 : blocks < kMaxTotals ? blocks : kMaxTotals);
    next(cross_entropy_totals<T>, n_totals_, kTotalsThreads, 0, rows_, totals_);
  }

  template <GpuPass kPass>
  void launch_tile() {
    const int lanes = tile_lanes(rows_.n_classes);
    const int64_t elements = kTileThreads / lanes * rows_.n_classes + kPackSize<T>;
    next(cross_entropy_tile<T, kPass, kPlain>, tile_blocks(rows_), kTileThreads,
         elements * static_cast<int64_t>(sizeof(T)), rows_, lanes, totals_, n_totals_, losses_);
  }

  template <GpuPass kPass>
  void launch_chunk_gradient() {
    next(cross_entropy_chunk_gradient<T, kPass, kPlain>, chunk_blocks(rows_),
         pass_threads<T>(rows_.n_classes, kChunkThreads), 0, rows_, totals_, n_totals_);
  }

  const CrossEntropyParams<T>& rows_;
  const Launch& at_;
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

template <class T>
int cross_entropy_forward(const CrossEntropyParams<T>& rows, Launch& at) {
  return is_plain(rows) ? Launcher<T, true>(rows, at).template forward<GpuPass::kForward>()
                        : Launcher<T, false>(rows, at).template forward<GpuPass::kForward>();
}

template <class T>
int cross_entropy_forward_backward(const CrossEntropyParams<T>& rows, Launch& at) {
  return is_plain(rows) ? Launcher<T, true>(rows, at).template forward<GpuPass::kForwardBackward>()
                        : Launcher<T, false>(rows, at).template forward<GpuPass::kForwardBackward>();
}

template <class T>
int cross_entropy_backward(const CrossEntropyParams<T>& rows, Launch& at) {
  if (rows.grad_lse || rows.grad_entropy) {
    return Launcher<T, false>(rows, at).template gradient<GpuPass::kBackwardWithMetrics>();
  }
  return is_plain(rows) ? Launcher<T, true>(rows, at).template gradient<GpuPass::kBackward>()
                        : Launcher<T, false>(rows, at).template gradient<GpuPass::kBackward>();
}

template <class T>
int cross_entropy_target_backward(const CrossEntropyParams<T>& rows, Launch& at) {
  return Launcher<T, false>(rows, at).template gradient<GpuPass::kTargetBackward>();
}

template <class T>
int cross_entropy_metrics(const CrossEntropyParams<T>& rows, Launch& at) {
  return launch(cross_entropy_metrics_kernel<T>, block_blocks(rows), pass_threads<T>(rows.n_classes, kMaxThreads), 0,
                at.stream, rows);
}

template <class T>
int scale_gradient(const ScaleParams<T>& p, Launch& at) {
  const int64_t blocks = p.n_rows < 1 ? 1 : p.n_rows < kMaxBlocks ? p.n_rows : kMaxBlocks;
  return launch(cross_entropy_scale_grad_kernel<T>, static_cast<int>(blocks), pass_threads<T>(p.n_columns, kMaxThreads),
                0, at.stream, p.grad, p.n_rows, p.n_columns, p.stride, p.factor);
}

CHARLM_REGISTER_KERNELS(cross_entropy, {&cross_entropy_forward<T>, &cross_entropy_forward_backward<T>,
                                        &cross_entropy_backward<T>, &cross_entropy_target_backward<T>,
                                        &cross_entropy_metrics<T>, &scale_gradient<T>, &cross_entropy_workspace<T>});

}  // namespace
}  // namespace charlm::cuda
