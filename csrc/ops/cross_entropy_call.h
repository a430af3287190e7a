// One call of cross_entropy's kernels, on any device: their parameters, and the tensors that these point to.
#pragma once

#include <ATen/ops/empty.h>
#include <ATen/ops/sum.h>
#include <ATen/ops/zeros.h>

#include <atomic>
#include <cmath>
#include <type_traits>

#include "core/checks.h"
#include "core/device.h"
#include "ops/cross_entropy_op.h"

namespace charlm {

// Logits, probabilities or their gradients as [N, V] with a stride of 1 along the classes: a view where possible.
inline Tensor as_rows(const Tensor& t) {
  if (t.dim() == 2 && t.stride(1) == 1) return t;
  if (t.dim() == 1) return t.unsqueeze(0).contiguous();
  return last_dim_as_rows(t.dim() == 2 ? t : t.movedim(1, -1));
}

template <class T>
T rounded(double x) {
  if constexpr (std::is_same_v<T, BFloat16>) {
    return {c10::BFloat16(static_cast<float>(x)).x};
  } else if constexpr (std::is_same_v<T, Float16>) {
    return {c10::Half(static_cast<float>(x)).x};
  } else {
    return static_cast<T>(x);
  }
}

// One call: its tensors in the dtypes and strides that kernels read, and the parameters that point to them. On the CPU
// the values of the targets are checked before anything is written, and the mean's divisor is computed here. On a GPU
// nothing waits for the device: kernels check the targets and compute the divisor.
template <class T>
class CrossEntropyCall {
  using C = Compute<T>;
  using Params = CrossEntropyParams<T>;

 public:
  const Tensor logits;  // [N, V]

  CrossEntropyCall(const CrossEntropyOptions& options, const Tensor& input, const Tensor& target,
                   const OptionalTensor& weight, const OptionalTensor& token_weight)
      : CrossEntropyCall(options, input, target, weight, token_weight, target, 0) {}

  // `target` and `token_weight` are the rows of `whole_target` from `first_row` on.
  CrossEntropyCall(const CrossEntropyOptions& options, const Tensor& input, const Tensor& target,
                   const OptionalTensor& weight, const OptionalTensor& token_weight, const Tensor& whole_target,
                   int64_t first_row)
      : logits(as_rows(input)), options_(options), device_(input), kernels_(device_.kernels<T>().cross_entropy) {
    p_.n_rows = logits.size(0);
    p_.n_classes = logits.size(1);
    p_.logits = const_data<T>(logits);
    p_.logits_stride = logits.stride(0);
    p_.ignore_index = options.ignore_index;
    p_.label_smoothing = static_cast<C>(std::max(0.0, options.label_smoothing));
    p_.lse_square_scale = static_cast<C>(options.lse_square_scale);
    p_.logit_scale = static_cast<C>(options.logit_scale);
    p_.softcap = softcap_as<C>(options.softcap);
    p_.mean = options.is(Reduction::kMean);
    p_.zero_if_all_ignored = options.zero_if_all_ignored;
    p_.has_class_indices = !has_probabilities(input, target);
    // A uint64 target of 2^63 or more is negative as int64, but is never ignore_index.
    p_.may_ignore = whole_target.scalar_type() != at::kUInt64 || p_.ignore_index >= 0;
    if (!p_.has_class_indices) {
      target_ = as_rows(target.to(input.scalar_type()));
      p_.probabilities = const_data<T>(target_);
      p_.probabilities_stride = target_.stride(0);
    } else if (device_.is_gpu()) {
      target_ = target.contiguous();
      p_.target = device_.gpu_indices(whole_target, target_, p_.n_classes, IndexKind::kTarget, first_row);
    } else {
      target_ = target.to(at::kLong).contiguous();
      p_.target.data = target_.const_data_ptr();
    }
    if (weight) set_weight(*weight);
    if (token_weight) {
      token_weight_ = token_weight->to(compute_dtype(logits)).contiguous();
      p_.token_weight = const_data<C>(token_weight_);
    }
    if (!device_.is_gpu()) count_targets(whole_target, first_row);
  }

