// linear_cross_entropy's C++ interface: its arguments and results, and calls through the dispatcher.
#pragma once

#include <array>

#include "ops/cross_entropy_op.h"

namespace charlm {

// The arguments that every linear_cross_entropy schema ends with, in its order. N rows, D features, V classes.
struct LinearCrossEntropyArguments {
  Tensor input;                 // [N, D] or [D]
  Tensor linear_weight;         // [V, D]
  Tensor target;                // [N] class indices, () or [1] for an input [D]; or probabilities [N, V] or [V]
  OptionalTensor linear_bias;   // [V]
  OptionalTensor weight;        // [V]
  OptionalTensor token_weight;  // [N], or the shape of the target
  bool unrounded;               // the loss in the compute type, which for half types is float
  int64_t block_rows;           // rows whose logits exist at once; 0: as many as are fast
  int64_t gemm;                 // Gemm
  CrossEntropyOptions options;
  int64_t memory_budget = 0;  // bytes beyond the results; 0: the default
};

// The dtype in which products of half types are computed.
enum class Gemm : int64_t {
  kAuto = 0,     // kOwn, or kWidened on a CPU without instructions for that dtype
  kOwn = 1,      // logits and gradients of a block in the dtype of the input
  kWidened = 2,  // in float, with operands converted a part at a time
};

// FlatLinear<&f>::call is f(arguments, before...) as the dispatcher calls it.
template <auto kFunction>
struct FlatLinear;

template <class Result, class... Before, Result (*kFunction)(const LinearCrossEntropyArguments&, Before...)>
struct FlatLinear<kFunction> {
  static Result call(Before... before, const Tensor& input, const Tensor& linear_weight, const Tensor& target,
                     const OptionalTensor& linear_bias, const OptionalTensor& weight,
                     const OptionalTensor& token_weight, bool unrounded, int64_t block_rows, int64_t gemm,
                     int64_t reduction, int64_t ignore_index, double label_smoothing, double lse_square_scale,
                     double softcap, double logit_scale, bool zero_if_all_ignored,
                     std::optional<at::ScalarType> loss_dtype, int64_t memory_budget) {
    return kFunction({input,
                      linear_weight,
                      target,
                      linear_bias,
                      weight,
                      token_weight,
                      unrounded,
                      block_rows,
                      gemm,
                      {reduction, ignore_index, label_smoothing, lse_square_scale, softcap, logit_scale,
                       zero_if_all_ignored, loss_dtype},
                      memory_budget},
                     before...);
  }
};

// A linear_cross_entropy op, called through the dispatcher.
template <class Result, class... Before>
class LinearCrossEntropyOp {
  using Signature = Result(Before..., const Tensor&, const Tensor&, const Tensor&, const OptionalTensor&,
                           const OptionalTensor&, const OptionalTensor&, bool, int64_t, int64_t, int64_t, int64_t,
                           double, double, double, double, bool, std::optional<at::ScalarType>, int64_t);

 public:
  explicit LinearCrossEntropyOp(const char* name)
      : handle_(c10::Dispatcher::singleton().findSchemaOrThrow(name, "").template typed<Signature>()) {}

  Result operator()(const LinearCrossEntropyArguments& a, Before... before) const {
    const CrossEntropyOptions& o = a.options;
    return handle_.call(before..., a.input, a.linear_weight, a.target, a.linear_bias, a.weight, a.token_weight,
                        a.unrounded, a.block_rows, a.gemm, o.reduction, o.ignore_index, o.label_smoothing,
                        o.lse_square_scale, o.softcap, o.logit_scale, o.zero_if_all_ignored, o.loss_dtype,
                        a.memory_budget);
  }

 private:
  c10::TypedOperatorHandle<Signature> handle_;
};

using OutputMask = std::array<bool, 3>;  // which gradients: of input, linear_weight, linear_bias
// (loss, gradients); a gradient that is not in the mask is an empty tensor.
using LossAndGradients = std::tuple<Tensor, Tensor, Tensor, Tensor>;
using LinearForwardOp = LinearCrossEntropyOp<Tensor>;
using LinearGradientsOp = LinearCrossEntropyOp<LossAndGradients, const OptionalTensor&, const OptionalTensor&,
                                               const OptionalTensor&, const OptionalTensor&, OutputMask>;
// (loss, lse, entropy, predicted tokens, token accuracy)
using LossAndMetrics = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

// Raises torch's error types for shapes and dtypes that do not fit. The values of targets are not checked here.
void check_linear_cross_entropy(const LinearCrossEntropyArguments& arguments);

// A tensor of the logits' shape, [N, V] or [V], that holds a single number: for code that reads shapes only.
Tensor like_logits(const LinearCrossEntropyArguments& arguments);

inline at::ScalarType loss_dtype(const LinearCrossEntropyArguments& arguments) {
  return arguments.unrounded ? compute_dtype(arguments.input) : loss_dtype_of(arguments.options, arguments.input);
}

}  // namespace charlm
