// Many classes, where cross_entropy_registers.cuh has no kernel: float64, rows too long for registers, and few rows on
// a GPU without clusters. The block of a row keeps it in shared memory, as far as it fits (227 KiB a block on an H100),
// and reads only the rest of a longer row a second time.
#pragma once

#include "cuda/cross_entropy_reduction.cuh"
#include "cuda/cross_entropy_row.cuh"

namespace charlm::cuda {
namespace {

// Positions [0, n) of rows x and y, divided into 16-byte packs and single elements before the first and after the last
// multiple of 16 bytes. If x and y differ in alignment, all elements are single.
template <class T>
struct Span {
  int64_t n, head, n_packs;

  __device__ __forceinline__ Span(const T* x, const T* y, int64_t n) : n(n) {
    const int64_t first = elements_to_alignment(x);
    head = first != elements_to_alignment(y) || first > n ? n : first;
    n_packs = (n - head) / kPackSize<T>;
  }

  __device__ __forceinline__ int64_t pack(int64_t p) const { return head + p * kPackSize<T>; }

  // Calls use(p, load(p)) for the packs of this thread. kBatch packs are loaded before the first is used.
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

  // Calls use(i) for the single elements of this thread.
  template <class Use>
  __device__ __forceinline__ void for_each_single(Use use) const {
    for (int64_t i = threadIdx.x; i < head; i += blockDim.x) use(i);
    for (int64_t i = pack(n_packs) + threadIdx.x; i < n; i += blockDim.x) use(i);
  }
};

constexpr int kLoadsInFlight = 4;

// This thread's part of the softmax of classes [begin, begin + span.n) of a row, whose logits start at x. Calls
// keep(p, pack) for each pack.
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

// Writes the gradient of a row to y; load(p) returns its packs.
template <class T, bool kPlain, class Load>
__device__ __forceinline__ void write_gradient(const CrossEntropyRow<T, kPlain>& row, const Span<T>& span, const T* x,
                                               T* y, Load load) {
  constexpr CrossEntropyPass kPass = CrossEntropyPass::kForwardBackward;
  if (!row.template has_gradient<kPass>()) {
    if (!row.template has_zero_gradient<kPass>()) return;
    const T zero = from_compute<T>(0);
    span.for_each_single([&](int64_t i) { y[i] = zero; });
    for (int64_t p = threadIdx.x; p < span.n_packs; p += blockDim.x) store_pack(y + span.pack(p), Pack<T>{});
    return;
  }
  const auto gradient = [&](T value, int64_t i) {
    return from_compute<T>(row.template gradient<kPass>(row.transformed(value), i));
  };
  span.for_each_single([&](int64_t i) { y[i] = gradient(x[i], i); });
  span.template for_each_pack<1>(load, [&](int64_t p, Pack<T> pack) {
#pragma unroll
    for (int k = 0; k < kPackSize<T>; k++) pack.values[k] = gradient(pack.values[k], span.pack(p) + k);
    store_pack(y + span.pack(p), pack);
  });
}

// For which the registers of a multiprocessor suffice without spilling.
constexpr int kBlockThreads = 512;

template <class T, bool kPlain>
__global__ void __launch_bounds__(kBlockThreads, 1)
    cross_entropy_block(const __grid_constant__ CrossEntropyParams<T> params, int64_t n_kept,
                        const __grid_constant__ Reduction reduction) {
  using Row = CrossEntropyRow<T, kPlain>;
  using RowSoftmax = typename Row::RowSoftmax;
  CHARLM_SHARED(RowSoftmax, parts, kMaxWarps);
  CHARLM_DYNAMIC_SHARED(Pack<T>, kept);  // [n_kept], each read by the thread that wrote it
  const double scale = reciprocal<T>(divisor(params, reduction));
  double loss_sum = 0;
  for (int64_t n = blockIdx.x; n < params.n_rows; n += gridDim.x) {
    Row row(params, n);
    const T* const x = row.logits();
    T* const y = row.grad();
    const Span<T> span(x, y, params.n_classes);
    if (threadIdx.x == 0 && row.is_bad()) row.record_bad();
    if (row.is_counted()) {
      const Compute<T> target_logit = row.target_logit(x);
      auto softmax = softmax_of(row, span, x, 0, [&](int64_t p, const Pack<T>& pack) {
        if (p < n_kept) kept[p] = pack;
      });
      __syncthreads();  // the parts of the previous row have been read
      softmax = softmax.over_block(parts);
      row.finish(softmax);
      if (threadIdx.x == 0) {
        const Compute<T> loss = row.loss(softmax, target_logit);
        loss_sum += loss;
        row.store(softmax, loss);
      }
      row.set_softmax(softmax, scale);
    } else if (threadIdx.x == 0) {
      row.store_uncounted();
    }
    write_gradient(row, span, x, y, [&](int64_t p) { return p < n_kept ? kept[p] : load_pack(x + span.pack(p)); });
  }
  reduce_losses(params, reduction, loss_sum);
}

template <class T>
int block_blocks(const CrossEntropyParams<T>& params) {
  return blocks_for(params.n_rows);
}

// Threads for a pass over n elements, at most `most`: each loads kLoadsInFlight packs in its first iteration, if n is
// large enough.
template <class T>
int pass_threads(int64_t n, int most) {
  int threads = 2 * kWarp;
  while (threads < most && threads * kLoadsInFlight * kPackSize<T> < n) threads *= 2;
  return threads;
}

// ----------------------------------------------------------------------------------------- several blocks for each row
// Without clusters, for too few long rows to occupy the GPU with one block each: a block stores the softmax of a chunk
// of a row, and a second kernel joins those of each row.

constexpr int kChunkPacks = 1024;
constexpr int kChunkThreads = kChunkPacks / kLoadsInFlight;

template <class T>
constexpr int64_t kChunkClasses = kChunkPacks * kPackSize<T>;

template <class T>
__host__ __device__ int64_t chunks_of(int64_t n_classes) {
  return (n_classes + kChunkClasses<T> - 1) / kChunkClasses<T>;
}

template <class T>
int chunk_blocks(const CrossEntropyParams<T>& params) {
  return blocks_for(params.n_rows * chunks_of<T>(params.n_classes));
}

template <class T, bool kPlain>
__global__ void __launch_bounds__(kChunkThreads, kMinResidentBlocks)
    cross_entropy_chunk_softmax(const __grid_constant__ CrossEntropyParams<T> params, Softmax<T, !kPlain>* softmaxes) {
  using RowSoftmax = Softmax<T, !kPlain>;
  CHARLM_SHARED(RowSoftmax, parts, kMaxWarps);
  const int64_t n_chunks = chunks_of<T>(params.n_classes);
  for (int64_t i = blockIdx.x; i < params.n_rows * n_chunks; i += gridDim.x) {
    const int64_t n = i / n_chunks, begin = (i - n * n_chunks) * kChunkClasses<T>;
    const CrossEntropyRow<T, kPlain> row(params, n);
    if (!row.is_counted()) continue;
    const int64_t left = params.n_classes - begin;
    const T* const x = row.logits() + begin;
    const Span<T> span(x, x, left < kChunkClasses<T> ? left : kChunkClasses<T>);
    auto softmax = softmax_of(row, span, x, begin, [](int64_t, const Pack<T>&) {});
    __syncthreads();  // the parts of the previous chunk have been read
    softmax = softmax.over_block(parts);
    if (threadIdx.x == 0) softmaxes[i] = softmax;
  }
}

// One warp for each row.
template <class T, bool kPlain>
__global__ void __launch_bounds__(kWarp)
    cross_entropy_join_chunks(const __grid_constant__ CrossEntropyParams<T> params,
                              const Softmax<T, !kPlain>* softmaxes, const __grid_constant__ Reduction reduction) {
  using RowSoftmax = Softmax<T, !kPlain>;
  CHARLM_SHARED(RowSoftmax, parts, kMaxWarps);
  const int64_t n_chunks = chunks_of<T>(params.n_classes);
  double loss_sum = 0;
  for (int64_t n = blockIdx.x; n < params.n_rows; n += gridDim.x) {
    const CrossEntropyRow<T, kPlain> row(params, n);
    if (row.is_counted()) {
      RowSoftmax softmax;
      for (int64_t i = threadIdx.x; i < n_chunks; i += kWarp) {
        softmax = RowSoftmax::join(softmax, softmaxes[n * n_chunks + i]);
      }
      __syncthreads();  // the parts of the previous row have been read
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
  reduce_losses(params, reduction, loss_sum);
}

}  // namespace
}  // namespace charlm::cuda
