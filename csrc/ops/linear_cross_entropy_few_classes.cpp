// linear_cross_entropy over few classes on the CPU, in one pass over the rows: while some of them are in a near cache,
// one thread computes their logits, losses and gradients and adds to those of W and b. Three separate products would
// read the input and write the gradients through a far cache.
#include <ATen/ops/zeros.h>

#include "cpu/gemm/gemm.h"
#include "ops/cross_entropy_call.h"
#include "ops/linear_cross_entropy_op.h"

namespace charlm {
namespace {

constexpr int64_t kFewNumbers = 1 << 23;  // 64 MiB of double: the logits, and three numbers for each row
constexpr int64_t kRows = 64;             // that a near cache holds

bool pays(const LinearCrossEntropyArguments& a) {
  if (Device(a.input).is_gpu() || a.input.dim() != 2 || a.block_rows > 0 || a.options.is(Reduction::kNone))
    return false;
  const int64_t n_rows = a.input.size(0), n_features = a.input.size(1), n_classes = a.linear_weight.size(0);
  return a.input.scalar_type() == compute_dtype(a.input) && n_rows > 0 && n_features > 0 && n_classes > 0 &&
         n_classes <= kMaxShortSide && n_classes * n_features <= kL1Numbers && n_rows * (n_classes + 3) <= kFewNumbers;
}

template <class C>
class FewClasses {
 public:
  FewClasses(const LinearCrossEntropyArguments& a, OutputMask mask)
      : a_(a),
        mask_(mask),
        n_rows_(a.input.size(0)),
        n_features_(a.input.size(1)),
        n_classes_(a.linear_weight.size(0)),
        n_parts_(std::clamp<int64_t>(n_rows_ / kMinPartProducts, 1, kMaxParts)),
        input_(with_contiguous_rows<C>(a.input)),
        weight_(with_contiguous_rows<C>(a.linear_weight)),
        columns_(with_contiguous_rows<C>(a.linear_weight.t())),
        bias_(a.linear_bias ? a.linear_bias->contiguous() : Tensor()),
        logits_(new_output({n_rows_, n_classes_}, a.input.options())),
        call_(a.options, logits_, a.target, a.weight, a.token_weight) {}

  bool has_ignored() const { return call_.n_ignored() > 0; }

  LossAndGradients run(bool with_gradients, const OptionalTensor& grad_loss) {
    const Tensor loss = at::empty({}, a_.input.options()), state = at::empty({3, n_rows_}, a_.input.options());
    call_.set_state(state);
    const C grad = grad_loss ? grad_loss->item<C>() : C(1);
    if (with_gradients) call_.set_gradient(logits_, &grad, /*one_for_each_row=*/false);
    const Tensor none = at::empty({0}, a_.input.options());
    if (mask_[0]) grad_input_ = new_output(a_.input.sizes(), a_.input.options());
    if (mask_[1]) weight_sums_ = at::zeros({n_parts_, n_classes_, n_features_}, a_.input.options());
    if (mask_[2]) bias_sums_ = at::zeros({n_parts_, n_classes_}, a_.input.options());

    c10::SmallVector<double, kMaxParts> losses(n_parts_, 0.0);
    const int64_t products = n_rows_ / n_parts_ * n_features_ * n_classes_;
    at::parallel_for(0, n_parts_, grain_of_products(products), [&](int64_t begin, int64_t end) {
      for (int64_t part = begin; part < end; part++)
        losses[part] = run_part(part, with_gradients, grad_loss.has_value());
    });
    double sum = 0;
    for (const double of_part : losses) sum += of_part;
    call_.reduce(loss, sum);
    return {loss, mask_[0] ? grad_input_ : none, mask_[1] ? sum_of_parts(weight_sums_) : none,
            mask_[2] ? sum_of_parts(bias_sums_) : none};
  }

 private:
  // The sum of the part's losses.
  double run_part(int64_t part, bool with_gradients, bool in_two_passes) {
    using Kernels = CrossEntropyKernels<C>;
    const int64_t last = n_rows_ * (part + 1) / n_parts_;
    double loss = 0;
    for (int64_t begin = n_rows_ * part / n_parts_; begin < last; begin += kRows) {
      const int64_t end = std::min(last, begin + kRows);
      make_logits(begin, end);
      if (!with_gradients) {
        loss += call_.run_rows(&Kernels::forward, begin, end);
      } else if (in_two_passes) {
        loss += call_.run_rows(&Kernels::forward, begin, end);
        call_.run_rows(&Kernels::backward, begin, end);
      } else {
        loss += call_.run_rows(&Kernels::forward_backward, begin, end);
      }
      if (mask_[0]) make_input_gradient(begin, end);
      if (mask_[1]) add_weight_gradient(part, begin, end);
      if (mask_[2]) add_bias_gradient(part, begin, end);
    }
    return loss;
  }

