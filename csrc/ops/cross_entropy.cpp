// cross_entropy: schemas, checks, shapes, and the implementation for every device. Autograd is in
// ops/cross_entropy_autograd.cpp and ops/cross_entropy_inplace.cpp.
#include <ATen/TensorOperators.h>
#include <ATen/ops/empty.h>
#include <ATen/record_function.h>

#include <array>
#include <cmath>
#include <limits>

#include "core/checks.h"
#include "core/device.h"
#include "ops/cross_entropy_call.h"

namespace charlm {
namespace {

// ---------------------------------------------------------------------------------------------------------- checks

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

// A finite factor that becomes infinite in the compute type would turn a logit of 0 into NaN.
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
  TORCH_CHECK_VALUE(
      loss_dtype_of(options, input) == input.scalar_type() || loss_dtype_of(options, input) == compute_dtype(input),
      "loss_dtype must be the dtype of the logits, ", input.scalar_type(), ", or that of the arithmetic, ",
      compute_dtype(input), ", got ", loss_dtype_of(options, input));
  check_factor(input, options.lse_square_scale, "lse_square_scale");
  const bool probabilities = has_probabilities(input, target);
  if (probabilities) check_probabilities(options, target);
  TORCH_CHECK_INDEX(input.dim() > 0, "cross_entropy needs logits with a class dimension, got a 0-d input");
  check_float_dtype(input, "cross_entropy");
  check_same_device(input, "input", target, "target");
  if (!probabilities) check_class_indices(input, target);
  if (weight) {
    check_same_device(input, "input", *weight, "weight");
    TORCH_CHECK(weight->dim() == 1 && weight->sym_size(0) == n_classes(input),
                "weight tensor should be defined either for all ", n_classes(input),
                " classes or no classes but got weight tensor of shape: ", weight->sym_sizes());
    TORCH_CHECK(weight->scalar_type() == input.scalar_type() || weight->scalar_type() == compute_dtype(input),
                "expected scalar type ", input.scalar_type(), " for weight but found ", weight->scalar_type());
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

namespace {

int64_t state_size(const Tensor& input, const Tensor& target) { return has_probabilities(input, target) ? 3 : 2; }

// Rows [N, V] in the shape of the logits that they belong to.
Tensor in_shape_of(const Tensor& rows, const Tensor& input) {
  if (input.dim() == 2) return rows;
  if (input.dim() == 1) return rows.view(input.sizes());
  at::DimVector shape(input.sizes().begin(), input.sizes().end());
  shape.erase(shape.begin() + 1);
  shape.push_back(input.size(1));
  return rows.view(shape).movedim(-1, 1);
}

// --------------------------------------------------------------------------------------------------- implementation

template <class T>
using Call = CrossEntropyCall<T>;

template <class T>
LossAndState new_results(const CrossEntropyOptions& options, const Tensor& input, const Tensor& target, Call<T>& call) {
  const auto shape = options.is(Reduction::kNone) ? loss_shape(input) : c10::SymDimVector{};
  const Tensor loss = at::empty_symint(shape, input.options().dtype(loss_dtype_of(options, input)));
  const Tensor state =
      at::empty({state_size(input, target), call.logits.size(0)}, input.options().dtype(compute_dtype(input)));
  call.set_state(state);
  return {loss, state};
}

// The loss, and into `grad` [N, V] the gradient of the logits for a unit grad_loss.
template <class T>
LossAndState forward_backward(const CrossEntropyOptions& options, const Tensor& input, const Tensor& target,
                              Call<T>& call, const Tensor& grad) {
  TORCH_CHECK_VALUE(
      !options.is(Reduction::kNone),
      "the gradient is made together with the loss, as for inplace=\"forward\", for reduction \"mean\" or "
      "\"sum\" only: with \"none\" it is not yet known");
  LossAndState result = new_results(options, input, target, call);
  call.set_gradient(grad, nullptr, false);
  call.forward(std::get<0>(result));
  return result;
}

// Writes `grad` [N, V] with one of the call's functions.
template <class T>
void backward(const CrossEntropyOptions& options, const Tensor& given_grad_loss, const Tensor& input,
              const Tensor& target, const Tensor& state, Call<T>& call, const Tensor& grad, void (Call<T>::*write)()) {
  const int64_t n_rows = call.logits.size(0);
  check_state(state, state_size(input, target), n_rows, input, "cross_entropy");
  const bool none = options.is(Reduction::kNone);
  TORCH_CHECK(given_grad_loss.numel() == (none ? n_rows : 1) && given_grad_loss.device() == input.device(),
              "grad_loss must have the shape and device of the loss, got ", given_grad_loss.sizes(), " on ",
              given_grad_loss.device());
  const Compute<T>* grad_loss = nullptr;
  const T* unconverted = nullptr;
  const Tensor keep_alive = call.device().template gradient<T>(given_grad_loss, grad_loss, unconverted);
  call.set_state(state);
  call.set_gradient(grad, grad_loss, none, unconverted);
  (call.*write)();
}

MetricGradients metric_gradients(const Tensor& input, const OptionalTensor& grad_lse,
                                 const OptionalTensor& grad_entropy, const OptionalTensor& entropy) {
  TORCH_CHECK(!grad_entropy || entropy, "grad_entropy needs entropy");
  const auto of_rows = [&](const OptionalTensor& t) {
    return t ? metric_of_rows(*t, input, loss_shape(input)) : Tensor();
  };
  return {of_rows(grad_lse), of_rows(grad_entropy), of_rows(entropy)};
}

// Where the rows could not be a view of the logits' memory.
void write_back(Tensor& input, const Tensor& rows) {
  if (!rows.is_alias_of(input)) input.copy_(in_shape_of(rows, input));
}

}  // namespace

LossAndState cross_entropy_forward(const CrossEntropyOptions& options, const Tensor& input, const Tensor& target,
                                   const OptionalTensor& weight, const OptionalTensor& token_weight) {
  if (const auto dtype = promoted_dtype(input, target, weight)) {  // in inference mode autograd has not done it
    return cross_entropy_forward(options, input.to(*dtype), target.to(*dtype), to(weight, *dtype), token_weight);
  }
  check_cross_entropy(options, input, target, weight, token_weight);
  return with_float_type(input.scalar_type(), "cross_entropy", [&]<class T>() {
    Call<T> call(options, input, target, weight, token_weight);
    LossAndState result = new_results(options, input, target, call);
    call.forward(std::get<0>(result));
    return result;
  });
}

LossStateGrad cross_entropy_forward_backward(const CrossEntropyOptions& options, const Tensor& input,
                                             const Tensor& target, const OptionalTensor& weight,
                                             const OptionalTensor& token_weight) {
  check_cross_entropy(options, input, target, weight, token_weight);
  return with_float_type(input.scalar_type(), "cross_entropy", [&]<class T>() {
    Call<T> call(options, input, target, weight, token_weight);
    const Tensor grad = call.new_gradient();
    auto [loss, state] = forward_backward(options, input, target, call, grad);
    return std::make_tuple(loss, state, in_shape_of(grad, input));
  });
}

LossAndState cross_entropy_forward_backward_(const CrossEntropyOptions& options, Tensor& input, const Tensor& target,
                                             const OptionalTensor& weight, const OptionalTensor& token_weight) {
  check_cross_entropy(options, input, target, weight, token_weight);
  return with_float_type(input.scalar_type(), "cross_entropy", [&]<class T>() {
    Call<T> call(options, input, target, weight, token_weight);
    LossAndState result = forward_backward(options, input, target, call, call.logits);
    write_back(input, call.logits);
    return result;
  });
}

void cross_entropy_backward_(const CrossEntropyOptions& options, Tensor& input, const Tensor& grad_loss,
                             const Tensor& target, const OptionalTensor& weight, const OptionalTensor& token_weight,
                             const Tensor& state, const OptionalTensor& grad_lse, const OptionalTensor& grad_entropy,
                             const OptionalTensor& entropy) {
  check_cross_entropy(options, input, target, weight, token_weight);
  with_float_type(input.scalar_type(), "cross_entropy_backward_", [&]<class T>() {
    Call<T> call(options, input, target, weight, token_weight);
    const MetricGradients metric_grads = metric_gradients(input, grad_lse, grad_entropy, entropy);
    call.add_metric_gradients(metric_grads, 0);
    backward(options, grad_loss, input, target, state, call, call.logits, &Call<T>::backward);
    write_back(input, call.logits);
  });
}

void cross_entropy_rescale_(const CrossEntropyOptions& options, Tensor& grad, const Tensor& grad_loss,
                            const Tensor& input, const Tensor& target, const OptionalTensor& weight,
                            const OptionalTensor& token_weight, const Tensor& state) {
  if (!Device(input).is_gpu()) {
    // Multiplying by a power of two does not round a normal number.
    int exponent = 0;
    const double scale = grad_loss.item<double>();
    if (scale == 1) return;
    if (std::abs(std::frexp(scale, &exponent)) == 0.5) {
      grad.mul_(scale);
      return;
    }
  }
  with_float_type(input.scalar_type(), "cross_entropy_rescale_", [&]<class T>() {
    Call<T> call(options, input, target, weight, token_weight);
    const Tensor rows = as_rows(grad);
    TORCH_CHECK(grad.sizes() == input.sizes() && rows.is_alias_of(grad),
                "grad must be the one that forward computed, got shape ", grad.sizes());
    backward(options, grad_loss, input, target, state, call, rows, &Call<T>::rescale);
  });
}

void scale_gradient_(Tensor& grad, const Tensor& factor) {
  const Device device(grad);
  const Tensor rows = as_rows(grad);
  if (!device.is_gpu()) {
    if (factor.item<double>() != 1) grad.mul_(factor);
  } else if (!rows.is_alias_of(grad)) {
    grad.mul_(factor);
  } else {
    with_float_type(grad.scalar_type(), "scale_gradient_", [&]<class T>() {
      ScaleParams<T> params{rows.size(0), rows.size(1), mutable_data<T>(rows), rows.stride(0)};
      const Tensor by = device.gradient<T>(factor, params.factor, params.unconverted_factor);
      device.run_on_gpu(device.kernels<T>().cross_entropy.scale, params);
    });
  }
}

Tensor cross_entropy_of_rows_(const CrossEntropyOptions& given, Tensor& logits, const Tensor& target,
                              const OptionalTensor& weight, const OptionalTensor& token_weight,
                              const OptionalTensor& grad_loss, const MetricGradients& metric_grads, int64_t first_row) {
  RECORD_FUNCTION("charlm::cross_entropy_of_rows_", std::vector<c10::IValue>{});
  CrossEntropyOptions options = given;
  options.reduction = static_cast<int64_t>(Reduction::kSum);
  const int64_t n = logits.size(0);
  const auto of_block = [&](const Tensor& t) { return t.narrow(0, first_row, n); };
  return with_float_type(logits.scalar_type(), "cross_entropy_of_rows_", [&]<class T>() {
    const auto compute = logits.options().dtype(compute_dtype(logits));
    const Tensor losses = at::empty({n}, compute), state = at::empty({3, n}, compute);
    Call<T> call(options, logits, of_block(target), weight,
                 token_weight ? OptionalTensor(of_block(*token_weight)) : std::nullopt, target, first_row);
    call.set_state(state);
    const auto set_gradient = [&] {
      const bool one_for_each_row = grad_loss->dim() == 1;
      call.set_gradient(logits, const_data<Compute<T>>(*grad_loss) + (one_for_each_row ? first_row : 0),
                        one_for_each_row);
    };
    if (metric_grads.is_any()) {
      call.forward_rows(losses);
      const Tensor unused = at::empty({2, n}, compute);
      call.metrics(unused[0], unused[1], at::empty({n}, compute.dtype(at::kLong)));
      set_gradient();
      call.add_metric_gradients(metric_grads, first_row);
      call.backward();
    } else {
      if (grad_loss) set_gradient();
      call.forward_rows(losses);
    }
    return losses;
  });
}

namespace {

// The metrics have no loss whose dtype would matter.
void check_metrics(CrossEntropyOptions options, const Tensor& input, const Tensor& target) {
  options.loss_dtype = std::nullopt;
  check_cross_entropy(options, input, target, {}, {});
}

template <class T>
CrossEntropyMetrics metrics_of(const CrossEntropyOptions& options, const Tensor& input, const Tensor& target,
                               Call<T>& call) {
  TORCH_CHECK_INDEX(call.logits.size(1) > 0 || call.logits.size(0) == 0, "cannot predict one of 0 classes");
  const auto shape = loss_shape(input);
  const auto compute = input.options().dtype(compute_dtype(input));
  CrossEntropyMetrics m;
  m.lse = at::empty_symint(shape, compute);
  m.entropy = at::empty_symint(shape, compute);
  m.predicted_tokens = at::empty_symint(shape, input.options().dtype(at::kLong));
  call.metrics(m.lse, m.entropy, m.predicted_tokens);
  const bool probabilities = has_probabilities(input, target);
  const Tensor expected = (probabilities ? target.argmax(class_dim(input)) : target.to(at::kLong)).view_symint(shape);
  m.counted = probabilities ? expected.eq(expected) : expected.ne(options.ignore_index);
  m.is_correct = m.predicted_tokens.eq(expected).logical_and(m.counted).to(at::kFloat);
  return m;
}

}  // namespace

Tensor metric_of_rows(const Tensor& metric, const Tensor& input, c10::SymIntArrayRef shape) {
  TORCH_CHECK(metric.sym_sizes() == shape && metric.device() == input.device(),
              "lse, entropy and their gradients must have shape ", shape, " on ", input.device(), ", got ",
              metric.sym_sizes(), " on ", metric.device());
  return metric.to(compute_dtype(input)).contiguous().view({-1});
}

Tensor token_accuracy(const CrossEntropyOptions& options, const Tensor& is_correct, const Tensor& counted) {
  if (options.is(Reduction::kNone)) return is_correct;
  const Tensor n = counted.sum();
  return is_correct.sum().div(options.zero_if_all_ignored ? n.clamp_min(1) : n);
}

CrossEntropyMetrics cross_entropy_metrics_of_rows(const CrossEntropyOptions& options, const Tensor& input,
                                                  const Tensor& target) {
  check_metrics(options, input, target);
  return with_float_type(input.scalar_type(), "cross_entropy_metrics", [&]<class T>() {
    Call<T> call(options, input, target, {}, {});
    return metrics_of(options, input, target, call);
  });
}

namespace {

LossStateAndMetrics with_metrics(const CrossEntropyOptions& options, const Tensor& input, const Tensor& target,
                                 const OptionalTensor& weight, const OptionalTensor& token_weight) {
  if (const auto dtype = promoted_dtype(input, target, weight)) {
    return with_metrics(options, input.to(*dtype), target.to(*dtype), to(weight, *dtype), token_weight);
  }
  check_cross_entropy(options, input, target, weight, token_weight);
  return with_float_type(input.scalar_type(), "cross_entropy", [&]<class T>() {
    Call<T> call(options, input, target, weight, token_weight);
    const auto [loss, state] = new_results(options, input, target, call);
    call.forward(loss);
    const CrossEntropyMetrics m = metrics_of(options, input, target, call);
    return LossStateAndMetrics{
        loss, state, m.lse, m.entropy, m.predicted_tokens, token_accuracy(options, m.is_correct, m.counted)};
  });
}

CrossEntropyMetricsTuple metrics(const CrossEntropyOptions& options, const Tensor& input, const Tensor& target) {
  const CrossEntropyMetrics m = cross_entropy_metrics_of_rows(options, input, target);
  return {m.lse, m.entropy, m.predicted_tokens, token_accuracy(options, m.is_correct, m.counted)};
}

// Backward will overwrite the logits: forward does not.
LossAndState forward_keeping_logits(const CrossEntropyOptions& options, Tensor& input, const Tensor& target,
                                    const OptionalTensor& weight, const OptionalTensor& token_weight) {
  return cross_entropy_forward(options, input, target, weight, token_weight);
}

using Gradients = std::tuple<Tensor, Tensor>;  // of the logits, of class probabilities

Gradients gradients(const CrossEntropyOptions& options, const Tensor& grad_loss, const Tensor& input,
                    const Tensor& target, const OptionalTensor& weight, const OptionalTensor& token_weight,
                    const Tensor& state, const OptionalTensor& grad_lse, const OptionalTensor& grad_entropy,
                    const OptionalTensor& entropy, std::array<bool, 2> output_mask) {
  check_cross_entropy(options, input, target, weight, token_weight);
  TORCH_CHECK(!output_mask[1] || has_probabilities(input, target),
              "only class probabilities have a gradient, got a target of shape ", target.sizes(),
              " for logits of shape ", input.sizes());
  return with_float_type(input.scalar_type(), "cross_entropy_backward", [&]<class T>() {
    Call<T> call(options, input, target, weight, token_weight);
    const MetricGradients metric_grads = metric_gradients(input, grad_lse, grad_entropy, entropy);
    call.add_metric_gradients(metric_grads, 0);
    const auto gradient = [&](bool is_needed, void (Call<T>::*write)()) {
      if (!is_needed) return Tensor();
      const Tensor grad = call.new_gradient();
      backward(options, grad_loss, input, target, state, call, grad, write);
      return in_shape_of(grad, input);
    };
    const Tensor of_input = gradient(output_mask[0], &Call<T>::backward);
    return Gradients{of_input, gradient(output_mask[1], &Call<T>::target_backward)};
  });
}

// ----------------------------------------------------------------------------------------------------------- shapes

LossAndState meta_forward(const CrossEntropyOptions& options, const Tensor& input, const Tensor& target,
                          const OptionalTensor& weight, const OptionalTensor& token_weight) {
  if (const auto dtype = promoted_dtype(input, target, weight)) {
    return meta_forward(options, input.to(*dtype), target.to(*dtype), to(weight, *dtype), token_weight);
  }
  check_cross_entropy(options, input, target, weight, token_weight);
  const auto rows = loss_shape(input);
  return {at::empty_symint(options.is(Reduction::kNone) ? rows : c10::SymDimVector{},
                           input.options().dtype(loss_dtype_of(options, input))),
          at::empty_symint({state_size(input, target), c10::multiply_integers(rows)},
                           input.options().dtype(compute_dtype(input)))};
}

LossAndState meta_inplace(const CrossEntropyOptions& options, Tensor& input, const Tensor& target,
                          const OptionalTensor& weight, const OptionalTensor& token_weight) {
  return meta_forward(options, input, target, weight, token_weight);
}

// Rows of classes, as the kernels write them, in the shape of `input`.
Tensor empty_like_rows(const Tensor& input) {
  if (input.dim() <= 2) return at::empty_symint(input.sym_sizes(), input.options());
  auto shape = loss_shape(input);
  shape.push_back(n_classes(input));
  return at::empty_symint(shape, input.options()).movedim(-1, 1);
}

Gradients meta_gradients(const CrossEntropyOptions&, const Tensor&, const Tensor& input, const Tensor&,
                         const OptionalTensor&, const OptionalTensor&, const Tensor&, const OptionalTensor&,
                         const OptionalTensor&, const OptionalTensor&, std::array<bool, 2> output_mask) {
  return {output_mask[0] ? empty_like_rows(input) : Tensor(), output_mask[1] ? empty_like_rows(input) : Tensor()};
}

void meta_backward_(const CrossEntropyOptions&, Tensor&, const Tensor&, const Tensor&, const OptionalTensor&,
                    const OptionalTensor&, const Tensor&, const OptionalTensor&, const OptionalTensor&,
                    const OptionalTensor&) {}

}  // namespace

CrossEntropyMetricsTuple cross_entropy_metrics_meta(const CrossEntropyOptions& options, const Tensor& input,
                                                    const Tensor& target) {
  check_metrics(options, input, target);
  const auto shape = loss_shape(input);
  const auto compute = input.options().dtype(compute_dtype(input));
  const auto accuracy_shape = options.is(Reduction::kNone) ? shape : c10::SymDimVector{};
  return {at::empty_symint(shape, compute), at::empty_symint(shape, compute),
          at::empty_symint(shape, input.options().dtype(at::kLong)),
          at::empty_symint(accuracy_shape, input.options().dtype(at::kFloat))};
}

namespace {

LossStateAndMetrics meta_with_metrics(const CrossEntropyOptions& options, const Tensor& input, const Tensor& target,
                                      const OptionalTensor& weight, const OptionalTensor& token_weight) {
  if (const auto dtype = promoted_dtype(input, target, weight)) {
    return meta_with_metrics(options, input.to(*dtype), target.to(*dtype), to(weight, *dtype), token_weight);
  }
  return std::tuple_cat(meta_forward(options, input, target, weight, token_weight),
                        cross_entropy_metrics_meta(options, input, target));
}

}  // namespace

#define TARGETS "Tensor target, Tensor? weight, Tensor? token_weight, "
#define OPTIONS                                                                                     \
  "int reduction, int ignore_index, float label_smoothing, float lse_square_scale, float softcap, " \
  "float logit_scale, bool zero_if_all_ignored, ScalarType? loss_dtype=None"

TORCH_LIBRARY_FRAGMENT(charlm, m) {
  m.def("cross_entropy(Tensor input, " TARGETS OPTIONS ") -> (Tensor loss, Tensor state)");
  // The memory of the logits becomes their gradient, in this call or in backward.
  m.def("cross_entropy_inplace_forward(Tensor(a!) input, " TARGETS OPTIONS ") -> (Tensor loss, Tensor state)");
  m.def("cross_entropy_inplace_backward(Tensor(a!) input, " TARGETS OPTIONS ") -> (Tensor loss, Tensor state)");
  m.def("cross_entropy_metrics(Tensor input, Tensor target, " OPTIONS
        ") -> (Tensor lse, Tensor entropy, Tensor predicted_tokens, Tensor token_accuracy)");
  // lse and entropy are differentiable.
  m.def("cross_entropy_with_metrics(Tensor input, " TARGETS OPTIONS
        ") -> (Tensor loss, Tensor state, Tensor lse, Tensor entropy, Tensor predicted_tokens, "
        "Tensor token_accuracy)");
  m.def("_cross_entropy_backward(Tensor grad_loss, Tensor input, " TARGETS
        "Tensor state, Tensor? grad_lse, Tensor? grad_entropy, Tensor? entropy, bool[2] output_mask, " OPTIONS
        ") -> (Tensor, Tensor)");
  m.def("_cross_entropy_backward_(Tensor(a!) input, Tensor grad_loss, " TARGETS
        "Tensor state, Tensor? grad_lse, Tensor? grad_entropy, Tensor? entropy, " OPTIONS ") -> ()");
  implement(m, "cross_entropy", Flat<&cross_entropy_forward>::call);
  implement(m, "cross_entropy_inplace_forward", Flat<&cross_entropy_forward_backward_>::call);
  implement(m, "cross_entropy_inplace_backward", Flat<&forward_keeping_logits>::call);
  implement(m, "cross_entropy_metrics", Flat<&metrics>::call);
  implement(m, "cross_entropy_with_metrics", Flat<&with_metrics>::call);
  implement(m, "_cross_entropy_backward", Flat<&gradients>::call);
  implement(m, "_cross_entropy_backward_", Flat<&cross_entropy_backward_>::call);
}

TORCH_LIBRARY_IMPL(charlm, Meta, m) {
  m.impl("cross_entropy", Flat<&meta_forward>::call);
  m.impl("cross_entropy_inplace_forward", Flat<&meta_inplace>::call);
  m.impl("cross_entropy_inplace_backward", Flat<&meta_inplace>::call);
  m.impl("cross_entropy_metrics", Flat<&cross_entropy_metrics_meta>::call);
  m.impl("cross_entropy_with_metrics", Flat<&meta_with_metrics>::call);
  m.impl("_cross_entropy_backward", Flat<&meta_gradients>::call);
  m.impl("_cross_entropy_backward_", Flat<&meta_backward_>::call);
}

}  // namespace charlm
