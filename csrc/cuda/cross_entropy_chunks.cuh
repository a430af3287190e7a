// Several blocks for each row: chunks of it. The gradients of logits and probabilities need no more than the row's
// stored softmax, so each chunk is on its own. A forward pass uses chunks where there are too few long rows to give
// each a block: the chunks' softmaxes are stored, then joined, and its gradient is made by a second reading.
#pragma once

#include "cuda/cross_entropy_block.cuh"

namespace charlm::cuda {
namespace {

constexpr int kChunkPacks = 1024;
constexpr int kChunkThreads = kChunkPacks / kLoadsInFlight;

template <class T>
constexpr int64_t kChunk = kChunkPacks * kPackSize<T>;  // classes

template <class T>
__host__ __device__ int64_t chunks_of(int64_t n_classes) {
  return (n_classes + kChunk<T> - 1) / kChunk<T>;
}

template <class T>
int chunk_blocks(const CrossEntropyParams<T>& rows) {
  const int64_t chunks = rows.n_rows * chunks_of<T>(rows.n_classes);
  return static_cast<int>(chunks < 1 ? 1 : chunks < kMaxBlocks ? chunks : kMaxBlocks);
}

template <class T, bool kPlain>
__global__ void __launch_bounds__(kChunkThreads, kMinBlocks)
    cross_entropy_chunk_softmax(const __grid_constant__ CrossEntropyParams<T> rows, Softmax<T, !kPlain>* softmaxes) {
  using RowSoftmax = Softmax<T, !kPlain>;
  CHARLM_SHARED(RowSoftmax, parts, kMaxWarps);
  const int64_t n_chunks = chunks_of<T>(rows.n_classes);
  for (int64_t i = blockIdx.x; i < rows.n_rows * n_chunks; i += gridDim.x) {
    const int64_t n = i / n_chunks, begin = (i - n * n_chunks) * kChunk<T>;
    const CrossEntropyRow<T, kPlain> row(rows, n);
    if (!row.is_counted()) continue;
    const int64_t left = rows.n_classes - begin;
    const T* const x = row.logits() + begin;
    const Span<T> span(x, x, left < kChunk<T> ? left : kChunk<T>);
    auto softmax = softmax_of(row, span, x, begin, [](int64_t, const Pack<T>&) {});
    __syncthreads();  // the parts of the chunk before have been read
    softmax = softmax.over_block(parts);
    if (threadIdx.x == 0) softmaxes[i] = softmax;
  }
}

// A warp for each row.
template <class T, bool kPlain>
__global__ void __launch_bounds__(kWarp)
    cross_entropy_join_chunks(const __grid_constant__ CrossEntropyParams<T> rows, const Softmax<T, !kPlain>* softmaxes,
                              double* losses) {
  using RowSoftmax = Softmax<T, !kPlain>;
  CHARLM_SHARED(RowSoftmax, parts, kMaxWarps);
  const int64_t n_chunks = chunks_of<T>(rows.n_classes);
  double loss_sum = 0;
  for (int64_t n = blockIdx.x; n < rows.n_rows; n += gridDim.x) {
    const CrossEntropyRow<T, kPlain> row(rows, n);
    if (row.is_counted()) {
      RowSoftmax softmax;
      for (int64_t i = threadIdx.x; i < n_chunks; i += kWarp) {
        softmax = RowSoftmax::join(softmax, softmaxes[n * n_chunks + i]);
      }
      __syncthreads();  // the parts of the row before have been read
      softmax = softmax.over_block(parts);
      row.finish(softmax);
      if (threadIdx.x == 0) {
        const Compute<T> loss = row.loss(softmax, row.target_logit(row.logits()));
        loss_sum += loss;
        row.store(softmax, loss);
      }
    } else if (threadIdx.x == 0) {
      row.store_uncounted();
      if (row.is_bad()) row.record_bad();
    }
  }
  if (threadIdx.x == 0) losses[blockIdx.x] = loss_sum;
}

template <class T, GpuPass kPass, bool kPlain>
__global__ void __launch_bounds__(kChunkThreads, kMinBlocks)
    cross_entropy_chunk_gradient(const __grid_constant__ CrossEntropyParams<T> rows, const Totals* totals,
                                 int n_totals) {
  if (kPass == GpuPass::kBackward && rows.grad_is_precomputed && *rows.grad_loss == 1) return;
  const double scale = 1 / divisor(rows, totals, n_totals);
  const int64_t n_chunks = chunks_of<T>(rows.n_classes);
  for (int64_t i = blockIdx.x; i < rows.n_rows * n_chunks; i += gridDim.x) {
    const int64_t n = i / n_chunks, begin = (i - n * n_chunks) * kChunk<T>;
    CrossEntropyRow<T, kPlain> row(rows, n);
    if (threadIdx.x == 0 && begin == 0 && row.is_bad()) row.record_bad();
    if (row.template has_gradient<kPass>()) row.set_softmax(row.stored(), scale);
    const int64_t left = rows.n_classes - begin;
    const T* const x = row.logits() + begin;
    T* const y = row.grad() + begin;
    const Span<T> span(x, y, left < kChunk<T> ? left : kChunk<T>);
    write_gradient<kPass, kLoadsInFlight>(row, span, x, y, begin,
                                          [&](int64_t p) { return load_pack(x + span.pack(p)); });
  }
}

}  // namespace
}  // namespace charlm::cuda
