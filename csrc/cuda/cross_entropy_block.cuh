// Many classes: a block for each row. Its threads walk over the row once and join their softmaxes; where the gradient
// is wanted with the loss, what they read stays in shared memory as far as there is room (227 KiB a block on an H100),
// and only the rest of a longer row is read a second time.
#pragma once

#include "cuda/cross_entropy_totals.cuh"

namespace charlm::cuda {
namespace {

// Positions [0, n) of rows x and y as 16-byte packs, with single elements before the first and after the last multiple
// of 16 bytes; all of them are single where the two are not aligned alike.
template <class T>
struct Span {
  int64_t n, head, n_packs;

  __device__ __forceinline__ Span(const T* x, const T* y, int64_t n) : n(n) {
    const int64_t first = elements_to_alignment(x);
    head = first != elements_to_alignment(y) || first > n ? n : first;
    n_packs = (n - head) / kPackSize<T>;
  }

  __device__ __forceinline__ int64_t pack(int64_t p) const { return head + p * kPackSize<T>; }

  // use(i, pack of elements i ...) for this thread's packs. kBatch of them are loaded before the first is used.
  template <int kBatch, class Load, class Use>
  __device__ __forceinline__ void for_each_pack(Load load, Use use) const {
    for (int64_t first = threadIdx.x; first < n_packs; first += kBatch * blockDim.x) {
      Pack<T> packs[kBatch];
#pragma unroll
      for (int b = 0; b < kBatch; b++) {
        if (first + b * blockDim.x < n_packs) packs[b] = load(first + b * blockDim.x);
      }
#pragma unroll
      for (int b = 0; b < kBatch; b++) {
        if (first + b * blockDim.x < n_packs) use(first + b * blockDim.x, packs[b]);
      }
    }
  }

