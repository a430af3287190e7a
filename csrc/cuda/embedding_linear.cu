// embedding_linear on a GPU. For few tokens see cuda/embedding_linear_layer.cuh; here for any number of them, where
// torch computes the tables. Forward: a thread handles a pack of columns in some rows of the output, and adds up rows
// of the table in registers. It reads N * T indices and N * T * H numbers of the table (all but V * T * H of them from
// the caches), and writes N * H elements, for gelu twice. The gradient of the activation is one pass over N * H
// elements; the sums by token are those of the embedding's gradient (cuda/embedding_tables.cuh,
// cuda/embedding_sorted.cuh).
#include <initializer_list>

#include "cuda/embedding_linear_layer.cuh"
#include "cuda/load_store.cuh"
#include "ops/embedding_linear.h"

namespace charlm::cuda {
namespace {

constexpr int kLayerThreads = 256;
constexpr int kLayerLanes = 32;    // the threads of a row are a multiple of this, or fewer for a short row
constexpr int kPlacesAtATime = 4;  // rows of the table that a thread loads before it adds them

// Block [threads on a row, rows]. n_tiles blocks divide the columns among them. kWidth: the columns of a thread, one,
// or a pack of T if rows start at multiples of 16 bytes.
template <class T, int kWidth>
__global__ void __launch_bounds__(kLayerThreads, kMinResidentBlocks)
    embedding_linear_sum_rows(TableSumParams<T> params, int n_tiles) {
  using C = Compute<T>;
  const int tile = blockIdx.x % n_tiles;
  const int64_t column = (static_cast<int64_t>(tile) * blockDim.x + threadIdx.x) * kWidth;
  if (column >= params.hidden) return;
  const int64_t places = params.n_places, table_stride = params.vocabulary * params.hidden;
  const int64_t step = static_cast<int64_t>(gridDim.x / n_tiles) * blockDim.y;
  C bias[kWidth] = {};
  if (params.bias) load_numbers(params.bias + column, bias);

  BadIndex bad;
  for (int64_t n = blockIdx.x / n_tiles * blockDim.y + threadIdx.y; n < params.n_rows; n += step) {
    C sum[kWidth];
#pragma unroll
    for (int i = 0; i < kWidth; i++) sum[i] = bias[i];
    const int64_t end = (n + 1) * places;
    int64_t place = column;  // in the table of the place, at token 0
#pragma unroll 1
    for (int64_t first = n * places; first < end; first += kPlacesAtATime) {
      int64_t index[kPlacesAtATime];
      load_indices(params.indices, first, 1, end, index);
      C numbers[kPlacesAtATime][kWidth] = {};
#pragma unroll
      for (int k = 0; k < kPlacesAtATime; k++) {
        if (first + k < end && bad.check(params.indices, first + k, index[k])) {
          load_numbers(params.table + place + index[k] * params.hidden, numbers[k]);
        }
        place += table_stride;
      }
#pragma unroll
      for (int k = 0; k < kPlacesAtATime; k++) {
#pragma unroll
        for (int i = 0; i < kWidth; i++) sum[i] += numbers[k][i];
      }
    }
    if (params.before) store_numbers(params.before + n * params.hidden + column, sum);
    activate(params.activation, sum);
    store_numbers(params.output + n * params.hidden + column, sum);
  }
  if (column == 0) bad.record(params.indices);
}

template <class T, int kWidth>
__global__ void __launch_bounds__(kLayerThreads, kMinResidentBlocks)
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
int sum_rows(const TableSumParams<T>& params, Stream stream) {
  const int64_t packs = ceil_div(params.hidden, kWidth);
  const int64_t n_tiles = ceil_div(packs, kLayerThreads), packs_a_tile = ceil_div(packs, n_tiles);
  const int lanes =
      packs_a_tile < kLayerLanes ? power_of_two(packs_a_tile) : static_cast<int>(round_up(packs_a_tile, kLayerLanes));
  const int rows_a_block = kLayerThreads / lanes;
  int64_t blocks = ceil_div(params.n_rows, rows_a_block);
  const int64_t most = ceil_div(kMaxBlocks, n_tiles);
  if (blocks > most) blocks = most;
  return launch_kernel(&embedding_linear_sum_rows<T, kWidth>, dim3(static_cast<unsigned>(blocks * n_tiles)),
                       dim3(lanes, rows_a_block), 0, stream, params, static_cast<int>(n_tiles));
}

template <class T, int kWidth>
int differentiate(const ActivationGradientParams<T>& params, Stream stream) {
  int64_t blocks = ceil_div(params.n_elements, kLayerThreads * kWidth);
  if (blocks > kMaxBlocks) blocks = kMaxBlocks;
  return launch_kernel(&embedding_linear_differentiate<T, kWidth>, dim3(static_cast<unsigned>(blocks)),
                       dim3(kLayerThreads), 0, stream, params.activation, params.grad_output, params.kept,
                       params.n_elements, params.grad_sums);
}

template <class T>
int sum_table_rows(const TableSumParams<T>& params, Launch& launch) {
  if (params.n_rows == 0 || params.hidden == 0) return 0;
  const bool packs =
      params.hidden % kPackSize<T> == 0 && begin_at_packs({params.table, params.bias, params.output, params.before});
  return packs ? sum_rows<T, kPackSize<T>>(params, launch.stream) : sum_rows<T, 1>(params, launch.stream);
}

template <class T>
int activation_gradient(const ActivationGradientParams<T>& params, Launch& launch) {
  if (params.n_elements == 0) return 0;
  const bool packs =
      params.n_elements % kPackSize<T> == 0 && begin_at_packs({params.grad_output, params.kept, params.grad_sums});
  return packs ? differentiate<T, kPackSize<T>>(params, launch.stream) : differentiate<T, 1>(params, launch.stream);
}

CHARLM_REGISTER_KERNELS(embedding_linear,
                        {nullptr, nullptr, nullptr, nullptr, nullptr, nullptr, nullptr, nullptr, &sum_table_rows<T>,
                         &activation_gradient<T>, &layer_forward<T>, &layer_backward<T>, &layer_workspace<T>});

}  // namespace
}  // namespace charlm::cuda
