// The ops of cross_entropy, for a device that provides Call<T>: one call's tensors as the pointers that its kernels
// take. What is the same for every device stands here: checks, shapes, new tensors.
#pragma once

#include <ATen/TensorOperators.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "adapter.h"
#include "cross_entropy_rows.h"

namespace charlm {

// Call<T>(options, input, target, weight, token_weight), with two more where these are only some rows of a target, the
// whole target and their first row in it, has
//   logits                                             Tensor [N, V], of input
//   new_grad(N, V, tensor options)                     memory for a gradient
//   set_normalizer(row_max, row_sum, row_dense_sum)    C* [N]; the last for class probabilities only
//   set_grad_loss(C*, stride), set_grad(Tensor [N, V])
//   forward(loss), forward_backward(loss)              write the loss, () or one for each row; the normalizer; grad
//   block(losses)                                      C [N]: writes each row's; and grad, if it was set
//   backward(), target_backward()                      write grad
//   rescale()                                          ... which is already that for a grad_loss of 1
//   metrics(lse, entropy, predicted_tokens)            C*, C*, int64_t* [N]
//   scale_exactly(grad, grad_loss)                     false: it cannot, or would have to wait for the value
template <template <class> class Call>
class CrossEntropyOps {
 public:
  static void register_in(torch::Library& m) {
    m.impl("cross_entropy", Flat<&cross_entropy>::call);
    m.impl("cross_entropy_forward_backward", Flat<&cross_entropy_forward_backward>::call);
    m.impl("cross_entropy_inplace_forward", Flat<&cross_entropy_inplace_forward>::call);
    m.impl("cross_entropy_inplace_backward", Flat<&cross_entropy_inplace_backward>::call);
    m.impl("cross_entropy_backward", Flat<&cross_entropy_backward>::call);
    m.impl("cross_entropy_backward_", Flat<&cross_entropy_backward_>::call);
    m.impl("cross_entropy_rescale_", Flat<&cross_entropy_rescale_>::call);
    m.impl("cross_entropy_target_backward", Flat<&cross_entropy_target_backward>::call);
    m.impl("cross_entropy_metrics", Flat<&cross_entropy_metrics>::call);
    m.impl("cross_entropy_block_", Flat<&cross_entropy_block_>::call);
  }

 private:
  static LossAndNormalizer cross_entropy(const CrossEntropyOptions& options, const Tensor& input, const Tensor& target,
                                         const OptionalTensor& weight, const OptionalTensor& token_weight) {
    if (const auto dtype = promoted_dtype(input, target, weight)) {  // in inference mode nobody has done it
      return cross_entropy(options, input.to(*dtype), target.to(*dtype), to(weight, *dtype), token_weight);
    }
    check_cross_entropy(options, input, target, weight, token_weight);
    return with_float_type(input.scalar_type(), "cross_entropy", [&]<class T>() {
      Call<T> call(options, input, target, weight, token_weight);
      LossAndNormalizer result = new_results(options, input, target, call);
      call.forward(std::get<0>(result));
      return result;
    });
  }

  static std::tuple<Tensor, Tensor, Tensor> cross_entropy_forward_backward(const CrossEntropyOptions& options,
                                                                           const Tensor& input, const Tensor& target,
                                                                           const OptionalTensor& weight,
                                                                           const OptionalTensor& token_weight) {
    check_cross_entropy(options, input, target, weight, token_weight);
    return with_float_type(input.scalar_type(), "cross_entropy", [&]<class T>() {
      Call<T> call(options, input, target, weight, token_weight);
      const Tensor grad = new_grad(call);
      auto [loss, normalizer] = forward_backward(options, input, target, call, grad);
      return std::make_tuple(loss, normalizer, in_shape_of(grad, input));
    });
  }

  static LossAndNormalizer cross_entropy_inplace_forward(const CrossEntropyOptions& options, Tensor& input,
                                                         const Tensor& target, const OptionalTensor& weight,
                                                         const OptionalTensor& token_weight) {
    check_cross_entropy(options, input, target, weight, token_weight);
    return with_float_type(input.scalar_type(), "cross_entropy", [&]<class T>() {
      Call<T> call(options, input, target, weight, token_weight);
      LossAndNormalizer result = forward_backward(options, input, target, call, call.logits);
      write_back(input, call.logits);
      return result;
    });
  }

  static LossAndNormalizer cross_entropy_inplace_backward(const CrossEntropyOptions& options, Tensor& input,
                                                          const Tensor& target, const OptionalTensor& weight,
                                                          const OptionalTensor& token_weight) {
    return cross_entropy(options, input, target, weight, token_weight);
  }