  const C* input_row(int64_t row) const { return const_data<C>(input_) + row * input_.stride(0); }
  C* logits_row(int64_t row) const { return mutable_data<C>(logits_) + row * n_classes_; }

  void make_logits(int64_t begin, int64_t end) const {
    GemmParams<C> g;
    g.a = input_row(begin);
    g.a_row_stride = input_.stride(0);
    g.a_column_stride = 1;
    g.b = const_data<C>(columns_);
    g.b_row_stride = columns_.stride(0);
    g.start = bias_.defined() ? const_data<C>(bias_) : nullptr;
    g.c = logits_row(begin);
    g.c_row_stride = g.n_columns = n_classes_;
    g.n_rows = end - begin;
    g.n_inner = n_features_;
    multiply_here(g);
  }

  void make_input_gradient(int64_t begin, int64_t end) const {
    GemmParams<C> g;
    g.a = logits_row(begin);
    g.a_row_stride = n_classes_;
    g.a_column_stride = 1;
    g.b = const_data<C>(weight_);
    g.b_row_stride = weight_.stride(0);
    g.c = mutable_data<C>(grad_input_) + begin * n_features_;
    g.c_row_stride = g.n_columns = n_features_;
    g.n_rows = end - begin;
    g.n_inner = n_classes_;
    multiply_here(g);
  }

  void add_weight_gradient(int64_t part, int64_t begin, int64_t end) const {
    GemmParams<C> g;
    g.a = logits_row(begin);
    g.a_row_stride = 1;
    g.a_column_stride = n_classes_;
    g.b = input_row(begin);
    g.b_row_stride = input_.stride(0);
    g.adds = true;
    g.c = mutable_data<C>(weight_sums_) + part * n_classes_ * n_features_;
    g.c_row_stride = g.n_columns = n_features_;
    g.n_rows = n_classes_;
    g.n_inner = end - begin;
    multiply_here(g);
  }

  void add_bias_gradient(int64_t part, int64_t begin, int64_t end) const {
    static constexpr C kOne = 1;
    GemmParams<C> g;
    g.a = &kOne;  // [1, n] ones: strides of 0
    g.b = logits_row(begin);
    g.b_row_stride = n_classes_;
    g.adds = true;
    g.c = mutable_data<C>(bias_sums_) + part * n_classes_;
    g.c_row_stride = g.n_columns = n_classes_;
    g.n_rows = 1;
    g.n_inner = end - begin;
    multiply_here(g);
  }

  // [n_parts, ...] added up in their order.
  static Tensor sum_of_parts(const Tensor& parts) {
    const Tensor sum = parts.select(0, 0);
    const int64_t size = sum.numel();
    C* const to = mutable_data<C>(sum);
    for (int64_t part = 1; part < parts.size(0); part++) {
      const C* const from = const_data<C>(parts) + part * size;
      for (int64_t i = 0; i < size; i++) to[i] += from[i];
    }
    return parts.size(0) == 1 ? sum : sum.clone();
  }

  const LinearCrossEntropyArguments& a_;
  const OutputMask mask_;
  const int64_t n_rows_, n_features_, n_classes_, n_parts_;
  const Tensor input_, weight_, columns_;  // [N, D], [V, D], [D, V]: contiguous rows
  const Tensor bias_;                      // [V], undefined without one
  const Tensor logits_;                    // [N, V], and then their gradients
  CrossEntropyCall<C> call_;
  Tensor grad_input_, weight_sums_, bias_sums_;
};

template <class C>
std::optional<LossAndGradients> run(const LinearCrossEntropyArguments& a, bool with_gradients,
                                    const OptionalTensor& grad_loss, OutputMask mask) {
  FewClasses<C> few(a, mask);
  if (few.has_ignored()) return std::nullopt;
  return few.run(with_gradients, grad_loss);
}

}  // namespace

std::optional<LossAndGradients> linear_cross_entropy_over_few_classes(const LinearCrossEntropyArguments& a,
                                                                      bool with_gradients,
                                                                      const OptionalTensor& grad_loss,
                                                                      OutputMask mask) {
  if (!pays(a)) return std::nullopt;
  return a.input.scalar_type() == at::kDouble ? run<double>(a, with_gradients, grad_loss, mask)
                                              : run<float>(a, with_gradients, grad_loss, mask);
}

}  // namespace charlm
