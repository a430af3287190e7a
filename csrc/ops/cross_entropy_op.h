// cross_entropy's C++ interface: its options, its shapes, and its implementation for every device, which
// linear_cross_entropy shares.
#pragma once

#include <algorithm>
#include <limits>
#include <tuple>

#include "core/registration.h"
#include "core/tensors.h"

namespace charlm {

enum class Reduction : int64_t { kNone = 0, kMean = 1, kSum = 2 };  // torch's numbers

// The scalar arguments of every cross_entropy schema, in its order.
struct CrossEntropyOptions {
  int64_t reduction;
  int64_t ignore_index;
  double label_smoothing;
  double lse_square_scale;
  double softcap;  // 0: none
  double logit_scale;
  bool zero_if_all_ignored;
  std::optional<at::ScalarType> loss_dtype = std::nullopt;  // that of the logits, or the compute type

  bool is(Reduction r) const { return reduction == static_cast<int64_t>(r); }
};

// Flat<&f>::call is f with the options as plain arguments at the end, as the dispatcher calls it.
template <auto kFunction>
struct Flat;

template <class Result, class... Tensors, Result (*kFunction)(const CrossEntropyOptions&, Tensors...)>
struct Flat<kFunction> {
  static Result call(Tensors... tensors, int64_t reduction, int64_t ignore_index, double label_smoothing,
                     double lse_square_scale, double softcap, double logit_scale, bool zero_if_all_ignored,
                     std::optional<at::ScalarType> loss_dtype) {
    return kFunction({reduction, ignore_index, label_smoothing, lse_square_scale, softcap, logit_scale,
                      zero_if_all_ignored, loss_dtype},
                     tensors...);
  }
};

// A cross_entropy op, called through the dispatcher.
template <class Result, class... Tensors>
class CrossEntropyOp {
  using Signature = Result(Tensors..., int64_t, int64_t, double, double, double, double, bool,
                           std::optional<at::ScalarType>);

 public:
  explicit CrossEntropyOp(const char* name)
      : handle_(c10::Dispatcher::singleton().findSchemaOrThrow(name, "").template typed<Signature>()) {}

  Result operator()(const CrossEntropyOptions& o, Tensors... tensors) const {
    return handle_.call(tensors..., o.reduction, o.ignore_index, o.label_smoothing, o.lse_square_scale, o.softcap,
                        o.logit_scale, o.zero_if_all_ignored, o.loss_dtype);
  }

