// The matrix products of linear_cross_entropy: torch's or those of cpu/gemm/gemm.h, in the dtype of the input. Half
// types are widened to float on a CPU without instructions for them, where at::mm runs at a tenth of float's speed or
// less.
#include "ops/linear_products.h"

#include <ATen/ops/addmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/sum.h>
#include <ATen/ops/zeros.h>

#include "core/device.h"
#include "cpu/blocks.h"
#include "cpu/gemm/gemm.h"
#include "ops/linear_plan.h"

namespace charlm {
namespace {

// Multiplications of a product, from which on a GPU a copy of W, with rows of zeros, takes less time than it saves: for
// 65536 x 200 -> 27 in bfloat16 121 us of products become 85, and 31 for the copy if nothing else runs.
constexpr int64_t kMinPaddedProducts = 1 << 27;
constexpr int64_t kPartBytes = 16 << 20;  // of a part of W, or of its gradient, in float

int64_t part_classes(const Tensor& weight) {
  return std::max<int64_t>(1, kPartBytes / std::max<int64_t>(1, weight.size(1) * static_cast<int64_t>(sizeof(float))));
}

// f(first, n) for classes [first, first + n), a part of W after the other.
template <class F>
void for_each_part(const Tensor& weight, F f) {
  const int64_t n_classes = weight.size(0), most = part_classes(weight);
  for (int64_t first = 0; first < n_classes; first += most) f(first, std::min(most, n_classes - first));
}

void product_of_rows(Tensor out, const Tensor& x, const Tensor& weight, const OptionalTensor& bias) {
  multiply(out, x, weight.t(), bias);
}

// In the dtype of the input.
class OwnProducts final : public LinearProducts {
 public:
  OwnProducts(const LinearCrossEntropyArguments& arguments, bool one_block)
      : LinearProducts(arguments), one_block_(one_block) {}

  at::ScalarType dtype() const override { return weight_.scalar_type(); }

  void logits(const Tensor& x, Tensor out) override { product_of_rows(std::move(out), x, weight_, bias_); }

  void input_gradient(const Tensor& g, Tensor out) override { multiply(out, g, weight_); }

  void add_weight_gradient(const Tensor& g, const Tensor& x) override {
    const at::ScalarType sum_dtype = compute_dtype(weight_);
    if (one_block_ || sum_dtype == dtype()) return add_product(g, x);
    const bool is_first = !weight_sum_.defined();
    if (is_first) weight_sum_ = new_weight_sum(sum_dtype);
    if (!x.is_cuda()) {
      for_each_part(weight_, [&](int64_t first, int64_t n) {
        const Tensor part = at::mm(g.narrow(1, first, n).t(), x);
        Tensor sum = weight_sum_.narrow(0, first, n);
        is_first ? sum.copy_(part) : sum.add_(part);
      });
    } else if (is_first) {
      at::mm_out(weight_sum_, g.t(), x, sum_dtype);
    } else {
      at::addmm_out(weight_sum_, weight_sum_, g.t(), x, sum_dtype);
    }
  }

 private:
  const bool one_block_;
};

// Half types in float. W is converted a part at a time: a whole copy of it would be larger than anything else here.
class WidenedProducts final : public LinearProducts {
 public:
  explicit WidenedProducts(const LinearCrossEntropyArguments& arguments)
      : LinearProducts(arguments), wide_bias_(to(bias_, at::kFloat)) {}

  at::ScalarType dtype() const override { return at::kFloat; }

  void logits(const Tensor& x, Tensor out) override {
    for_each_part(weight_, [&](int64_t first, int64_t n) {
      const OptionalTensor bias = wide_bias_ ? OptionalTensor(wide_bias_->narrow(0, first, n)) : std::nullopt;
      product_of_rows(out.narrow(1, first, n), x, part(first, n), bias);
    });
  }

  void input_gradient(const Tensor& g, Tensor out) override {
    Tensor wide = new_memory(out.sizes(), out.options().dtype(at::kFloat));
    if (weight_.size(0) == 0) wide.zero_();
    for_each_part(weight_, [&](int64_t first, int64_t n) {
      const Tensor of_part = g.narrow(1, first, n);
      if (first == 0) {
        multiply(wide, of_part, part(first, n));
      } else {
        charlm::add_product(wide, of_part, part(first, n));
      }
    });
    out.copy_(wide);
  }

  void add_weight_gradient(const Tensor& g, const Tensor& x) override { add_product(g, x); }

