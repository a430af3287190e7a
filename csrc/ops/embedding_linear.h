// embedding_linear: parameters of its kernels. The first linear layer over embedded tokens:
//   out[n, :] = act(b + sum_t C[x[n, t]] @ W[:, t]^T)
// Folded, C @ W[:, t]^T is computed once for each token and place as a table, whose rows are gathered and summed.
#pragma once

#include "core/kernel.h"

namespace charlm {

// By the number that the op takes.
enum class Activation : int64_t { kNone = 0, kTanh = 1, kRelu = 2, kGelu = 3 };

// ------------------------------------------------------------------------------------------------------------- CPU

// How a table of V tokens at T places, of H numbers each, lies in memory: cut along H into slabs of whole vectors, so
// that one slab of it stays in a first-level cache while rows are summed: [V, n_slabs, T, slab], zeros beyond H.
struct FoldedLayout {
  int64_t n_places = 0;       // T
  int64_t hidden = 0;         // H
  int64_t embedding_dim = 0;  // D
  int64_t slab = 0;
  int64_t n_slabs = 0;

  int64_t token_stride() const { return n_slabs * n_places * slab; }
};

// Rows are contexts, N of them. C = Compute<T>.
template <class T>
struct FoldedParams {
  using C = Compute<T>;

  FoldedLayout layout;
  Activation activation = Activation::kNone;
  const int32_t* offsets = nullptr;  // [N, T] where in the table's first slab the row of each token at its place starts
  const C* table = nullptr;          // [V, n_slabs, T, slab]
  const C* bias = nullptr;           // [n_slabs * slab]
  T* output = nullptr;               // [N, H]
  T* before = nullptr;               // [N, H], optional: the activation's input

  const T* grad_output = nullptr;  // [N, H]
  const T* kept = nullptr;         // [N, H] what the activation's derivative is made of
};

// Rows that are summed at a time: `scratch`, below, holds as many rows of a slab.
constexpr int64_t kFoldedRows = 128;

// ------------------------------------------------------------------------------------------------------------- GPU

// A layer with its weights: both directions, for few tokens. Rows are contexts.
template <class T>
struct EmbeddingLinearParams {
  Indices indices;               // [N, T]; one out of range adds nothing
  int64_t n_rows = 0;            // N
  int64_t n_places = 0;          // T
  int64_t vocabulary = 0;        // V
  int64_t embedding_dim = 0;     // D
  int64_t hidden = 0;            // H
  const T* embedding = nullptr;  // [V, D], with the strides in elements
  int64_t embedding_row_stride = 0, embedding_column_stride = 0;
  const T* linear = nullptr;  // [H, T * D]
  int64_t linear_row_stride = 0, linear_column_stride = 0;
  Activation activation = Activation::kNone;

  const T* bias = nullptr;  // forward, [H]; null: none
  T* output = nullptr;      // [N, H], contiguous
  T* before = nullptr;      // [N, H], contiguous: the activation's argument; optional