  void set_state(const Tensor& state) {
    p_.row_max = state_row<C>(state, 0);
    p_.row_sum = state_row<C>(state, 1);
    p_.row_dense_sum = p_.has_class_indices ? nullptr : state_row<C>(state, 2);
  }

  // Instead of the caller's ignore_index.
  void ignore_only(int64_t target) {
    p_.ignore_index = target;
    p_.may_ignore = true;
  }

  // GPU: targets from `limit` on are no classes, in place of those from V on.
  void set_target_limit(int64_t limit) { p_.target.against.limit = limit; }

  const Device& device() const { return device_; }

  Tensor new_gradient() const { return device_.empty(logits.sizes(), logits.options()); }

  // `grad` [N, V] is written by the next kernel; `grad_loss`: [] or [N], null for 1; `unconverted`: in place of it.
  void set_gradient(const Tensor& grad, const C* grad_loss, bool one_for_each_row, const T* unconverted = nullptr) {
    static const C kOne = 1;
    p_.grad = mutable_data<T>(grad);
    p_.grad_stride = grad.stride(0);
    p_.grad_loss = grad_loss || device_.is_gpu() ? grad_loss : &kOne;
    p_.unconverted_grad_loss = unconverted;
    p_.grad_loss_stride = one_for_each_row ? 1 : 0;
    p_.grad_scale = 1 / divisor_;
  }

  // The next backward adds these to the gradient of the loss.
  void add_metric_gradients(const MetricGradients& grads, int64_t first_row) {
    const auto rows_of = [&](const Tensor& t) { return t.defined() ? mutable_data<C>(t) + first_row : nullptr; };
    p_.grad_lse = rows_of(grads.grad_lse);
    p_.grad_entropy = rows_of(grads.grad_entropy);
    p_.entropy = rows_of(grads.entropy);  // read only
  }

  // Writes `loss`: [], or [N] without a reduction. With a gradient set, writes it in the same pass.
  void forward(const Tensor& loss) {
    const bool unrounded = loss.scalar_type() == compute_dtype(logits);
    if (options_.is(Reduction::kNone)) {
      if (unrounded) return forward_rows(loss);
      if (device_.is_gpu()) {
        p_.rounded_loss = mutable_data<T>(loss);
        return run(forward_kernel());
      }
      const Tensor losses = at::empty(loss.sizes(), loss.options().dtype(at::kFloat));
      forward_rows(losses);
      loss.copy_(losses);
    } else if (device_.is_gpu()) {
      p_.reduced_loss = loss.mutable_data_ptr();
      p_.is_loss_unrounded = unrounded;
      run(forward_kernel());
    } else {
      reduce(loss, sum_of_losses());
    }
  }

  // Writes the loss of each row in the compute type.
  void forward_rows(const Tensor& losses) {
    p_.loss = mutable_data<C>(losses);
    device_.is_gpu() ? run(forward_kernel()) : static_cast<void>(sum_of_losses());
  }

  void backward() { run(kernels_.backward); }
  void target_backward() { run(kernels_.target_backward); }

  // `grad` already holds the gradient for a unit grad_loss.
  void rescale() {
    p_.grad_is_precomputed = true;
    backward();
  }

  // CPU: the number of rows whose target is ignored.
  int64_t n_ignored() const { return n_ignored_; }

  void metrics(const Tensor& lse, const Tensor& entropy, const Tensor& predicted_tokens) {
    p_.lse = mutable_data<C>(lse);
    p_.entropy = mutable_data<C>(entropy);
    p_.predicted_tokens = mutable_data<int64_t>(predicted_tokens);
    device_.run(kernels_.metrics, p_, p_.n_rows, p_.n_classes);
  }