 private:
  c10::TypedOperatorHandle<Signature> handle_;
};

// (loss, state): the state is [2, N], each row's largest logit and its sum of exponentials. For class probabilities it
// is [3, N], with the sum of the coefficients that weight and smoothing make of them.
using LossAndState = std::tuple<Tensor, Tensor>;
using LossStateGrad = std::tuple<Tensor, Tensor, Tensor>;
// (loss, state, lse, entropy, predicted tokens, token accuracy)
using LossStateAndMetrics = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;
using ForwardOp =
    CrossEntropyOp<LossAndState, const Tensor&, const Tensor&, const OptionalTensor&, const OptionalTensor&>;
using InplaceForwardOp =
    CrossEntropyOp<LossAndState, Tensor&, const Tensor&, const OptionalTensor&, const OptionalTensor&>;

// --------------------------------------------------------------------------------------------------------- shapes

// Targets are class probabilities if and only if they have the shape of the logits, as in torch.
inline bool has_probabilities(const Tensor& input, const Tensor& target) {
  return input.sym_sizes() == target.sym_sizes();
}

inline int64_t class_dim(const Tensor& input) { return input.dim() == 1 ? 0 : 1; }

inline at::ScalarType loss_dtype_of(const CrossEntropyOptions& options, const Tensor& input) {
  return options.loss_dtype.value_or(input.scalar_type());
}

inline c10::SymInt n_classes(const Tensor& input) { return input.sym_size(class_dim(input)); }

// The shape of the unreduced loss: that of the logits without their classes.
inline c10::SymDimVector loss_shape(const Tensor& input) {
  c10::SymDimVector shape(input.sym_sizes().begin(), input.sym_sizes().end());
  shape.erase(shape.begin() + class_dim(input));
  return shape;
}

// The softcap in the dtype of the arithmetic. One that is too large for it caps nothing, and is 0; one that is too
// small for it is its smallest normal number, so that it remains a cap, and z / softcap remains a number.
template <class C>
C softcap_as(double softcap) {
  if (!(softcap > 0) || softcap > std::numeric_limits<C>::max()) return 0;
  return static_cast<C>(std::max(softcap, double{std::numeric_limits<C>::min()}));
}

// Raises torch's error types for shapes and dtypes that do not fit. The values of targets are not checked here.
void check_cross_entropy(const CrossEntropyOptions& options, const Tensor& input, const Tensor& target,
                         const OptionalTensor& weight, const OptionalTensor& token_weight);

// The common dtype of logits, probabilities and weight by torch's promotion rules; none if they already have it. Class
// indices do not take part.
std::optional<at::ScalarType> promoted_dtype(const Tensor& input, const Tensor& target, const OptionalTensor& weight);

// ------------------------------------------------------------------------------------------------- implementation
// For every device, called below autograd.

LossAndState cross_entropy_forward(const CrossEntropyOptions& options, const Tensor& input, const Tensor& target,
                                   const OptionalTensor& weight, const OptionalTensor& token_weight);

// The loss, and in the same pass the gradient of the logits for a unit grad_loss.
LossStateGrad cross_entropy_forward_backward(const CrossEntropyOptions& options, const Tensor& input,
                                             const Tensor& target, const OptionalTensor& weight,
                                             const OptionalTensor& token_weight);

// The same in the memory of the logits.
LossAndState cross_entropy_forward_backward_(const CrossEntropyOptions& options, Tensor& input, const Tensor& target,
                                             const OptionalTensor& weight, const OptionalTensor& token_weight);

// The gradient of the logits, in their memory. The last three tensors are those of MetricGradients, of the loss's
// shape.
void cross_entropy_backward_(const CrossEntropyOptions& options, Tensor& input, const Tensor& grad_loss,
                             const Tensor& target, const OptionalTensor& weight, const OptionalTensor& token_weight,
                             const Tensor& state, const OptionalTensor& grad_lse, const OptionalTensor& grad_entropy,
                             const OptionalTensor& entropy);

// Rescales the gradient computed in forward (unit grad_loss) to the actual grad_loss, without rounding twice: computes
// it anew where the factor is not a power of two.
void cross_entropy_rescale_(const CrossEntropyOptions& options, Tensor& grad, const Tensor& grad_loss,
                            const Tensor& input, const Tensor& target, const OptionalTensor& weight,
                            const OptionalTensor& token_weight, const Tensor& state);

// grad *= factor, without any memory access if factor is 1. For gradients whose logits were not kept.
void scale_gradient_(Tensor& grad, const Tensor& factor);

// The gradients of the returned lse and entropy of each row, which add p_c (grad_lse - grad_entropy (log p_c + H)) to
// that of its logit z_c: [N] in the compute type, contiguous; undefined where there is none. `entropy`: H, with
// grad_entropy.
struct MetricGradients {
  Tensor grad_lse, grad_entropy, entropy;

  bool is_any() const { return grad_lse.defined() || grad_entropy.defined(); }
};

// lse, entropy or the gradient of one, as MetricGradients needs it. `shape`: that of the unreduced loss. RuntimeError
// for another shape or device.
Tensor metric_of_rows(const Tensor& metric, const Tensor& input, c10::SymIntArrayRef shape);

// The losses [n], in the compute type, of logits [n, V] that belong to the rows first_row, first_row + 1, ... of a
// target [N]. With `grad_loss`, [] or [N], the logits become their gradient. The caller has checked shapes and dtypes,
// and reduces the losses itself.
Tensor cross_entropy_of_rows_(const CrossEntropyOptions& options, Tensor& logits, const Tensor& target,
                              const OptionalTensor& weight, const OptionalTensor& token_weight,
                              const OptionalTensor& grad_loss, const MetricGradients& metric_grads, int64_t first_row);

struct CrossEntropyMetrics {
  Tensor lse, entropy;      // compute type, nats
  Tensor predicted_tokens;  // int64
  Tensor is_correct;        // float32, 1 where the predicted token is the target and is counted, else 0
  Tensor counted;           // bool, false where the target is ignored
};

// With reduction "none" `is_correct` itself, otherwise the share of the counted targets that are correct.
Tensor token_accuracy(const CrossEntropyOptions& options, const Tensor& is_correct, const Tensor& counted);

// Each in the shape of the unreduced loss.
CrossEntropyMetrics cross_entropy_metrics_of_rows(const CrossEntropyOptions& options, const Tensor& input,
                                                  const Tensor& target);

// The shapes of lse, entropy, predicted tokens and token accuracy.
using CrossEntropyMetricsTuple = std::tuple<Tensor, Tensor, Tensor, Tensor>;
CrossEntropyMetricsTuple cross_entropy_metrics_meta(const CrossEntropyOptions& options, const Tensor& input,
                                                    const Tensor& target);

}  // namespace charlm