  const T* grad_output = nullptr;  // backward, [N, H], contiguous
  const T* kept = nullptr;         // [N, H], contiguous: the activation's argument for kGelu, else its result
  int64_t padding_idx = -1;        // the row of grad_embedding that is zero; -1: none
  T* grad_embedding = nullptr;     // [V, D], contiguous; null: not needed
  T* grad_linear = nullptr;        // [H, T * D], contiguous; null: not needed
  T* grad_bias = nullptr;          // [H]; null: not needed
};

constexpr int64_t kLayerColumns = 32;         // of H, that a block handles
constexpr int64_t kMostLayerBytes = 100'000;  // of a block's shared memory: every GPU from sm_80 on has 99 KiB
constexpr int64_t kMostLayerTokens = 256;     // more are better sorted than added in shared memory
constexpr int64_t kTokensAtATime = 8;         // whose rows of the table a thread computes

// Numbers of shared memory in which a block of the forward computes its columns of the table: the table with a row of
// zeros, C transposed, and its rows of W, an odd number apart.
constexpr int64_t forward_numbers(int64_t n_places, int64_t vocabulary, int64_t embedding_dim) {
  const int64_t tokens = (vocabulary + kTokensAtATime - 1) / kTokensAtATime * kTokensAtATime;
  return (n_places * vocabulary + 1) * kLayerColumns + embedding_dim * tokens +
         kLayerColumns * (n_places * embedding_dim | 1);
}

// The same for a block of backward's products: the gradient of its part of the table at one place, C, and its part of
// W.
constexpr int64_t backward_numbers(int64_t vocabulary, int64_t embedding_dim) {
  return vocabulary * kLayerColumns + vocabulary * embedding_dim + kLayerColumns * embedding_dim;
}

// out[n, :] = act(b + sum_t table[t, x[n, t], :])
template <class T>
struct TableSumParams {
  Indices indices;                    // [N, T]; one out of range adds nothing
  int64_t n_rows = 0;                 // N
  int64_t n_places = 0;               // T
  int64_t vocabulary = 0;             // V
  int64_t hidden = 0;                 // H
  const Compute<T>* table = nullptr;  // [T, V, H], contiguous
  const Compute<T>* bias = nullptr;   // [H]; null: none
  Activation activation = Activation::kNone;
  T* output = nullptr;  // [N, H], contiguous
  T* before = nullptr;  // [N, H], contiguous: the activation's argument; optional
};

// grad_sums = grad_output * act'(argument), in the compute type. All arrays are [n_elements], contiguous.
template <class T>
struct ActivationGradientParams {
  Activation activation = Activation::kNone;
  const T* grad_output = nullptr;
  const T* kept = nullptr;  // the activation's argument for kGelu, else its result
  int64_t n_elements = 0;
  Compute<T>* grad_sums = nullptr;
};

// ----------------------------------------------------------------------------------------------------------- table

template <class T>
struct EmbeddingLinearKernels {
  using C = Compute<T>;

  // CPU. The width of a slab for H columns.
  int64_t (*slab)(int64_t hidden);
  // packed[n_slabs, T, slab, D] = weight[H, T * D], and back, for rows [begin, end) of H; the rest of packed is zeros.
  void (*pack)(const FoldedLayout&, const T* weight, C* packed, int64_t begin, int64_t end);
  void (*unpack)(const FoldedLayout&, const C* packed, T* weight, int64_t begin, int64_t end);
  // The same transposed, [D, n_slabs, T, slab], with its zeros, for pieces [begin, end) of n_slabs * T.
  void (*pack_columns)(const FoldedLayout&, const T* weight, C* packed, int64_t begin, int64_t end);
  // `output` and `before` of rows [begin, end).
  void (*forward)(const FoldedParams<T>&, C* scratch, int64_t begin, int64_t end);
  // Adds the gradient of the activation's input, of rows [begin, end), to one slab of the table's gradient and of the
  // bias's [slab].
  void (*backward)(const FoldedParams<T>&, C* grad_table, C* grad_bias, C* scratch, int64_t slab, int64_t begin,
                   int64_t end);
  // Not folded: out[i] = act(in[i]) of n numbers; the gradient of `in` from that of `out`, rows of `hidden` numbers,
  // and their sum over n_rows rows.
  void (*activate)(Activation, const C* in, T* out, int64_t n);
  void (*activation_backward)(Activation, const T* grad_output, const T* kept, C* grad, C* sum, int64_t n_rows,
                              int64_t hidden);

  // GPU
  Kernel<TableSumParams<T>> sum_table_rows;
  Kernel<ActivationGradientParams<T>> activation_gradient;
  // The same for few tokens, in one launch and in three (ops/embedding_linear_gpu.cpp tells when). Numbers of the
  // backward's workspace, of type C.
  Kernel<EmbeddingLinearParams<T>> layer_forward;
  Kernel<EmbeddingLinearParams<T>> layer_backward;
  int64_t (*layer_workspace)(const EmbeddingLinearParams<T>&);
};

}  // namespace charlm