  static Tensor cross_entropy_backward(const CrossEntropyOptions& options, const Tensor& grad_loss, const Tensor& input,
                                       const Tensor& target, const OptionalTensor& weight,
                                       const OptionalTensor& token_weight, const Tensor& normalizer) {
    check_cross_entropy(options, input, target, weight, token_weight);
    return with_float_type(input.scalar_type(), "cross_entropy_backward", [&]<class T>() {
      Call<T> call(options, input, target, weight, token_weight);
      const Tensor grad = new_grad(call);
      backward(options, grad_loss, input, target, normalizer, call, grad, &Call<T>::backward);
      return in_shape_of(grad, input);
    });
  }

  static void cross_entropy_backward_(const CrossEntropyOptions& options, Tensor& input, const Tensor& grad_loss,
                                      const Tensor& target, const OptionalTensor& weight,
                                      const OptionalTensor& token_weight, const Tensor& normalizer) {
    check_cross_entropy(options, input, target, weight, token_weight);
    with_float_type(input.scalar_type(), "cross_entropy_backward_", [&]<class T>() {
      Call<T> call(options, input, target, weight, token_weight);
      backward(options, grad_loss, input, target, normalizer, call, call.logits, &Call<T>::backward);
      write_back(input, call.logits);
    });
  }

  // `grad` is that of cross_entropy_forward_backward: it is scaled only where nothing can be rounded twice.
  static void cross_entropy_rescale_(const CrossEntropyOptions& options, Tensor& grad, const Tensor& grad_loss,
                                     const Tensor& input, const Tensor& target, const OptionalTensor& weight,
                                     const OptionalTensor& token_weight, const Tensor& normalizer) {
    check_cross_entropy(options, input, target, weight, token_weight);
    with_float_type(input.scalar_type(), "cross_entropy_rescale_", [&]<class T>() {
      if (Call<T>::scale_exactly(grad, grad_loss)) return;
      Call<T> call(options, input, target, weight, token_weight);
      const Tensor rows = as_rows(grad);
      TORCH_CHECK(grad.sizes() == input.sizes() && rows.is_alias_of(grad),
                  "grad must be the one that cross_entropy_forward_backward returned, got shape ", grad.sizes());
      backward(options, grad_loss, input, target, normalizer, call, rows, &Call<T>::rescale);
    });
  }

  static Tensor cross_entropy_target_backward(const CrossEntropyOptions& options, const Tensor& grad_loss,
                                              const Tensor& input, const Tensor& target, const OptionalTensor& weight,
                                              const OptionalTensor& token_weight, const Tensor& normalizer) {
    check_cross_entropy(options, input, target, weight, token_weight);
    TORCH_CHECK(has_probabilities(input, target), "only class probabilities have a gradient, got a target of shape ",
                target.sizes(), " for logits of shape ", input.sizes());
    return with_float_type(input.scalar_type(), "cross_entropy_target_backward", [&]<class T>() {
      Call<T> call(options, input, target, weight, token_weight);
      const Tensor grad = new_grad(call);
      backward(options, grad_loss, input, target, normalizer, call, grad, &Call<T>::target_backward);
      return in_shape_of(grad, input);
    });
  }

  static std::tuple<Tensor, Tensor, Tensor, Tensor> cross_entropy_metrics(const CrossEntropyOptions& options,
                                                                          const Tensor& input, const Tensor& target) {
    check_cross_entropy(options, input, target, {}, {});
    return with_float_type(input.scalar_type(), "cross_entropy_metrics", [&]<class T>() {
      using C = Compute<T>;
      Call<T> call(options, input, target, {}, {});
      TORCH_CHECK_INDEX(call.logits.size(1) > 0 || call.logits.size(0) == 0, "cannot predict one of 0 classes");
      const auto shape = loss_shape(input);
      const auto compute = input.options().dtype(compute_dtype(input));
      const Tensor lse = at::empty_symint(shape, compute), entropy = at::empty_symint(shape, compute);
      const Tensor predicted = at::empty_symint(shape, input.options().dtype(at::kLong));
      call.metrics(mutable_data<C>(lse), mutable_data<C>(entropy), mutable_data<int64_t>(predicted));

      const bool probabilities = has_probabilities(input, target);
      const Tensor wanted = (probabilities ? target.argmax(class_dim(input)) : target.to(at::kLong)).view_symint(shape);
      const Tensor counted = probabilities ? wanted.eq(wanted) : wanted.ne(options.ignore_index);
      const Tensor right = predicted.eq(wanted).logical_and(counted).to(at::kFloat);
      if (options.is(Reduction::kNone)) return std::make_tuple(lse, entropy, predicted, right);
      const Tensor n_counted = counted.sum();
      const Tensor divisor = options.zero_if_all_ignored ? n_counted.clamp_min(1) : n_counted;
      return std::make_tuple(lse, entropy, predicted, right.sum().div(divisor));
    });
  }

