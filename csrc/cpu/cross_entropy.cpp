// cross_entropy on the CPU: takes tensors apart, checks every target before anything is written, and hands blocks of
// rows to the kernels.
#include "../cross_entropy.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <atomic>

#include "../checks.h"
#include "adapter.h"

namespace charlm {
namespace {

// [N, V] with a stride of 1 along the classes; a view wherever the strides allow it.
Tensor as_rows(const Tensor& t) {
  if (t.dim() == 2 && t.stride(1) == 1) return t;
  if (t.dim() == 1) return t.unsqueeze(0).contiguous();
  const Tensor classes_last = t.dim() == 2 ? t : t.movedim(1, -1);
  const int64_t v = classes_last.size(-1), n = c10::multiply_integers(classes_last.sizes().slice(0, t.dim() - 1));
  const Tensor rows = classes_last.reshape({n, v});
  return rows.stride(1) == 1 || v == 1 ? rows : rows.contiguous();
}

// Rows [N, V] in the shape of the logits that they belong to.
Tensor in_shape_of(const Tensor& rows, const Tensor& input) {
  if (input.dim() == 2) return rows;
  if (input.dim() == 1) return rows.view(input.sizes());
  at::DimVector shape(input.sizes().begin(), input.sizes().end());
  shape.erase(shape.begin() + 1);
  shape.push_back(input.size(1));
  return rows.view(shape).movedim(-1, 1);
}

struct TargetCounts {
  int64_t n = 0;            // targets that are not ignored
  double total_weight = 0;  // the sum of their weights: what a mean divides by
};

// A call's tensors, in the dtypes and strides that the kernels read, and the pointers to them.
template <class T>
class Call {
  using C = Compute<T>;

 public:
  CrossEntropyRows<T> rows;
  int64_t n_rows;
  Tensor logits;  // [N, V]

