// One call of cross_entropy on the CPU: takes tensors apart, checks every target before anything is written, and hands
// blocks of rows to the kernels.
#pragma once

#include <atomic>
#include <cmath>

#include "../checks.h"
#include "../cross_entropy_rows.h"
#include "adapter.h"

namespace charlm {

struct TargetCounts {
  int64_t n = 0;            // targets that are not ignored
  double total_weight = 0;  // the sum of their weights: what a mean divides by
};

template <class T>
inline T rounded(double x) {
  if constexpr (std::is_same_v<T, BFloat16>) {
    return {c10::BFloat16(static_cast<float>(x)).x};
  } else if constexpr (std::is_same_v<T, Float16>) {
    return {c10::Half(static_cast<float>(x)).x};
  } else {
    return static_cast<T>(x);
  }
}

// A call's tensors, in the dtypes and strides that the kernels read, and the pointers to them (../cross_entropy_ops.h).
template <class T>
class CrossEntropyCall {
  using C = Compute<T>;

 public:
  CrossEntropyRows<T> rows;
  int64_t n_rows;
  Tensor logits;  // [N, V]

  CrossEntropyCall(const CrossEntropyOptions& options, const Tensor& input, const Tensor& target,
                   const OptionalTensor& weight, const OptionalTensor& token_weight)
      : CrossEntropyCall(options, input, target, weight, token_weight, target, 0) {}

  CrossEntropyCall(const CrossEntropyOptions& options, const Tensor& input, const Tensor& target,
                   const OptionalTensor& weight, const OptionalTensor& token_weight, const Tensor& whole_target,
                   int64_t first_row)
      : logits(as_rows(input)), options_(options), whole_target_(whole_target), first_row_(first_row) {
    n_rows = logits.size(0);
    rows.n_classes = logits.size(1);
    rows.logits = const_data<T>(logits);
    rows.logits_stride = logits.stride(0);
    rows.ignore_index = options.ignore_index;
    rows.label_smoothing = static_cast<C>(std::max(0.0, options.label_smoothing));
    rows.lse_square_scale = static_cast<C>(options.lse_square_scale);
    rows.logit_scale = static_cast<C>(options.logit_scale);
    rows.softcap = softcap_as<C>(options.softcap);
    rows.weight_sum = static_cast<C>(rows.n_classes);
    if (has_probabilities(input, target)) {
      target_ = as_rows(target.to(input.scalar_type()));
      rows.probabilities = const_data<T>(target_);
      rows.probabilities_stride = target_.stride(0);
    } else {
      target_ = target.to(at::kLong).contiguous();
      rows.target = const_data<int64_t>(target_);
    }
    if (weight) {
      weight_ = weight->to(compute_dtype(input)).contiguous();
      rows.weight = const_data<C>(weight_);
      double sum = 0;
      for (int64_t c = 0; c < rows.n_classes; c++) sum += rows.weight[c];
      rows.weight_sum = static_cast<C>(sum);
    }
    if (token_weight) {
      token_weight_ = token_weight->to(compute_dtype(input)).contiguous();
      rows.token_weight = const_data<C>(token_weight_);
    }
    counts_ = count_targets();
  }

  static Tensor new_grad(int64_t n_rows, int64_t n_classes, const at::TensorOptions& options) {
    return new_output({n_rows, n_classes}, options);
  }

  void set_normalizer(C* row_max, C* row_sum, C* row_dense_sum) {
    rows.row_max = row_max;
    rows.row_sum = row_sum;
    rows.row_dense_sum = row_dense_sum;
  }

  void set_grad_loss(const C* grad_loss, int64_t stride) {
    rows.grad_loss = grad_loss;
    rows.grad_loss_stride = stride;
    rows.grad_scale = 1 / divisor();
  }

  void set_grad(const Tensor& grad) {  // [N, V]
    rows.grad = mutable_data<T>(grad);
    rows.grad_stride = grad.stride(0);
  }

  // Writes the reduced loss of rows whose losses have this sum.
  void reduce(const Tensor& loss, double sum) const {
    const bool of_nothing = n_rows == 0 || rows.n_classes == 0;
    const double total =
        options_.is(Reduction::kMean) && of_nothing && !options_.zero_if_all_ignored ? NAN : sum / divisor();
    *mutable_data<T>(loss) = rounded<T>(total);
  }

  int64_t n_ignored() const { return n_rows - counts_.n; }

  void forward(const Tensor& loss) {
    if (options_.is(Reduction::kNone)) {
      rows.loss = mutable_data<T>(loss);
      forward_sum();
    } else {
      reduce(loss, forward_sum());
    }
  }

