// embedding_linear's two implementations, for the CPU and for a GPU, which differ in how they fold.
#pragma once

#include <array>
#include <tuple>

#include "core/device.h"
#include "core/tensors.h"

namespace charlm {

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

// gelu's derivative is computed from its input, those of the other activations from their output.
inline bool keeps_input(Activation activation) { return activation == Activation::kGelu; }

using EmbeddingLinearGradients = std::tuple<Tensor, Tensor, Tensor>;  // of the embedding, the linear weight, the bias

// The activation's output and, for an activation whose derivative needs it, its input; otherwise an empty tensor.
std::tuple<Tensor, Tensor> embedding_linear_on_cpu(const Tensor& input, const Tensor& embedding_weight,
                                                   const Tensor& linear_weight, const OptionalTensor& linear_bias,
                                                   Activation activation, Plan plan);
std::tuple<Tensor, Tensor> embedding_linear_on_gpu(const Device& device, const Tensor& input,
                                                   const Tensor& embedding_weight, const Tensor& linear_weight,
                                                   const OptionalTensor& linear_bias, Activation activation, Plan plan);

// `kept` is what the activation's derivative is computed from: its input for gelu, otherwise its output.
EmbeddingLinearGradients embedding_linear_backward_on_cpu(const Tensor& grad_output, const Tensor& input,
                                                          const Tensor& embedding_weight, const Tensor& linear_weight,
                                                          const Tensor& kept, int64_t padding_idx,
                                                          Activation activation, Plan plan, std::array<bool, 3> needs);
EmbeddingLinearGradients embedding_linear_backward_on_gpu(const Device& device, const Tensor& grad_output,
                                                          const Tensor& input, const Tensor& embedding_weight,
                                                          const Tensor& linear_weight, const Tensor& kept,
                                                          int64_t padding_idx, Activation activation, Plan plan,
                                                          std::array<bool, 3> needs);

// The plans that kAuto stands for, in forward and in backward.
Plan choose_forward_plan_on_cpu(const EmbeddingLinearSizes& sizes);
Plan choose_backward_plan_on_cpu(const EmbeddingLinearSizes& sizes);
Plan choose_plan_on_gpu(const EmbeddingLinearSizes& sizes);

}  // namespace charlm
