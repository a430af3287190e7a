// The folded first layer: out[n, :] = act(b + sum_t table[t, x[n, t], :]), and the gradient of act's argument. What the
// adapter fills in, and the functions that launch the kernels; each returns CUDA's error code, 0 for success.
#pragma once

#include "../../activation.h"
#include "index_error.h"
#include "stream.h"

namespace charlm::cuda {

template <class T>
struct EmbeddingLinearRows {
  Indices indices;                    // [N, T]; one out of range adds nothing
  int64_t n_rows = 0;                 // N
  int64_t n_places = 0;               // T
  int64_t vocabulary = 0;             // V
  int64_t hidden = 0;                 // H
  const Compute<T>* table = nullptr;  // [T, V, H], contiguous
  const Compute<T>* bias = nullptr;   // [H]; null: none
  Activation activation = Activation::kNone;
  T* output = nullptr;  // [N, H], contiguous
  T* before = nullptr;  // [N, H], contiguous: the activation's argument; null: not wanted
};

template <class T>
int embedding_linear_forward(const EmbeddingLinearRows<T>& rows, Stream stream);

// grad_sums = grad_output * act'(argument), in the dtype of the arithmetic. `kept` is act's argument for kGelu, else
// its result; all are [n_elements], contiguous.
template <class T>
int embedding_linear_activation_backward(Activation activation, const T* grad_output, const T* kept, int64_t n_elements,
                                         Compute<T>* grad_sums, Stream stream);

}  // namespace charlm::cuda