  // use(i) for this thread's single elements.
  template <class Use>
  __device__ __forceinline__ void for_each_single(Use use) const {
    for (int64_t i = threadIdx.x; i < head; i += blockDim.x) use(i);
    for (int64_t i = pack(n_packs) + threadIdx.x; i < n; i += blockDim.x) use(i);
  }
};

constexpr int kLoadsInFlight = 4;

// This thread's part of the softmax of classes [begin, begin + span.n) of a row; x is the first of them.
// `keep(p, pack)` is called with each pack.
template <class T, bool kPlain, class Keep>
__device__ __forceinline__ typename CrossEntropyRow<T, kPlain>::RowSoftmax softmax_of(
    const CrossEntropyRow<T, kPlain>& row, const Span<T>& span, const T* x, int64_t begin, Keep keep) {
  typename CrossEntropyRow<T, kPlain>::RowSoftmax softmax;
  const auto add = [&](const auto& values, int64_t i) {
    constexpr int K = sizeof(values) / sizeof(T);
    Compute<T> z[K];
#pragma unroll
    for (int k = 0; k < K; k++) z[k] = row.transformed(values[k]);
    row.template add<K>(softmax, z, begin + i, 1, INT64_MAX);
  };
  span.for_each_single([&](int64_t i) {
    const T single[] = {x[i]};
    add(single, i);
  });
  span.template for_each_pack<kLoadsInFlight>([&](int64_t p) { return load_pack(x + span.pack(p)); },
                                              [&](int64_t p, const Pack<T>& pack) {
                                                keep(p, pack);
                                                add(pack.values, span.pack(p));
                                              });
  return softmax;
}

// Writes the gradient of the same classes to y; `load(p)` gives their packs.
template <GpuPass kPass, int kBatch, class T, bool kPlain, class Load>
__device__ __forceinline__ void write_gradient(const CrossEntropyRow<T, kPlain>& row, const Span<T>& span, const T* x,
                                               T* y, int64_t begin, Load load) {
  if (!row.template has_gradient<kPass>()) {
    if (!row.template has_zero_gradient<kPass>()) return;
    const T zero = from_compute<T>(0);
    span.for_each_single([&](int64_t i) { y[i] = zero; });
    for (int64_t p = threadIdx.x; p < span.n_packs; p += blockDim.x) store_pack(y + span.pack(p), Pack<T>{});
    return;
  }
  const auto gradient = [&](T value, int64_t i) {
    const Compute<T> z = row.transformed(value);
    return kPass == GpuPass::kTargetBackward ? row.target_gradient(z, begin + i)
                                             : row.template gradient<kPass>(z, begin + i);
  };
  span.for_each_single([&](int64_t i) { y[i] = gradient(x[i], i); });
  span.template for_each_pack<kBatch>(load, [&](int64_t p, Pack<T> pack) {
#pragma unroll
    for (int k = 0; k < kPackSize<T>; k++) pack.values[k] = gradient(pack.values[k], span.pack(p) + k);
    store_pack(y + span.pack(p), pack);
  });
}

// The registers of a multiprocessor are enough for so many threads, and none are spilled.
template <class T, bool kPlain>
constexpr int kBlockThreads = kPlain && sizeof(Compute<T>) == sizeof(float) ? kMaxThreads : kMaxThreads / 2;

template <class T, GpuPass kPass, bool kPlain>
__global__ void __launch_bounds__(kBlockThreads<T, kPlain>, 1)
    cross_entropy_block(const __grid_constant__ CrossEntropyParams<T> rows, int64_t n_kept, const Totals* totals,
                        int n_totals, double* losses) {
  using Row = CrossEntropyRow<T, kPlain>;
  using RowSoftmax = typename Row::RowSoftmax;
  CHARLM_SHARED(RowSoftmax, parts, kMaxWarps);
  CHARLM_DYNAMIC_SHARED(Pack<T>, kept);  // [n_kept]: each is read by the thread that wrote it
  const double scale = kPass == GpuPass::kForward ? 1 : 1 / divisor(rows, totals, n_totals);
  double loss_sum = 0;
  for (int64_t n = blockIdx.x; n < rows.n_rows; n += gridDim.x) {
    Row row(rows, n);
    const T* const x = row.logits();
    T* const y = kPass == GpuPass::kForward ? nullptr : row.grad();
    const Span<T> span(x, kPass == GpuPass::kForward ? x : y, rows.n_classes);
    if (threadIdx.x == 0 && row.is_bad()) row.record_bad();
    if (row.is_counted()) {
      const Compute<T> target_logit = row.target_logit(x);
      auto softmax = softmax_of(row, span, x, 0, [&](int64_t p, const Pack<T>& pack) {
        if (kPass == GpuPass::kForwardBackward && p < n_kept) kept[p] = pack;
      });
      __syncthreads();  // the parts of the row before have been read
      softmax = softmax.over_block(parts);
      row.finish(softmax);
      if (threadIdx.x == 0) {
        const Compute<T> loss = row.loss(softmax, target_logit);
        loss_sum += loss;
        row.store(softmax, loss);
      }
      if constexpr (kPass == GpuPass::kForwardBackward) row.set_softmax(softmax, scale);
    } else if (threadIdx.x == 0) {
      row.store_uncounted();
    }
    if constexpr (kPass == GpuPass::kForwardBackward) {
      write_gradient<kPass, 1>(row, span, x, y, 0,
                               [&](int64_t p) { return p < n_kept ? kept[p] : load_pack(x + span.pack(p)); });
    }
  }
  if (threadIdx.x == 0) losses[blockIdx.x] = loss_sum;
}

template <class T>
int block_blocks(const CrossEntropyParams<T>& rows) {
  return static_cast<int>(rows.n_rows < 1 ? 1 : rows.n_rows < kMaxBlocks ? rows.n_rows : kMaxBlocks);
}

// At most `most` threads for a walk over n elements: each has kLoadsInFlight packs in the first round, if there are so
// many.
template <class T>
int pass_threads(int64_t n, int most) {
  int threads = 2 * kWarp;
  while (threads < most && threads * kLoadsInFlight * kPackSize<T> < n) threads *= 2;
  return threads;
}

}  // namespace
}  // namespace charlm::cuda