 private:
  void set_weight(const Tensor& weight) {
    weight_ = weight.to(compute_dtype(logits)).contiguous();
    p_.weight = const_data<C>(weight_);
    if (device_.is_gpu()) {
      // Without smoothing, which multiplies it, the sum is left out, because it may be infinite.
      weight_sum_ = p_.label_smoothing > 0 ? weight_.sum(at::kDouble).to(weight_.scalar_type())
                                           : at::zeros({}, weight_.options());
      p_.weight_sum = const_data<C>(weight_sum_);
    } else {
      double sum = 0;
      for (int64_t c = 0; c < p_.n_classes; c++) sum += p_.weight[c];
      weight_sum_on_cpu_ = static_cast<C>(sum);
      p_.weight_sum = &weight_sum_on_cpu_;
    }
  }

  Kernel<Params> forward_kernel() const { return p_.grad ? kernels_.forward_backward : kernels_.forward; }

  void run(Kernel<Params> kernel) const {
    if (device_.is_gpu()) {
      device_.run_on_gpu(kernel, p_, kernels_.workspace(p_.n_rows, p_.n_classes));
    } else {
      device_.run(kernel, p_, p_.n_rows, p_.n_classes);
    }
  }

  // -------------------------------------------------------------------------------------------------------- CPU

  void reduce(const Tensor& loss, double sum) const {
    const bool is_empty = p_.n_rows == 0 || p_.n_classes == 0;
    const double total = p_.mean && is_empty && !p_.zero_if_all_ignored ? double{NAN} : sum / divisor_;
    if (loss.scalar_type() == compute_dtype(logits)) {
      *mutable_data<C>(loss) = static_cast<C>(total);
    } else {
      *mutable_data<T>(loss) = rounded<T>(total);
    }
  }

  double sum_of_losses() const {
    const int64_t scratch_bytes = p_.grad && !std::is_same_v<T, C> ? p_.n_classes * sizeof(C) : 0;
    return Device::sum_on_cpu(forward_kernel(), p_, p_.n_rows, p_.n_classes, scratch_bytes, [](const Launch&) {});
  }

  // One pass over the targets: the divisor, or IndexError for the first that is not a class.
  void count_targets(const Tensor& whole_target, int64_t first_row) {
    if (p_.has_class_indices) {
      const auto ignored_among = [&](int64_t begin, int64_t end) {
        return cpu_kernels().count_ignored(p_.target.as_int64(), begin, end, p_.n_classes, p_.may_ignore,
                                           p_.ignore_index);
      };
      std::atomic<bool> bad = false;
      std::atomic<int64_t> ignored = 0;
      at::parallel_for(0, p_.n_rows, 16384, [&](int64_t begin, int64_t end) {
        const int64_t count = ignored_among(begin, end);
        if (count < 0) bad = true;
        ignored += count;
      });
      if (bad) {
        int64_t n = 0;
        while (ignored_among(n, n + 1) >= 0) n++;
        raise_out_of_range(whole_target, first_row + n, p_.n_classes, "target", "classes");
      }
      n_ignored_ = ignored;
    }
    const int64_t n_counted = p_.n_rows - n_ignored_;
    if (!p_.mean || (p_.zero_if_all_ignored && n_counted == 0)) return;
    const bool is_weighted = p_.token_weight || (p_.weight && p_.has_class_indices);
    divisor_ = is_weighted ? sum_of_weights() : static_cast<double>(n_counted);
  }

  double sum_of_weights() const {
    const int64_t* const target = p_.has_class_indices ? p_.target.as_int64() : nullptr;
    double sum = 0;
    for (int64_t n = 0; n < p_.n_rows; n++) {
      if (target && target[n] == p_.ignore_index) continue;
      const double class_weight = target && p_.weight ? p_.weight[target[n]] : 1;
      sum += class_weight * (p_.token_weight ? p_.token_weight[n] : 1);
    }
    return sum;
  }

  const CrossEntropyOptions options_;
  const Device device_;
  const CrossEntropyKernels<T>& kernels_;
  Params p_;
  Tensor target_, weight_, weight_sum_, token_weight_;
  C weight_sum_on_cpu_ = 0;
  int64_t n_ignored_ = 0;  // CPU
  double divisor_ = 1;     // CPU: of the sum of the losses
};

}  // namespace charlm
