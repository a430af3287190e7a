// The choice of kernel, grid and block for each function of cross_entropy.h:
//
//   V <= 256                                   tiles of whole rows (cross_entropy_tile.cuh)
//   else, forward, fewer than 256 rows of
//   more than 16384 classes                    several blocks for each row (cross_entropy_chunks.cuh)
//   else, forward                              a block for each row (cross_entropy_block.cuh)
//   else, a gradient from a stored softmax     several blocks for each row
#pragma once

#include "cross_entropy_chunks.cuh"
#include "cross_entropy_metrics.cuh"
#include "cross_entropy_tile.cuh"

namespace charlm::cuda {
namespace {

constexpr int64_t kFewRows = 256;  // twice the multiprocessors of a large GPU
constexpr int64_t kLongRow = 16384;

inline bool uses_tiles(int64_t n_classes) { return n_classes <= kTileMaxClasses; }

inline bool uses_chunks(int64_t n_rows, int64_t n_classes) { return n_rows < kFewRows && n_classes > kLongRow; }

// The kernels of one call, launched one after the other until one fails.
template <class T, bool kPlain>
class CrossEntropyCall {
 public:
  CrossEntropyCall(const CrossEntropyRows<T>& rows, const CrossEntropyLaunch& at)
      : rows_(rows),
        at_(at),
        totals_(static_cast<Totals*>(at.workspace)),
        losses_(reinterpret_cast<double*>(totals_ + kMaxTotals)),
        softmaxes_(reinterpret_cast<RowSoftmax*>(losses_ + kMaxBlocks)) {}

  static int64_t workspace_bytes(int64_t n_rows, int64_t n_classes) {
    const int64_t chunks = uses_chunks(n_rows, n_classes) ? n_rows * chunks_of<T>(n_classes) : 0;
    return kMaxTotals * sizeof(Totals) + kMaxBlocks * sizeof(double) + chunks * sizeof(RowSoftmax);
  }

  template <Pass kPass>
  int forward() {
    launch_totals();
    int n_losses = block_blocks(rows_);
    if (uses_tiles(rows_.n_classes)) {
      n_losses = tile_blocks(rows_);
      launch_tile<kPass>();
    } else if (!uses_chunks(rows_.n_rows, rows_.n_classes)) {
      constexpr int64_t kOtherShared = kMaxWarps * sizeof(RowSoftmax);
      const int64_t n_packs = kPass == Pass::kForward ? 0 : (rows_.n_classes + kPackSize<T> - 1) / kPackSize<T>;
      const int64_t room = (at_.max_shared_bytes - kOtherShared) / kPackBytes, n_kept = n_packs < room ? n_packs : room;
      next(cross_entropy_block<T, kPass, kPlain>, n_losses, walk_threads<T>(rows_.n_classes, kBlockThreads<T, kPlain>),
           n_kept * kPackBytes, rows_, n_kept, totals_, n_totals_, losses_);
    } else {
      next(cross_entropy_chunk_softmax<T, kPlain>, chunk_blocks(rows_), kChunkThreads, 0, rows_, softmaxes_);
      next(cross_entropy_join_chunks<T, kPlain>, n_losses, kWarp, 0, rows_, softmaxes_, losses_);
      if constexpr (kPass == Pass::kForwardBackward) launch_chunk_gradient<Pass::kBackward>();
    }
    if (rows_.reduced_loss) {
      next(cross_entropy_reduce<T>, 1, kMaxThreads, 0, rows_, totals_, n_totals_, losses_, n_losses);
    }
    return error_;
  }

  template <Pass kPass>
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

  template <Pass kPass>
  void launch_tile() {
    const int lanes = tile_lanes(rows_.n_classes);
    const int64_t elements = kTileThreads / lanes * rows_.n_classes + kPackSize<T>;
    next(cross_entropy_tile<T, kPass, kPlain>, tile_blocks(rows_), kTileThreads,
         elements * static_cast<int64_t>(sizeof(T)), rows_, lanes, totals_, n_totals_, losses_);
  }

  template <Pass kPass>
  void launch_chunk_gradient() {
    next(cross_entropy_chunk_gradient<T, kPass, kPlain>, chunk_blocks(rows_),
         walk_threads<T>(rows_.n_classes, kChunkThreads), 0, rows_, totals_, n_totals_);
  }

  const CrossEntropyRows<T>& rows_;
  const CrossEntropyLaunch& at_;
  Totals* const totals_;  // [kMaxTotals]
  double* const losses_;  // [kMaxBlocks]
  RowSoftmax* const softmaxes_;
  int n_totals_ = 0;
  cudaError_t error_ = cudaSuccess;
};

}  // namespace

template <class T>
int64_t cross_entropy_workspace(int64_t n_rows, int64_t n_classes) {
  return CrossEntropyCall<T, false>::workspace_bytes(n_rows, n_classes);
}

template <class T>
int cross_entropy_forward(const CrossEntropyRows<T>& rows, const CrossEntropyLaunch& at) {
  return is_plain(rows) ? CrossEntropyCall<T, true>(rows, at).template forward<Pass::kForward>()
                        : CrossEntropyCall<T, false>(rows, at).template forward<Pass::kForward>();
}

template <class T>
int cross_entropy_forward_backward(const CrossEntropyRows<T>& rows, const CrossEntropyLaunch& at) {
  return is_plain(rows) ? CrossEntropyCall<T, true>(rows, at).template forward<Pass::kForwardBackward>()
                        : CrossEntropyCall<T, false>(rows, at).template forward<Pass::kForwardBackward>();
}

template <class T>
int cross_entropy_backward(const CrossEntropyRows<T>& rows, const CrossEntropyLaunch& at) {
  return is_plain(rows) ? CrossEntropyCall<T, true>(rows, at).template gradient<Pass::kBackward>()
                        : CrossEntropyCall<T, false>(rows, at).template gradient<Pass::kBackward>();
}

template <class T>
int cross_entropy_target_backward(const CrossEntropyRows<T>& rows, const CrossEntropyLaunch& at) {
  return CrossEntropyCall<T, false>(rows, at).template gradient<Pass::kTargetBackward>();
}

template <class T>
int cross_entropy_metrics(const CrossEntropyRows<T>& rows, const CrossEntropyMetrics<T>& out, Stream stream) {
  return launch(cross_entropy_metrics_kernel<T>, block_blocks(rows), walk_threads<T>(rows.n_classes, kMaxThreads), 0,
                stream, rows, out);
}

template <class T>
int cross_entropy_scale_grad(T* grad, int64_t n_rows, int64_t n_classes, int64_t stride, const Compute<T>* factor,
                             Stream stream) {
  const int64_t blocks = n_rows < 1 ? 1 : n_rows < kMaxBlocks ? n_rows : kMaxBlocks;
  return launch(cross_entropy_scale_grad_kernel<T>, static_cast<int>(blocks), walk_threads<T>(n_classes, kMaxThreads),
                0, stream, grad, n_rows, n_classes, stride, factor);
}

}  // namespace charlm::cuda