  void forward_backward(const Tensor& loss) {
    const C one = 1;
    set_grad_loss(&one, 0);
    reduce(loss, forward_backward_sum());
  }

  void block(const Tensor& losses) {
    rows.unrounded_loss = mutable_data<C>(losses);
    if (rows.grad) {
      forward_backward_sum();
    } else {
      forward_sum();
    }
  }

  void backward() { for_each_block(cpu_kernels().of<T>().cross_entropy.backward); }
  void rescale() { backward(); }
  void target_backward() { for_each_block(cpu_kernels().of<T>().cross_entropy.target_backward); }

  void metrics(C* lse, C* entropy, int64_t* predicted_tokens) {
    const CrossEntropyMetrics<T> out{lse, entropy, predicted_tokens};
    blocks().parallel_for([&](int64_t, int64_t begin, int64_t end) {
      cpu_kernels().of<T>().cross_entropy.metrics(rows, out, begin, end);
    });
  }

  // Multiplies by a power of two, which rounds no normal number, and by no other.
  static bool scale_exactly(Tensor& grad, const Tensor& grad_loss) {
    int exponent = 0;
    const double scale = grad_loss.item<double>();
    if (scale == 1) return true;
    if (std::abs(std::frexp(scale, &exponent)) != 0.5) return false;
    grad.mul_(scale);
    return true;
  }

 private:
  Blocks blocks() const { return Blocks(n_rows, rows.n_classes); }

  void for_each_block(void (*kernel)(const CrossEntropyRows<T>&, int64_t, int64_t)) const {
    blocks().parallel_for([&](int64_t, int64_t begin, int64_t end) { kernel(rows, begin, end); });
  }

  // Each walks over the rows once, and returns the sum of their losses.
  double forward_sum() const {
    return blocks().parallel_sum([&] {
      return [&](int64_t begin, int64_t end) { return cpu_kernels().of<T>().cross_entropy.forward(rows, begin, end); };
    });
  }

  double forward_backward_sum() const {
    return blocks().parallel_sum([&] {
      const bool half = sizeof(T) < sizeof(C);
      return [&, scratch = std::vector<C>(half ? rows.n_classes : 0)](int64_t begin, int64_t end) mutable {
        return cpu_kernels().of<T>().cross_entropy.forward_backward(rows, scratch.data(), begin, end);
      };
    });
  }

  // What the reduction divides the sum of the losses by.
  double divisor() const {
    if (!options_.is(Reduction::kMean)) return 1;
    return options_.zero_if_all_ignored && counts_.n == 0 ? 1 : counts_.total_weight;
  }

  // One pass over the targets, before anything is written: IndexError for the first that is no class.
  TargetCounts count_targets() const {
    TargetCounts counts{n_rows, static_cast<double>(n_rows)};
    if (!rows.target) {
      if (rows.token_weight) counts.total_weight = sum_of_weights();
      return counts;
    }
    // A uint64 target of 2^63 or more is negative here, but is never ignore_index.
    const bool may_ignore = whole_target_.scalar_type() != at::kUInt64 || rows.ignore_index >= 0;
    const auto ignored_among = [&](int64_t begin, int64_t end) {
      return cpu_kernels().count_ignored(rows.target, begin, end, rows.n_classes, may_ignore, rows.ignore_index);
    };
    std::atomic<bool> bad = false;
    std::atomic<int64_t> ignored = 0;
    at::parallel_for(0, n_rows, 16384, [&](int64_t begin, int64_t end) {
      const int64_t count = ignored_among(begin, end);
      if (count < 0) bad = true;
      ignored += count;
    });
    if (bad) {
      int64_t n = 0;
      while (ignored_among(n, n + 1) >= 0) n++;
      raise_out_of_range(whole_target_, first_row_ + n, rows.n_classes, "target", "classes");
    }
    counts.n -= ignored;
    counts.total_weight = rows.weight || rows.token_weight ? sum_of_weights() : static_cast<double>(counts.n);
    return counts;
  }

  double sum_of_weights() const {
    double sum = 0;
    for (int64_t n = 0; n < n_rows; n++) {
      if (rows.target && rows.target[n] == rows.ignore_index) continue;
      const double class_weight = rows.target && rows.weight ? rows.weight[rows.target[n]] : 1;
      sum += class_weight * (rows.token_weight ? rows.token_weight[n] : 1);
    }
    return sum;
  }

  CrossEntropyOptions options_;
  Tensor whole_target_;  // as the caller gave it, these rows beginning with its `first_row_`
  int64_t first_row_;
  Tensor target_, weight_, token_weight_;
  TargetCounts counts_;
};

}  // namespace charlm
