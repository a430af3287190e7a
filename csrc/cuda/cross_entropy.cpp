// cross_entropy on CUDA: takes tensors apart and launches the kernels. Nothing here waits for the device: what depends
// on the values of targets, weights or the gradient of the loss is computed where they are.
#include "kernels/cross_entropy.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/sum.h>
#include <ATen/ops/zeros.h>

#include <type_traits>

#include "../cross_entropy_ops.h"
#include "device.h"

namespace charlm::cuda {
namespace {

// A call's tensors, in the dtypes and strides that the kernels read, and the pointers to them (../cross_entropy_ops.h).
template <class T>
class Call {
  using C = Compute<T>;

 public:
  Tensor logits;  // [N, V]

  Call(const CrossEntropyOptions& options, const Tensor& input, const Tensor& target, const OptionalTensor& weight,
       const OptionalTensor& token_weight)
      : Call(options, input, target, weight, token_weight, target, 0) {}

  Call(const CrossEntropyOptions& options, const Tensor& input, const Tensor& target, const OptionalTensor& weight,
       const OptionalTensor& token_weight, const Tensor& whole_target, int64_t first_row)
      : device_(input.device()), reduced_(!options.is(Reduction::kNone)) {
    logits = as_rows(input);
    rows_.n_rows = logits.size(0);
    rows_.n_classes = logits.size(1);
    rows_.logits = const_data<T>(logits);
    rows_.logits_stride = logits.stride(0);
    rows_.ignore_index = options.ignore_index;
    rows_.label_smoothing = static_cast<C>(std::max(0.0, options.label_smoothing));
    rows_.lse_square_scale = static_cast<C>(options.lse_square_scale);
    rows_.logit_scale = static_cast<C>(options.logit_scale);
    rows_.softcap = softcap_as<C>(options.softcap);
    rows_.mean = options.is(Reduction::kMean);
    rows_.zero_if_all_ignored = options.zero_if_all_ignored;
    if (has_probabilities(input, target)) {
      target_ = as_rows(target.to(input.scalar_type()));
      rows_.probabilities = const_data<T>(target_);
      rows_.probabilities_stride = target_.stride(0);
    } else {
      target_ = target.contiguous();
      rows_.has_target = true;
      rows_.target = device_.indices(whole_target, target_, rows_.n_classes, IndexKind::kTarget, first_row);
      // A uint64 target of 2^63 or more is negative as int64_t, but is never ignore_index.
      rows_.may_ignore = target.scalar_type() != at::kUInt64 || rows_.ignore_index >= 0;
    }
    if (weight) {
      weight_ = weight->to(compute_dtype(input)).contiguous();
      rows_.weight = const_data<C>(weight_);
      // Without smoothing, which multiplies it, the sum is left out: it might be infinite.
      weight_sum_ = rows_.label_smoothing > 0 ? weight_.sum(at::kDouble).to(weight_.scalar_type())
                                              : at::zeros({}, weight_.options());
      rows_.weight_sum = const_data<C>(weight_sum_);
    }
    if (token_weight) {
      token_weight_ = token_weight->to(compute_dtype(input)).contiguous();
      rows_.token_weight = const_data<C>(token_weight_);
    }
  }

  static Tensor new_grad(int64_t n_rows, int64_t n_classes, const at::TensorOptions& options) {
    return at::empty({n_rows, n_classes}, options);
  }

  void set_normalizer(C* row_max, C* row_sum, C* row_dense_sum) {
    rows_.row_max = row_max;
    rows_.row_sum = row_sum;
    rows_.row_dense_sum = row_dense_sum;
  }

  void set_grad_loss(const C* grad_loss, int64_t stride) {
    rows_.grad_loss = grad_loss;
    rows_.grad_loss_stride = stride;
  }

  void set_grad(const Tensor& grad) {  // [N, V]
    rows_.grad = mutable_data<T>(grad);
    rows_.grad_stride = grad.stride(0);
  }

  void forward(const Tensor& loss) {
    if (reduced_) {
      rows_.reduced_loss = mutable_data<T>(loss);
      run(&cross_entropy_forward<T>);
    } else if (std::is_same_v<T, C>) {
      block(loss);
    } else {
      const Tensor losses = at::empty(loss.sizes(), loss.options().dtype(at::kFloat));
      block(losses);
      loss.copy_(losses);
    }
  }

  void forward_backward(const Tensor& loss) {
    rows_.reduced_loss = mutable_data<T>(loss);
    run(&cross_entropy_forward_backward<T>);
  }

  void block(const Tensor& losses) {
    rows_.loss = mutable_data<C>(losses);
    run(rows_.grad ? &cross_entropy_forward_backward<T> : &cross_entropy_forward<T>);
  }

  void backward() { run(&cross_entropy_backward<T>); }
  void target_backward() { run(&cross_entropy_target_backward<T>); }

  void rescale() {
    rows_.keep_if_one = true;
    backward();
  }

  void metrics(C* lse, C* entropy, int64_t* predicted_tokens) {
    device_.check(cross_entropy_metrics<T>(rows_, {lse, entropy, predicted_tokens}, device_.stream()));
  }

  static bool scale_exactly(const Tensor&, const Tensor&) { return false; }

 private:
  void run(int (*kernels)(const CrossEntropyRows<T>&, const CrossEntropyLaunch&)) {
    const Tensor workspace =
        at::empty({cross_entropy_workspace<T>(rows_.n_rows, rows_.n_classes)}, logits.options().dtype(at::kByte));
    device_.check(kernels(rows_, {workspace.mutable_data_ptr(), device_.max_shared_bytes(), device_.stream()}));
  }

  DeviceCall device_;
  bool reduced_;
  CrossEntropyRows<T> rows_;
  Tensor target_, weight_, weight_sum_, token_weight_;
};

void scale_grad_(Tensor& grad, const Tensor& factor) {
  TORCH_CHECK(factor.numel() == 1 && factor.device() == grad.device(),
              "factor must be one number on the gradient's device, got shape ", factor.sizes(), " on ",
              factor.device());
  const Tensor rows = as_rows(grad);
  if (!rows.is_alias_of(grad)) {
    grad.mul_(factor);
    return;
  }
  const DeviceCall device(grad.device());
  with_float_type(grad.scalar_type(), "cross_entropy_scale_grad_", [&]<class T>() {
    const Tensor by = factor.to(compute_dtype(grad));
    device.check(cross_entropy_scale_grad(mutable_data<T>(rows), rows.size(0), rows.size(1), rows.stride(0),
                                          const_data<Compute<T>>(by), device.stream()));
  });
}

}  // namespace

TORCH_LIBRARY_IMPL(charlm, CHARLM_CUDA_KEY, m) {
  CrossEntropyOps<Call>::register_in(m);
  m.impl("cross_entropy_scale_grad_", &scale_grad_);
}

}  // namespace charlm::cuda
