// What every room of embedding_linear agrees on: act(linear(embedding(input).flatten(-2), linear_weight, linear_bias)).
#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <optional>
#include <tuple>

#include "activation.h"
#include "checks.h"

namespace charlm {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

using EmbeddingLinearForward = std::tuple<Tensor, Tensor>(const Tensor&, const Tensor&, const Tensor&,
                                                          const OptionalTensor&, int64_t, int64_t, int64_t);
using EmbeddingLinearBackward = std::tuple<Tensor, Tensor, Tensor>(const Tensor&, const Tensor&, const Tensor&,
                                                                   const Tensor&, const Tensor&, int64_t, int64_t,
                                                                   int64_t, std::array<bool, 3>);

// Folded: rows of the table C @ W[:, t]^T are gathered and summed. Gathered: rows of C are, and multiplied by W.
enum class Plan : int64_t { kAuto = 0, kFolded = 1, kGathered = 2 };

struct EmbeddingLinearSizes {
  int64_t n_rows;         // N
  int64_t n_places;       // T
  int64_t vocabulary;     // V
  int64_t embedding_dim;  // D
  int64_t hidden;         // H
  int64_t element_size;   // of the arithmetic: 4 or 8
};

inline int64_t n_contexts(const Tensor& input) {
  return c10::multiply_integers(input.sizes().slice(0, input.dim() - 1));
}

inline EmbeddingLinearSizes embedding_linear_sizes(const Tensor& input, const Tensor& embedding_weight,
                                                   const Tensor& linear_weight) {
  return {.n_rows = n_contexts(input),
          .n_places = input.size(-1),
          .vocabulary = embedding_weight.size(0),
          .embedding_dim = embedding_weight.size(1),
          .hidden = linear_weight.size(0),
          .element_size = embedding_weight.scalar_type() == at::kDouble ? 8 : 4};
}

inline c10::SymDimVector embedding_linear_shape(const Tensor& input, const Tensor& linear_weight) {
  c10::SymDimVector shape(input.sym_sizes().begin(), input.sym_sizes().end());
  shape.back() = linear_weight.sym_size(0);
  return shape;
}

// gelu's derivative is made of its input, the others' of their output.
inline bool keeps_input(int64_t activation) { return activation == static_cast<int64_t>(Activation::kGelu); }

inline void check_embedding_linear(const Tensor& input, const Tensor& embedding_weight, const Tensor& linear_weight,
                                   const OptionalTensor& linear_bias, int64_t padding_idx, int64_t activation,
                                   int64_t plan) {
  check_index_dtype(input, "input");
  TORCH_CHECK(input.dim() >= 1, "input must have a dimension of places, shape (..., T), got a 0-d tensor");
  TORCH_CHECK(embedding_weight.dim() == 2, "embedding_weight must be 2-D, (V, D), got shape ",
              embedding_weight.sym_sizes());
  TORCH_CHECK(linear_weight.dim() == 2, "linear_weight must be 2-D, (H, T * D), got shape ", linear_weight.sym_sizes());
  const c10::SymInt places = input.sym_size(-1), dim = embedding_weight.sym_size(1);
  TORCH_CHECK(linear_weight.sym_size(1) == places * dim, "linear_weight must have T * D = ", places, " * ", dim, " = ",
              places * dim, " columns for an input of shape ", input.sym_sizes(), " and an embedding_weight of shape ",
              embedding_weight.sym_sizes(), ", got shape ", linear_weight.sym_sizes());
  TORCH_CHECK_NOT_IMPLEMENTED(
      at::isFloatingType(embedding_weight.scalar_type()) && embedding_weight.element_size() >= 2,
      "\"embedding_linear\" not implemented for '", embedding_weight.scalar_type(), "'");
  TORCH_CHECK(linear_weight.scalar_type() == embedding_weight.scalar_type(),
              "embedding_weight and linear_weight must have the same dtype, got ", embedding_weight.scalar_type(),
              " and ", linear_weight.scalar_type());
  check_same_device(embedding_weight, "embedding_weight", input, "input");
  check_same_device(embedding_weight, "embedding_weight", linear_weight, "linear_weight");
  if (linear_bias) {
    TORCH_CHECK(linear_bias->dim() == 1 && linear_bias->sym_size(0) == linear_weight.sym_size(0),
                "linear_bias must have shape [", linear_weight.sym_size(0), "] for a linear_weight of shape ",
                linear_weight.sym_sizes(), ", got shape ", linear_bias->sym_sizes());
    TORCH_CHECK(linear_bias->scalar_type() == linear_weight.scalar_type(),
                "linear_weight and linear_bias must have the same dtype, got ", linear_weight.scalar_type(), " and ",
                linear_bias->scalar_type());
    check_same_device(embedding_weight, "embedding_weight", *linear_bias, "linear_bias");
  }
  TORCH_CHECK(padding_idx >= -1, "padding_idx must be a row, or -1 for none, got ", padding_idx);
  TORCH_CHECK(activation >= 0 && activation <= 3, "activation must be 0, 1, 2 or 3, got ", activation);
  TORCH_CHECK(plan >= 0 && plan <= 2, "plan must be 0, 1 or 2, got ", plan);
}

inline void check_embedding_linear_gradient(const Tensor& grad_output, const Tensor& kept, const Tensor& input,
                                            const Tensor& linear_weight) {
  const at::ScalarType dtype = linear_weight.scalar_type();
  TORCH_CHECK(grad_output.sizes() == kept.sizes() && grad_output.numel() == n_contexts(input) * linear_weight.size(0) &&
                  grad_output.scalar_type() == dtype && kept.scalar_type() == dtype,
              "grad_output and kept must have the shape and dtype of the output, got ", grad_output.sizes(), " and ",
              kept.sizes());
}

}  // namespace charlm
