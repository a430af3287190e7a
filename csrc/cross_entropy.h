// What every room of cross_entropy agrees on: its options, its shapes, and how it is called through the dispatcher.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>

#include <algorithm>
#include <limits>
#include <optional>
#include <tuple>

namespace charlm {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

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

  bool is(Reduction r) const { return reduction == static_cast<int64_t>(r); }
};

// Flat<&f>::call is f with the options as seven plain arguments at the end, as the dispatcher needs it.
template <auto kFunction>
struct Flat;

template <class Result, class... Tensors, Result (*kFunction)(const CrossEntropyOptions&, Tensors...)>
struct Flat<kFunction> {
  static Result call(Tensors... tensors, int64_t reduction, int64_t ignore_index, double label_smoothing,
                     double lse_square_scale, double softcap, double logit_scale, bool zero_if_all_ignored) {
    return kFunction(
        {reduction, ignore_index, label_smoothing, lse_square_scale, softcap, logit_scale, zero_if_all_ignored},
        tensors...);
  }
};

// A cross_entropy op, called through the dispatcher.
template <class Result, class... Tensors>
class CrossEntropyOp {
 public:
  explicit CrossEntropyOp(const char* name)
      : handle_(c10::Dispatcher::singleton()
                    .findSchemaOrThrow(name, "")
                    .template typed<Result(Tensors..., int64_t, int64_t, double, double, double, double, bool)>()) {}

  Result operator()(const CrossEntropyOptions& o, Tensors... tensors) const {
    return handle_.call(tensors..., o.reduction, o.ignore_index, o.label_smoothing, o.lse_square_scale, o.softcap,
                        o.logit_scale, o.zero_if_all_ignored);
  }

 private:
  c10::TypedOperatorHandle<Result(Tensors..., int64_t, int64_t, double, double, double, double, bool)> handle_;
};

// (loss, normalizer): the normalizer is [2, N], each row's largest logit and its sum of exponentials; for class
// probabilities [3, N], with the sum of the coefficients that weight and smoothing make of them.
using LossAndNormalizer = std::tuple<Tensor, Tensor>;
using ForwardOp =
    CrossEntropyOp<LossAndNormalizer, const Tensor&, const Tensor&, const OptionalTensor&, const OptionalTensor&>;
using ForwardBackwardOp = CrossEntropyOp<std::tuple<Tensor, Tensor, Tensor>, const Tensor&, const Tensor&,
                                         const OptionalTensor&, const OptionalTensor&>;
using InplaceForwardOp =
    CrossEntropyOp<LossAndNormalizer, Tensor&, const Tensor&, const OptionalTensor&, const OptionalTensor&>;
using BackwardOp = CrossEntropyOp<Tensor, const Tensor&, const Tensor&, const Tensor&, const OptionalTensor&,
                                  const OptionalTensor&, const Tensor&>;
using InplaceBackwardOp = CrossEntropyOp<void, Tensor&, const Tensor&, const Tensor&, const OptionalTensor&,
                                         const OptionalTensor&, const Tensor&>;

// The op that scales a gradient which the forward has made.
using RescaleOp = CrossEntropyOp<void, Tensor&, const Tensor&, const Tensor&, const Tensor&, const OptionalTensor&,
                                 const OptionalTensor&, const Tensor&>;

// Targets are class probabilities if and only if they have the shape of the logits, as in torch.
inline bool has_probabilities(const Tensor& input, const Tensor& target) {
  return input.sym_sizes() == target.sym_sizes();
}

inline int64_t normalizer_size(const Tensor& input, const Tensor& target) {
  return has_probabilities(input, target) ? 3 : 2;
}

inline int64_t class_dim(const Tensor& input) { return input.dim() == 1 ? 0 : 1; }

inline c10::SymInt n_classes(const Tensor& input) { return input.sym_size(class_dim(input)); }

// The shape of the unreduced loss: that of the logits without their classes.
inline c10::SymDimVector loss_shape(const Tensor& input) {
  c10::SymDimVector shape(input.sym_sizes().begin(), input.sym_sizes().end());
  shape.erase(shape.begin() + class_dim(input));
  return shape;
}

// Arithmetic and sums are in float for the half types.
inline at::ScalarType compute_dtype(const Tensor& input) {
  return input.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

// The softcap in the dtype of the arithmetic. One that is too large for it caps nothing, and is 0; one that is too
// small for it is its smallest normal number, so that it remains a cap, and z / softcap remains a number.
template <class C>
C softcap_as(double softcap) {
  if (!(softcap > 0) || softcap > std::numeric_limits<C>::max()) return 0;
  return static_cast<C>(std::max(softcap, double{std::numeric_limits<C>::min()}));
}

// Raises torch's error types for shapes and dtypes that do not fit; the values of targets are not looked at.
void check_cross_entropy(const CrossEntropyOptions& options, const Tensor& input, const Tensor& target,
                         const OptionalTensor& weight, const OptionalTensor& token_weight);

// The dtype to which logits, probabilities and weight are to be converted, as torch promotes them; none if they have
// it. Class indices take no part in it.
std::optional<at::ScalarType> promoted_dtype(const Tensor& input, const Tensor& target, const OptionalTensor& weight);

inline OptionalTensor to(const OptionalTensor& t, at::ScalarType dtype) {
  return t ? OptionalTensor(t->to(dtype)) : std::nullopt;
}

}  // namespace charlm