  Call(const CrossEntropyOptions& options, const Tensor& input, const Tensor& target, const OptionalTensor& weight,
       const OptionalTensor& token_weight)
      : logits(as_rows(input)), options_(options), given_target_(target) {
    n_rows = logits.size(0);
    rows.n_classes = logits.size(1);
    rows.logits = const_data<T>(logits);
    rows.logits_stride = logits.stride(0);
    rows.ignore_index = options.ignore_index;
    rows.label_smoothing = static_cast<C>(std::max(0.0, options.label_smoothing));
    rows.lse_square_scale = static_cast<C>(options.lse_square_scale);
    rows.logit_scale = static_cast<C>(options.logit_scale);
    rows.softcap = static_cast<C>(options.softcap);
    rows.weight_sum = static_cast<C>(rows.n_classes);
    if (has_probabilities(input, target)) {
      target_ = as_rows(target);
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

  Blocks blocks() const { return Blocks(n_rows, rows.n_classes); }

  int64_t n_counted() const { return counts_.n; }

  // What the reduction divides the sum of the losses by.
  double divisor() const {
    if (!options_.is(Reduction::kMean)) return 1;
    return options_.zero_if_all_ignored && counts_.n == 0 ? 1 : counts_.total_weight;
  }

  void set_normalizer(const Tensor& normalizer) {  // [2, N]
    rows.row_max = static_cast<C*>(const_cast<void*>(normalizer.const_data_ptr()));
    rows.row_sum = rows.row_max + n_rows;
  }

  // grad_loss: (), or the unreduced loss's shape.
  void set_grad_loss(const Tensor& grad_loss, const Tensor& input) {
    grad_loss_ = grad_loss.to(compute_dtype(input)).contiguous();
    rows.grad_loss = const_data<C>(grad_loss_);
    rows.grad_loss_stride = options_.is(Reduction::kNone) ? 1 : 0;
    rows.grad_scale = 1 / divisor();
  }

  void set_grad(const Tensor& grad) {  // [N, V]
    rows.grad = mutable_data<T>(grad);
    rows.grad_stride = grad.stride(0);
  }

 private:
  // One pass over the targets, before anything is written: IndexError for the first that is no class.
  TargetCounts count_targets() const {
    TargetCounts counts{n_rows, static_cast<double>(n_rows)};
    if (!rows.target) {
      if (rows.token_weight) counts.total_weight = sum_of_weights();
      return counts;
    }
    // A uint64 target of 2^63 or more is negative here, but is never ignore_index.
    const bool may_ignore = given_target_.scalar_type() != at::kUInt64 || rows.ignore_index >= 0;
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
      raise_out_of_range(given_target_, n, rows.n_classes, "target", "classes");
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
  Tensor given_target_, target_, weight_, token_weight_, grad_loss_;
  TargetCounts counts_;
};

// What walks over a block of rows and returns the sum of its losses; one for each thread.
template <class T>
auto forward_worker(const Call<T>& call) {
  return [&call](int64_t begin, int64_t end) {
    return cpu_kernels().of<T>().cross_entropy.forward(call.rows, begin, end);
  };
}

template <class T>
auto forward_backward_worker(const Call<T>& call) {
  const bool half = sizeof(T) < sizeof(Compute<T>);
  return
      [&call, scratch = std::vector<Compute<T>>(half ? call.rows.n_classes : 0)](int64_t begin, int64_t end) mutable {
        return cpu_kernels().of<T>().cross_entropy.forward_backward(call.rows, scratch.data(), begin, end);
      };
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

// Walks over the blocks with the workers that `make_worker` makes, and reduces.
template <class T, class MakeWorker>
LossAndNormalizer reduced(const CrossEntropyOptions& options, const Tensor& input, Call<T>& call,
                          MakeWorker&& make_worker) {
  const bool none = options.is(Reduction::kNone);
  auto loss = none ? at::empty_symint(loss_shape(input), input.options()) : at::empty({}, input.options());
  auto normalizer = at::empty({2, call.n_rows}, input.options().dtype(compute_dtype(input)));
  call.set_normalizer(normalizer);
  if (none) call.rows.loss = mutable_data<T>(loss);
  const double sum = call.blocks().parallel_sum(make_worker);
  if (!none) {
    const double total =
        options.is(Reduction::kMean) && input.numel() == 0 && !options.zero_if_all_ignored ? NAN : sum / call.divisor();
    *mutable_data<T>(loss) = rounded<T>(total);
  }
  return {loss, normalizer};
}

LossAndNormalizer cross_entropy(const CrossEntropyOptions& options, const Tensor& input, const Tensor& target,
                                const OptionalTensor& weight, const OptionalTensor& token_weight) {
  check_cross_entropy(options, input, target, weight, token_weight);
  return with_float_type(input.scalar_type(), "cross_entropy", [&]<class T>() {
    Call<T> call(options, input, target, weight, token_weight);
    return reduced(options, input, call, [&] { return forward_worker(call); });
  });
}

// The loss, and the gradient of the logits for a gradient of the loss of 1: into `grad` [N, V].
template <class T>
LossAndNormalizer forward_backward(const CrossEntropyOptions& options, const Tensor& input, Call<T>& call,
                                   const Tensor& grad) {
  TORCH_CHECK_VALUE(
      !options.is(Reduction::kNone),
      "the gradient is made together with the loss, as for inplace=\"forward\", for reduction \"mean\" or "
      "\"sum\" only: with \"none\" it is not yet known");
  const Compute<T> one = 1;
  call.rows.grad_loss = &one;
  call.rows.grad_scale = 1 / call.divisor();
  call.set_grad(grad);
  return reduced(options, input, call, [&] { return forward_backward_worker(call); });
}

std::tuple<Tensor, Tensor, Tensor> cross_entropy_forward_backward(const CrossEntropyOptions& options,
                                                                  const Tensor& input, const Tensor& target,
                                                                  const OptionalTensor& weight,
                                                                  const OptionalTensor& token_weight) {
  check_cross_entropy(options, input, target, weight, token_weight);
  return with_float_type(input.scalar_type(), "cross_entropy", [&]<class T>() {
    Call<T> call(options, input, target, weight, token_weight);
    const Tensor grad = new_output({call.n_rows, call.rows.n_classes}, input.options());
    auto [loss, normalizer] = forward_backward(options, input, call, grad);
    return std::make_tuple(loss, normalizer, in_shape_of(grad, input));
  });
}

LossAndNormalizer cross_entropy_inplace_forward(const CrossEntropyOptions& options, Tensor& input, const Tensor& target,
                                                const OptionalTensor& weight, const OptionalTensor& token_weight) {
  check_cross_entropy(options, input, target, weight, token_weight);
  return with_float_type(input.scalar_type(), "cross_entropy", [&]<class T>() {
    Call<T> call(options, input, target, weight, token_weight);
    auto result = forward_backward(options, input, call, call.logits);
    if (!call.logits.is_alias_of(input)) input.copy_(in_shape_of(call.logits, input));
    return result;
  });
}

LossAndNormalizer cross_entropy_inplace_backward(const CrossEntropyOptions& options, Tensor& input,
                                                 const Tensor& target, const OptionalTensor& weight,
                                                 const OptionalTensor& token_weight) {
  return cross_entropy(options, input, target, weight, token_weight);
}

// Writes rows of a gradient with `kernel`, into the logits themselves or into new memory; returns them as [N, V].
template <class T>
Tensor grad_rows(const CrossEntropyOptions& options, const Tensor& grad_loss, const Tensor& input, const Tensor& target,
                 const OptionalTensor& weight, const OptionalTensor& token_weight, const Tensor& normalizer,
                 bool inplace, void (*kernel)(const CrossEntropyRows<T>&, int64_t, int64_t)) {
  check_cross_entropy(options, input, target, weight, token_weight);
  Call<T> call(options, input, target, weight, token_weight);
  TORCH_CHECK(normalizer.dim() == 2 && normalizer.size(0) == 2 && normalizer.size(1) == call.n_rows &&
                  normalizer.is_contiguous() && normalizer.scalar_type() == compute_dtype(input),
              "normalizer must be the one that cross_entropy returned, got shape ", normalizer.sizes());
  TORCH_CHECK(grad_loss.numel() == (options.is(Reduction::kNone) ? call.n_rows : 1),
              "grad_loss must have the shape of the loss, got ", grad_loss.sizes());
  const Tensor grad = inplace ? call.logits : new_output({call.n_rows, call.rows.n_classes}, input.options());
  call.set_normalizer(normalizer);
  call.set_grad_loss(grad_loss, input);
  call.set_grad(grad);
  call.blocks().parallel_for([&](int64_t, int64_t begin, int64_t end) { kernel(call.rows, begin, end); });
  return grad;
}

Tensor cross_entropy_backward(const CrossEntropyOptions& options, const Tensor& grad_loss, const Tensor& input,
                              const Tensor& target, const OptionalTensor& weight, const OptionalTensor& token_weight,
                              const Tensor& normalizer) {
  return with_float_type(input.scalar_type(), "cross_entropy_backward", [&]<class T>() {
    return in_shape_of(grad_rows<T>(options, grad_loss, input, target, weight, token_weight, normalizer, false,
                                    cpu_kernels().of<T>().cross_entropy.backward),
                       input);
  });
}

void cross_entropy_backward_(const CrossEntropyOptions& options, Tensor& input, const Tensor& grad_loss,
                             const Tensor& target, const OptionalTensor& weight, const OptionalTensor& token_weight,
                             const Tensor& normalizer) {
  with_float_type(input.scalar_type(), "cross_entropy_backward_", [&]<class T>() {
    const Tensor rows = grad_rows<T>(options, grad_loss, input, target, weight, token_weight, normalizer, true,
                                     cpu_kernels().of<T>().cross_entropy.backward);
    if (!rows.is_alias_of(input)) input.copy_(in_shape_of(rows, input));
  });
}

Tensor cross_entropy_target_backward(const CrossEntropyOptions& options, const Tensor& grad_loss, const Tensor& input,
                                     const Tensor& target, const OptionalTensor& weight,
                                     const OptionalTensor& token_weight, const Tensor& normalizer) {
  TORCH_CHECK(has_probabilities(input, target), "only class probabilities have a gradient, got a target of shape ",
              target.sizes(), " for logits of shape ", input.sizes());
  return with_float_type(input.scalar_type(), "cross_entropy_target_backward", [&]<class T>() {
    return in_shape_of(grad_rows<T>(options, grad_loss, input, target, weight, token_weight, normalizer, false,
                                    cpu_kernels().of<T>().cross_entropy.target_backward),
                       input);
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor> cross_entropy_metrics(const CrossEntropyOptions& options,
                                                                 const Tensor& input, const Tensor& target) {
  check_cross_entropy(options, input, target, {}, {});
  return with_float_type(input.scalar_type(), "cross_entropy_metrics", [&]<class T>() {
    Call<T> call(options, input, target, {}, {});
    const auto& kernels = cpu_kernels().of<T>().cross_entropy;
    const auto shape = loss_shape(input);
    const auto compute = input.options().dtype(compute_dtype(input));
    Tensor lse = at::empty_symint(shape, compute), entropy = at::empty_symint(shape, compute);
    Tensor predicted = at::empty_symint(shape, input.options().dtype(at::kLong));
    const CrossEntropyMetrics<T> out{mutable_data<Compute<T>>(lse), mutable_data<Compute<T>>(entropy),
                                     mutable_data<int64_t>(predicted)};
    TORCH_CHECK_INDEX(call.rows.n_classes > 0 || call.n_rows == 0, "cannot predict one of 0 classes");
    call.blocks().parallel_for(
        [&](int64_t, int64_t begin, int64_t end) { kernels.metrics(call.rows, out, begin, end); });

    const bool probabilities = has_probabilities(input, target);
    const Tensor wanted = (probabilities ? target.argmax(class_dim(input)) : target.to(at::kLong)).view_symint(shape);
    Tensor right = predicted.eq(wanted);
    if (!probabilities) right = right.logical_and(wanted.ne(options.ignore_index));
    right = right.to(at::kFloat);
    if (options.is(Reduction::kNone)) return std::make_tuple(lse, entropy, predicted, right);
    const double divisor = options.zero_if_all_ignored && call.n_counted() == 0 ? 1 : call.n_counted();
    return std::make_tuple(lse, entropy, predicted, right.sum().div(divisor));
  });
}

}  // namespace

TORCH_LIBRARY_IMPL(charlm, CPU, m) {
  m.impl("cross_entropy", Flat<&cross_entropy>::call);
  m.impl("cross_entropy_forward_backward", Flat<&cross_entropy_forward_backward>::call);
  m.impl("cross_entropy_inplace_forward", Flat<&cross_entropy_inplace_forward>::call);
  m.impl("cross_entropy_inplace_backward", Flat<&cross_entropy_inplace_backward>::call);
  m.impl("cross_entropy_backward", Flat<&cross_entropy_backward>::call);
  m.impl("cross_entropy_backward_", Flat<&cross_entropy_backward_>::call);
  m.impl("cross_entropy_target_backward", Flat<&cross_entropy_target_backward>::call);
  m.impl("cross_entropy_metrics", Flat<&cross_entropy_metrics>::call);
}

}  // namespace charlm