 private:
  // Rows [first, first + n) of W in float; if one part is all of it, it is converted once.
  const Tensor& part(int64_t first, int64_t n) {
    if (part_.defined() && n == weight_.size(0)) return part_;
    if (!memory_.defined()) memory_ = new_memory({n, weight_.size(1)}, weight_.options().dtype(at::kFloat));
    part_ = memory_.narrow(0, 0, n);
    part_.copy_(weight_.narrow(0, first, n));
    return part_;
  }

  const OptionalTensor wide_bias_;
  Tensor memory_, part_;
};

bool has_half_instructions(at::ScalarType dtype) {
  const char* const name =
      dtype == at::kBFloat16 ? "mkldnn::_is_mkldnn_bf16_supported" : "mkldnn::_is_mkldnn_fp16_supported";
  const auto op = c10::Dispatcher::singleton().findSchema({name, ""});
  return op && op->typed<bool()>().call();
}

}  // namespace

LinearProducts::LinearProducts(const LinearCrossEntropyArguments& a)
    : n_given_classes_(a.linear_weight.size(0)),
      weight_(a.linear_weight.stride(0) == 1 || a.linear_weight.stride(1) == 1 ? a.linear_weight
                                                                               : a.linear_weight.contiguous()),
      bias_(a.linear_bias) {
  const int64_t n = padded_classes(n_given_classes_, weight_.element_size());
  if (n == n_given_classes_ || !Device(weight_).is_gpu()) return;
  const int64_t n_rows = a.input.dim() == 1 ? 1 : a.input.size(0);
  if (n_rows * weight_.size(1) < kMinPaddedProducts / n_given_classes_) return;
  weight_ = padded_rows(weight_, n);
  if (bias_) bias_ = padded_rows(*bias_, n);
}

Tensor LinearProducts::new_weight_sum(at::ScalarType dtype) const {
  return new_memory(weight_.sizes(), weight_.options().dtype(dtype));
}

void LinearProducts::add_product(const Tensor& g, const Tensor& x) {
  if (weight_sum_.defined()) {
    charlm::add_product(weight_sum_, g.t(), x);
  } else {
    weight_sum_ = new_weight_sum(x.scalar_type());
    multiply(weight_sum_, g.t(), x);
  }
}

void LinearProducts::add_bias_gradient(const Tensor& g) {
  const Tensor sum = at::sum(g, /*dim=*/0, /*keepdim=*/false, compute_dtype(weight_));
  bias_sum_ = bias_sum_.defined() ? bias_sum_.add_(sum) : sum.to(at::kDouble);
}

Tensor LinearProducts::weight_gradient() {
  if (!weight_sum_.defined()) return at::zeros({n_given_classes_, weight_.size(1)}, weight_.options());
  const Tensor sum = weight_sum_.narrow(0, 0, n_given_classes_);
  if (sum.scalar_type() == weight_.scalar_type()) return sum;
  return new_memory(sum.sizes(), weight_.options()).copy_(sum);
}

Tensor LinearProducts::bias_gradient() {
  return bias_sum_.defined() ? bias_sum_.to(weight_.scalar_type()) : at::zeros({n_given_classes_}, weight_.options());
}

Tensor padded_rows(const Tensor& t, int64_t n) {
  if (t.size(0) == n) return t;
  at::DimVector shape(t.sizes().begin(), t.sizes().end());
  shape[0] = n;
  const Tensor result = at::empty(shape, t.options());
  result.narrow(0, 0, t.size(0)).copy_(t);
  result.narrow(0, t.size(0), n - t.size(0)).zero_();
  return result;
}

Tensor new_memory(at::IntArrayRef shape, const at::TensorOptions& options) {
  return options.device().is_cpu() ? new_output(shape, options) : at::empty(shape, options);
}

bool is_widened(const LinearCrossEntropyArguments& a) {
  const at::ScalarType dtype = a.input.scalar_type();
  if (dtype == compute_dtype(a.input) || a.gemm == static_cast<int64_t>(Gemm::kOwn)) return false;
  if (a.gemm == static_cast<int64_t>(Gemm::kWidened)) return true;
  return !Device(a.input).is_gpu() && !has_half_instructions(dtype);
}

std::unique_ptr<LinearProducts> new_products(const LinearCrossEntropyArguments& arguments, bool one_block) {
  if (is_widened(arguments)) return std::make_unique<WidenedProducts>(arguments);
  return std::make_unique<OwnProducts>(arguments, one_block);
}

}  // namespace charlm