  // What linear_cross_entropy makes of a block of logits [n, V], rows [first_row, first_row + n) of a target [N]. It
  // has checked shapes and dtypes; the reduction is its own.
  static Tensor cross_entropy_block_(const CrossEntropyOptions& given, Tensor& logits, const Tensor& target,
                                     const OptionalTensor& weight, const OptionalTensor& token_weight,
                                     const OptionalTensor& grad_loss, int64_t first_row) {
    CrossEntropyOptions options = given;
    options.reduction = static_cast<int64_t>(Reduction::kSum);
    const int64_t n = logits.size(0);
    TORCH_CHECK(logits.dim() == 2 && as_rows(logits).is_same(logits), "logits must be rows, got strides ",
                logits.strides());
    const auto of_block = [&](const Tensor& t) { return t.narrow(0, first_row, n); };
    return with_float_type(logits.scalar_type(), "cross_entropy_block_", [&]<class T>() {
      const auto compute = logits.options().dtype(compute_dtype(logits));
      const Tensor losses = at::empty({n}, compute), normalizer = at::empty({3, n}, compute);
      Call<T> call(options, logits, of_block(target), weight,
                   token_weight ? OptionalTensor(of_block(*token_weight)) : std::nullopt, target, first_row);
      set_normalizer(call, normalizer);
      if (grad_loss) {
        const bool one_for_all = grad_loss->dim() == 0;
        TORCH_CHECK(grad_loss->scalar_type() == compute_dtype(logits) && grad_loss->is_contiguous() &&
                        (one_for_all || grad_loss->size(0) == target.size(0)),
                    "grad_loss must be one number, or one for each target, in the losses' dtype");
        call.set_grad_loss(const_data<Compute<T>>(*grad_loss) + (one_for_all ? 0 : first_row), one_for_all ? 0 : 1);
        call.set_grad(logits);
      }
      call.block(losses);
      return losses;
    });
  }

  template <class T>
  static Tensor new_grad(const Call<T>& call) {
    return Call<T>::new_grad(call.logits.size(0), call.logits.size(1), call.logits.options());
  }

  template <class T>
  static void set_normalizer(Call<T>& call, const Tensor& normalizer) {
    auto* const data = static_cast<Compute<T>*>(const_cast<void*>(normalizer.const_data_ptr()));
    const int64_t n = normalizer.size(1);
    call.set_normalizer(data, data + n, normalizer.size(0) == 3 ? data + 2 * n : nullptr);
  }

  template <class T>
  static LossAndNormalizer new_results(const CrossEntropyOptions& options, const Tensor& input, const Tensor& target,
                                       Call<T>& call) {
    const auto shape = options.is(Reduction::kNone) ? loss_shape(input) : c10::SymDimVector{};
    const Tensor loss = at::empty_symint(shape, input.options());
    const Tensor normalizer =
        at::empty({normalizer_size(input, target), call.logits.size(0)}, input.options().dtype(compute_dtype(input)));
    set_normalizer(call, normalizer);
    return {loss, normalizer};
  }

  // The loss, and the gradient of the logits for a gradient of the loss of 1: into `grad` [N, V].
  template <class T>
  static LossAndNormalizer forward_backward(const CrossEntropyOptions& options, const Tensor& input,
                                            const Tensor& target, Call<T>& call, const Tensor& grad) {
    TORCH_CHECK_VALUE(
        !options.is(Reduction::kNone),
        "the gradient is made together with the loss, as for inplace=\"forward\", for reduction \"mean\" or "
        "\"sum\" only: with \"none\" it is not yet known");
    LossAndNormalizer result = new_results(options, input, target, call);
    call.set_grad(grad);
    call.forward_backward(std::get<0>(result));
    return result;
  }

  // Writes `grad` [N, V] with one of the call's functions.
  template <class T>
  static void backward(const CrossEntropyOptions& options, const Tensor& given_grad_loss, const Tensor& input,
                       const Tensor& target, const Tensor& normalizer, Call<T>& call, const Tensor& grad,
                       void (Call<T>::*write)()) {
    const int64_t n_rows = call.logits.size(0);
    TORCH_CHECK(normalizer.dim() == 2 && normalizer.size(0) == normalizer_size(input, target) &&
                    normalizer.size(1) == n_rows && normalizer.is_contiguous() &&
                    normalizer.scalar_type() == compute_dtype(input) && normalizer.device() == input.device(),
                "normalizer must be the one that cross_entropy returned, got shape ", normalizer.sizes());
    const bool none = options.is(Reduction::kNone);
    TORCH_CHECK(given_grad_loss.numel() == (none ? n_rows : 1) && given_grad_loss.device() == input.device(),
                "grad_loss must have the shape and device of the loss, got ", given_grad_loss.sizes(), " on ",
                given_grad_loss.device());
    const Tensor grad_loss = given_grad_loss.to(compute_dtype(input)).contiguous();
    set_normalizer(call, normalizer);
    call.set_grad_loss(const_data<Compute<T>>(grad_loss), none ? 1 : 0);
    call.set_grad(grad);
    (call.*write)();
  }

  // Where the rows could not be a view of the logits' memory.
  static void write_back(Tensor& input, const Tensor& rows) {
    if (!rows.is_alias_of(input)) input.copy_(in_shape_of(rows, input));
  }
};

}  // namespace charlm
