// The first linear layer over embedded tokens, folded: act(b + sum_t table[x_t, t]), where table[v, t] = C[v] @ W[:,
// t]^T. What the adapter fills in, and the functions that each instruction set provides.
#pragma once

#include "../../activation.h"
#include "../../types.h"

namespace charlm {

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

// One call's tensors as pointers. Rows are contexts, N of them; C = Compute<T>.
template <class T>
struct EmbeddingLinearRows {
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

// Rows are summed so many at a time: `scratch`, below, is room for as many rows of a slab.
constexpr int64_t kFoldedRows = 128;

template <class T>
struct EmbeddingLinearKernels {
  using C = Compute<T>;

  // The width of a slab for H columns.
  int64_t (*slab)(int64_t hidden);
  // packed[n_slabs, T, slab, D] = weight[H, T * D], and back, for rows [begin, end) of H; the rest of packed is zeros.
  void (*pack)(const FoldedLayout&, const T* weight, C* packed, int64_t begin, int64_t end);
  void (*unpack)(const FoldedLayout&, const C* packed, T* weight, int64_t begin, int64_t end);
  // The same turned around, [D, n_slabs, T, slab], with its zeros, for pieces [begin, end) of n_slabs * T.
  void (*pack_columns)(const FoldedLayout&, const T* weight, C* packed, int64_t begin, int64_t end);
  // `output` and `before` of rows [begin, end).
  void (*forward)(const EmbeddingLinearRows<T>&, C* scratch, int64_t begin, int64_t end);
  // Adds the gradient of the activation's input, of rows [begin, end), to one slab of the table's gradient and of the
  // bias's [slab].
  void (*backward)(const EmbeddingLinearRows<T>&, C* grad_table, C* grad_bias, C* scratch, int64_t slab, int64_t begin,
                   int64_t end);
  // Not folded: out[i] = act(in[i]) of n numbers; the gradient of `in` from that of `out`, rows of `hidden` numbers,
  // and their sum over n_rows rows.
  void (*activate)(Activation, const C* in, T* out, int64_t n);
  void (*activation_backward)(Activation, const T* grad_output, const T* kept, C* grad, C* sum, int64_t n_rows,
                              int64_t hidden);
};

}  // namespace charlm
