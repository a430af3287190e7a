// Shapes and dtypes of cross_entropy's arguments, refused with the error types that torch uses.
#include <cmath>
#include <limits>

#include "checks.h"
#include "cross_entropy.h"

namespace charlm {
namespace {

void check_probabilities(const CrossEntropyOptions& options, const Tensor& target) {
  TORCH_CHECK(target.is_floating_point(), "Expected floating point type for target with class probabilities, got ",
              target.scalar_type(), " (a target of the logits' own shape ", target.sizes(), ")");
  TORCH_CHECK(options.ignore_index < 0, "ignore_index is not supported for floating point target, got ",
              options.ignore_index);
}

void check_class_indices(const Tensor& input, const Tensor& target) {
  if (input.dim() == 1) {
    TORCH_CHECK(target.dim() <= 1, "0D or 1D target tensor expected for 1D input, got shape ", target.sym_sizes());
    TORCH_CHECK_VALUE(target.sym_numel() == 1,
                      "For 1D input, 1D target must have size 1, but got target size: ", target.sym_numel());
  } else {
    const c10::SymInt batch_size = target.dim() == 0 ? c10::SymInt(0) : target.sym_size(0);
    TORCH_CHECK_VALUE(target.dim() > 0 && input.sym_size(0) == batch_size, "Expected input batch_size (",
                      input.sym_size(0), ") to match target batch_size (", batch_size, ").");
    const auto expected = loss_shape(input);
    TORCH_CHECK(target.sym_sizes() == c10::SymIntArrayRef(expected), "Expected target size ",
                c10::SymIntArrayRef(expected), ", got ", target.sym_sizes());
  }
  check_index_dtype(target, "target");
}

// A finite factor that is infinite in the dtype of the arithmetic would make a NaN of a logit of 0.
void check_factor(const Tensor& input, double factor, const char* name) {
  const bool is_float = input.scalar_type() != at::kDouble;
  TORCH_CHECK_VALUE(!is_float || !std::isfinite(factor) || std::abs(factor) <= std::numeric_limits<float>::max(), name,
                    " must be finite in torch.float32, the dtype of the arithmetic, got ", factor);
}

}  // namespace

void check_cross_entropy(const CrossEntropyOptions& options, const Tensor& input, const Tensor& target,
                         const OptionalTensor& weight, const OptionalTensor& token_weight) {
  TORCH_CHECK(options.reduction >= 0 && options.reduction <= 2, "reduction must be 0, 1 or 2, got ", options.reduction);
  TORCH_CHECK(options.label_smoothing <= 1.0,
              "label_smoothing must be between 0.0 and 1.0. Got: ", options.label_smoothing);
  check_factor(input, options.logit_scale, "logit_scale");
  check_factor(input, options.lse_square_scale, "lse_square_scale");
  const bool probabilities = has_probabilities(input, target);
  if (probabilities) check_probabilities(options, target);
  TORCH_CHECK_INDEX(input.dim() > 0, "cross_entropy needs logits with a class dimension, got a 0-d input");
  TORCH_CHECK_NOT_IMPLEMENTED(at::isFloatingType(input.scalar_type()) && input.element_size() >= 2,
                              "\"cross_entropy\" not implemented for '", input.scalar_type(), "'");
  check_same_device(input, "input", target, "target");
  if (!probabilities) check_class_indices(input, target);
  if (weight) {
    check_same_device(input, "input", *weight, "weight");
    TORCH_CHECK(weight->dim() == 1 && weight->sym_size(0) == n_classes(input),
                "weight tensor should be defined either for all ", n_classes(input),
                " classes or no classes but got weight tensor of shape: ", weight->sym_sizes());
    TORCH_CHECK(weight->scalar_type() == input.scalar_type(), "expected scalar type ", input.scalar_type(),
                " for weight but found ", weight->scalar_type());
  }
  if (token_weight) {
    check_same_device(input, "input", *token_weight, "token_weight");
    const auto expected = loss_shape(input);
    TORCH_CHECK(token_weight->sym_sizes() == c10::SymIntArrayRef(expected) ||
                    (!probabilities && token_weight->sym_sizes() == target.sym_sizes()),
                "token_weight must hold one weight for each target, shape ", c10::SymIntArrayRef(expected), ", got ",
                token_weight->sym_sizes());
    TORCH_CHECK(at::isFloatingType(token_weight->scalar_type()), "token_weight must be of a floating dtype, got ",
                token_weight->scalar_type());
  }
}

std::optional<at::ScalarType> promoted_dtype(const Tensor& input, const Tensor& target, const OptionalTensor& weight) {
  if (!target.is_floating_point() || !has_probabilities(input, target)) return std::nullopt;
  at::ScalarType dtype = c10::promoteTypes(input.scalar_type(), target.scalar_type());
  if (weight) dtype = c10::promoteTypes(dtype, weight->scalar_type());
  const bool same =
      dtype == input.scalar_type() && dtype == target.scalar_type() && (!weight || dtype == weight->scalar_type());
  return same ? std::nullopt : std::optional(dtype);
}

}  // namespace charlm
