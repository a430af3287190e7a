// embedding_linear on a GPU. Forward: a thread owns a pack of columns of some rows of the output, and adds up the rows
// of the table in registers. It reads N * T indices and N * T * H numbers of the table (from the caches, except for V *
// T * H of them) and writes N * H elements, for gelu twice. The activation's gradient is one pass over N * H elements;
// the sums by token are those of embedding's gradient (cuda/embedding_tables.cuh, cuda/embedding_sorted.cuh).
#include <math.h>

#include <initializer_list>

#include "cuda/convert.cuh"
#include "cuda/index.cuh"
#include "ops/embedding_linear.h"

namespace charlm::cuda {
namespace {

constexpr int kLayerThreads = 256;
constexpr int kLayerLanes = 32;    // threads side by side on a row are a multiple of these, unless fewer do
constexpr int kPlacesAtATime = 4;  // rows of the table that a thread loads before it adds the first

template <class C>
constexpr C kInverseSqrt2 = C(0.70710678118654752440);
template <class C>
constexpr C kInverseSqrt2Pi = C(0.39894228040143267794);

template <class C>
__device__ __forceinline__ C normal_cdf(C x) {
  return C(0.5) * (C(1) + erf(x * kInverseSqrt2<C>));
}

// NaN stays NaN.
template <class C, int kWidth>
__device__ __forceinline__ void activate(Activation activation, C (&x)[kWidth]) {
  switch (activation) {  // the same for all threads
    case Activation::kNone:
      return;
    case Activation::kTanh:
#pragma unroll
      for (int i = 0; i < kWidth; i++) x[i] = tanh(x[i]);
      return;
    case Activation::kRelu:
#pragma unroll
      for (int i = 0; i < kWidth; i++) x[i] = x[i] <= C(0) ? C(0) : x[i];
      return;
    case Activation::kGelu:
#pragma unroll
      for (int i = 0; i < kWidth; i++) x[i] *= normal_cdf(x[i]);
      return;
  }
}

// grad *= act'(argument), of which `kept` is the argument for kGelu, else the result.
template <class C, int kWidth>
__device__ __forceinline__ void activate_backward(Activation activation, const C (&kept)[kWidth], C (&grad)[kWidth]) {
  switch (activation) {
    case Activation::kNone:
      return;
    case Activation::kTanh:
#pragma unroll
      for (int i = 0; i < kWidth; i++) grad[i] *= C(1) - kept[i] * kept[i];
      return;
    case Activation::kRelu:
#pragma unroll
      for (int i = 0; i < kWidth; i++) grad[i] = kept[i] <= C(0) ? C(0) : grad[i];
      return;
    case Activation::kGelu:
#pragma unroll
      for (int i = 0; i < kWidth; i++) {
        const C x = kept[i];
        grad[i] *= normal_cdf(x) + x * kInverseSqrt2Pi<C> * exp(C(-0.5) * x * x);
      }
      return;
  }
}

// Block [threads on a row, rows]; n_tiles blocks stand side by side on the columns. kWidth: the columns that a thread
// owns, one, or a pack of T where rows begin at multiples of 16 bytes.
template <class T, int kWidth>
__global__ void __launch_bounds__(kLayerThreads, kMinBlocks)
    embedding_linear_sum_rows(TableSumParams<T> rows, int n_tiles) {
  using C = Compute<T>;
  const int tile = blockIdx.x % n_tiles;
  const int64_t column = (static_cast<int64_t>(tile) * blockDim.x + threadIdx.x) * kWidth;
  if (column >= rows.hidden) return;
  const int64_t places = rows.n_places, table_stride = rows.vocabulary * rows.hidden;
  const int64_t step = static_cast<int64_t>(gridDim.x / n_tiles) * blockDim.y;
  C bias[kWidth] = {};
  if (rows.bias) load_numbers(rows.bias + column, bias);

  BadIndex bad;
  for (int64_t n = blockIdx.x / n_tiles * blockDim.y + threadIdx.y; n < rows.n_rows; n += step) {
    C sum[kWidth];
#pragma unroll
    for (int i = 0; i < kWidth; i++) sum[i] = bias[i];
    const int64_t end = (n + 1) * places;
    int64_t place = column;  // of the table, first row
#pragma unroll 1
    for (int64_t at = n * places; at < end; at += kPlacesAtATime) {
      int64_t index[kPlacesAtATime];
      load_indices(rows.indices, at, 1, end, index);
      C numbers[kPlacesAtATime][kWidth] = {};
#pragma unroll
      for (int k = 0; k < kPlacesAtATime; k++) {
        if (at + k < end && bad.check(rows.indices, at + k, index[k])) {
          load_numbers(rows.table + place + index[k] * rows.hidden, numbers[k]);
        }
        place += table_stride;
      }
#pragma unroll
      for (int k = 0; k < kPlacesAtATime; k++) {
#pragma unroll
        for (int i = 0; i < kWidth; i++) sum[i] += numbers[k][i];
      }
    }
    if (rows.before) store_numbers(rows.before + n * rows.hidden + column, sum);
    activate(rows.activation, sum);
    store_numbers(rows.output + n * rows.hidden + column, sum);
  }
  if (column == 0) bad.record(rows.indices);
}

template <class T, int kWidth>
__global__ void __launch_bounds__(kLayerThreads, kMinBlocks)
    embedding_linear_differentiate(Activation activation, const T* grad_output, const T* kept, int64_t n_elements,
                                   Compute<T>* grad_sums) {
  using C = Compute<T>;
  const int64_t step = static_cast<int64_t>(gridDim.x) * kLayerThreads * kWidth;
  for (int64_t first = (static_cast<int64_t>(blockIdx.x) * kLayerThreads + threadIdx.x) * kWidth; first < n_elements;
       first += step) {
    T loaded[kWidth], loaded_kept[kWidth];
    load_numbers(grad_output + first, loaded);
    load_numbers(kept + first, loaded_kept);
    C grad[kWidth], wide_kept[kWidth];
#pragma unroll
    for (int i = 0; i < kWidth; i++) {
      grad[i] = to_compute(loaded[i]);
      wide_kept[i] = to_compute(loaded_kept[i]);
    }
    activate_backward(activation, wide_kept, grad);
    store_numbers(grad_sums + first, grad);
  }
}

inline bool begin_at_packs(std::initializer_list<const void*> pointers) {
  uintptr_t all = 0;
  for (const void* const pointer : pointers) all |= reinterpret_cast<uintptr_t>(pointer);
  return all % kPackBytes == 0;
}

template <class T, int kWidth>
int sum_rows(const TableSumParams<T>& rows, Stream stream) {
  const int64_t packs = ceil_div(rows.hidden, kWidth);
  const int64_t n_tiles = ceil_div(packs, kLayerThreads), packs_a_tile = ceil_div(packs, n_tiles);
  const int lanes =
      packs_a_tile < kLayerLanes ? power_of_two(packs_a_tile) : static_cast<int>(round_up(packs_a_tile, kLayerLanes));
  const int rows_a_block = kLayerThreads / lanes;
  int64_t blocks = ceil_div(rows.n_rows, rows_a_block);
  const int64_t most = ceil_div(kMaxBlocks, n_tiles);
  if (blocks > most) blocks = most;
  return launch(&embedding_linear_sum_rows<T, kWidth>, dim3(static_cast<unsigned>(blocks * n_tiles)),
                dim3(lanes, rows_a_block), 0, stream, rows, static_cast<int>(n_tiles));
}

template <class T, int kWidth>
int differentiate(const ActivationGradientParams<T>& p, Stream stream) {
  int64_t blocks = ceil_div(p.n_elements, kLayerThreads * kWidth);
  if (blocks > kMaxBlocks) blocks = kMaxBlocks;
  return launch(&embedding_linear_differentiate<T, kWidth>, dim3(static_cast<unsigned>(blocks)), dim3(kLayerThreads), 0,
                stream, p.activation, p.grad_output, p.kept, p.n_elements, p.grad_sums);
}

template <class T>
int sum_table_rows(const TableSumParams<T>& rows, Launch& at) {
  if (rows.n_rows == 0 || rows.hidden == 0) return 0;
  const bool packs =
      rows.hidden % kPackSize<T> == 0 && begin_at_packs({rows.table, rows.bias, rows.output, rows.before});
  return packs ? sum_rows<T, kPackSize<T>>(rows, at.stream) : sum_rows<T, 1>(rows, at.stream);
}

template <class T>
int activation_gradient(const ActivationGradientParams<T>& p, Launch& at) {
  if (p.n_elements == 0) return 0;
  const bool packs = p.n_elements % kPackSize<T> == 0 && begin_at_packs({p.grad_output, p.kept, p.grad_sums});
  return packs ? differentiate<T, kPackSize<T>>(p, at.stream) : differentiate<T, 1>(p, at.stream);
}

CHARLM_REGISTER_KERNELS(embedding_linear, {nullptr, nullptr, nullptr, nullptr, nullptr, nullptr, nullptr, nullptr,
                                           &sum_table_rows<T>, &activation_gradient<T>});

}  // namespace
}  // namespace charlm::cuda
