// linear_cross_entropy: schemas, checks, shapes, and the implementation for every device. The logits [N, V] exist a
// block of rows at a time. A block is computed, turned into its losses and, in its own memory, into its gradient, and
// used by the products of the gradients before the next one is computed:
//
//   Z = X W^T + b   [n, V]     loss_n, G = d loss / d Z     dX = G W   [n, D]     dW += G^T X   [V, D]     db += G^T 1
//
// On a GPU tiles of classes may take the place of blocks of rows: ops/linear_plan.cpp chooses.
//
// On the CPU, rows whose target is ignored are left out, unless their lse or entropy is needed. On CUDA that would
// require waiting for the device.
#include <ATen/TensorOperators.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/index_select.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/ones_like.h>
#include <ATen/ops/sum.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

#include <algorithm>
#include <cmath>

#include "core/checks.h"
#include "cpu/gemm/gemm.h"
#include "ops/cross_entropy_call.h"
#include "ops/linear_class_tiles.h"
#include "ops/linear_plan.h"
#include "ops/linear_products.h"

namespace charlm {

// ---------------------------------------------------------------------------------------------------------- checks

namespace {

void check_matches(const Tensor& input, const Tensor& t, const char* name) {
  check_same_device(input, "input", t, name);
  TORCH_CHECK(input.scalar_type() == t.scalar_type(), "expected input and ", name, " to have the same dtype, but got ",
              input.scalar_type(), " and ", t.scalar_type());
}

}  // namespace

Tensor like_logits(const LinearCrossEntropyArguments& a) {
  c10::SymDimVector shape(a.input.sym_sizes().begin(), a.input.sym_sizes().end() - 1);
  shape.push_back(a.linear_weight.sym_size(0));
  return at::empty({1}, a.input.options()).expand_symint(shape);
}

void check_linear_cross_entropy(const LinearCrossEntropyArguments& a) {
  TORCH_CHECK(a.input.dim() == 1 || a.input.dim() == 2, "expected input with dimensionality 1 or 2, got ",
              a.input.dim());
  TORCH_CHECK(a.linear_weight.dim() == 2, "expected linear_weight with dimensionality 2, got ", a.linear_weight.dim());
  TORCH_CHECK(a.input.sym_size(-1) == a.linear_weight.sym_size(1),
              "expected equal input and linear_weight last dimensions (in_features), got ", a.input.sym_size(-1),
              " and ", a.linear_weight.sym_size(1), ", respectively");
  check_matches(a.input, a.linear_weight, "linear_weight");
  if (a.linear_bias) {
    check_matches(a.input, *a.linear_bias, "linear_bias");
    TORCH_CHECK(a.linear_bias->dim() == 1 && a.linear_bias->sym_size(0) == a.linear_weight.sym_size(0),
                "expected linear_bias shape ", a.linear_weight.sym_size(0), ", got ", a.linear_bias->sym_sizes());
  }
  TORCH_CHECK(a.block_rows >= 0, "block_rows must not be negative, got ", a.block_rows);
  TORCH_CHECK_VALUE(a.memory_budget >= 0, "memory_budget must be > 0, got ", a.memory_budget);
  TORCH_CHECK(a.gemm >= 0 && a.gemm <= 2, "gemm must be 0, 1 or 2, got ", a.gemm);
  check_cross_entropy(a.options, like_logits(a), a.target, a.weight, a.token_weight);
}

// ------------------------------------------------------------------------------------------------- rows and blocks

namespace {

constexpr int64_t kLogitsBytes = 64 << 20;  // of the logits that exist at once, on a CPU
constexpr int64_t kFastRows = 512;          // more make a product of a CPU no faster
constexpr int64_t kFastLogits = 1 << 20;    // ... unless they are short
constexpr int64_t kLogitsAtOnce = 1 << 19;  // so few are faster without blocks
constexpr int64_t kMultiple = 16;           // the rows of a kernel's tile, and 64 bytes of float
constexpr int64_t kMinPaddedRow = 257;      // tiles of rows of fewer classes need rows without gaps

// The call's tensors as rows.
class Rows {
 public:
  explicit Rows(const LinearCrossEntropyArguments& arguments) : a(arguments), is_gpu(Device(arguments.input).is_gpu()) {
    const bool one = a.input.dim() == 1;
    x = one ? a.input.unsqueeze(0) : a.input;
    probabilities = has_probabilities(like_logits(a), a.target);
    target = probabilities ? a.target.reshape({x.size(0), n_classes()}) : a.target.reshape({x.size(0)}).contiguous();
    if (a.token_weight) token_weight = a.token_weight->reshape({x.size(0)});
    if (!probabilities) check_targets();
  }

  const LinearCrossEntropyArguments a;
  const bool is_gpu;
  bool probabilities;
  Tensor x;                     // [N, D]
  Tensor target;                // [N], or [N, V] probabilities
  OptionalTensor token_weight;  // [N]
  Tensor counted;               // [N] bool: targets that are not ignored; undefined: all

  int64_t size() const { return x.size(0); }
  int64_t n_classes() const { return a.linear_weight.size(0); }

  // On the CPU: the rows whose targets are not ignored, of which `positions` are the places among all; undefined: all.
  Rows only_counted(Tensor& positions) const {
    if (!counted.defined() || is_gpu) return *this;
    positions = counted.nonzero().squeeze(1);
    if (positions.size(0) == size()) {
      positions.reset();
      return *this;
    }
    Rows some = *this;
    some.target = target.index_select(0, positions);
    if (token_weight) some.token_weight = token_weight->index_select(0, positions);
    some.counted.reset();
    return some;
  }

  // What a mean divides by: the sum of the weights of the targets that are not ignored; double, ().
  Tensor total() const {
    const auto as_double = x.options().dtype(at::kDouble);
    Tensor share = token_weight ? token_weight->to(at::kDouble) : at::ones({target.size(0)}, as_double);
    if (a.weight && !probabilities && n_classes() > 0) {
      const Tensor known = target.to(at::kLong).clamp(0, n_classes() - 1);
      share = share * a.weight->to(at::kDouble).index_select(0, known);
    }
    if (counted.defined()) share = at::where(counted, share, at::zeros({}, as_double));
    Tensor sum = share.sum();
    if (!a.options.zero_if_all_ignored) return n_classes() > 0 ? sum : sum * NAN;
    if (!counted.defined()) return target.size(0) > 0 ? sum : at::ones({}, as_double);
    return at::where(counted.any(), sum, at::ones({}, as_double));
  }

 private:
  // IndexError for the first target that is no class, before anything is computed: on CUDA the kernels record it.
  void check_targets() {
    const Tensor index = target.to(at::kLong);
    // A uint64 target of 2^63 or more is negative here, but is never ignore_index.
    const bool may_ignore = target.scalar_type() != at::kUInt64 || a.options.ignore_index >= 0;
    counted = may_ignore ? index.ne(a.options.ignore_index) : at::ones(index.sizes(), index.options().dtype(at::kBool));
    if (is_gpu) return;
    const Tensor bad = index.lt(0).logical_or_(index.ge(n_classes())).logical_and_(counted);
    if (bad.any().item<bool>()) {
      raise_out_of_range(a.target, bad.nonzero()[0][0].item<int64_t>(), n_classes(), "target", "classes");
    }
    target = index;
  }
};

// Blocks of equal size for n rows, of at most `most` rows.
int64_t equal_blocks(int64_t n, int64_t most) {
  if (most > kMultiple) most -= most % kMultiple;
  const int64_t n_blocks = (n + most - 1) / most, size = (n + n_blocks - 1) / n_blocks;
  return std::min(most, (size + kMultiple - 1) / kMultiple * kMultiple);
}

// Of n rows, how many make a block on a CPU: their logits are within the budget.
int64_t block_rows_on_cpu(const Rows& rows, int64_t n) {
  if (n == 0) return 1;
  const LinearCrossEntropyArguments& a = rows.a;
  if (a.block_rows > 0) return std::min(a.block_rows, n);
  const bool widened = is_widened(a), half = rows.x.scalar_type() != compute_dtype(rows.x);
  int64_t row_bytes = rows.n_classes() * (widened ? 4 : rows.x.element_size());
  if (widened && rows.probabilities) row_bytes *= 2;  // these are converted in addition
  const int64_t budget = a.memory_budget > 0 ? a.memory_budget : kLogitsBytes;
  const int64_t most = std::max<int64_t>(1, budget / std::max<int64_t>(1, row_bytes));
  // A gradient of W of one block needs no sum in float: up to here that would be the larger of the two.
  if (half && !widened && n <= 2 * rows.x.size(1) && (a.memory_budget == 0 || n <= most)) return n;
  return equal_blocks(n, std::min(most, std::max(kFastRows, kFastLogits / std::max<int64_t>(1, rows.n_classes()))));
}

LinearPlan plan_on_gpu(const LinearCrossEntropyArguments& a, bool with_gradients, OutputMask mask, bool may_tile) {
  const int64_t n = a.input.dim() == 1 ? 1 : a.input.size(0);
  if (a.block_rows > 0) return {.block_rows = a.block_rows};
  const LinearSizes sizes{.n_rows = n,
                          .n_features = a.linear_weight.size(1),
                          .n_classes = a.linear_weight.size(0),
                          .element_size = a.input.element_size(),
                          .is_half = a.input.scalar_type() != compute_dtype(a.input),
                          .with_gradients = with_gradients,
                          .wants_input = with_gradients && mask[0],
                          .wants_weight = with_gradients && mask[1],
                          .may_tile = may_tile && a.options.label_smoothing <= 0 &&
                                      !has_probabilities(like_logits(a), a.target) && !is_widened(a),
                          .budget = a.memory_budget > 0 ? a.memory_budget : kDefaultMemoryBudget};
  LinearPlan plan = choose_linear_plan_on_gpu(sizes);
  if (plan.block_rows > 0 && plan.block_rows < n) plan.block_rows = equal_blocks(n, plan.block_rows);
  return plan;
}

// The blocks of a call, with their logits.
class LogitBlocks {
 public:
  // `positions`: see Rows::only_counted(). `block_rows`: on a GPU.
  LogitBlocks(const Rows& rows, Tensor positions, int64_t block_rows)
      : rows_(rows),
        positions_(std::move(positions)),
        n_(positions_.defined() ? positions_.size(0) : rows.size()),
        size_(rows.is_gpu ? block_rows : block_rows_on_cpu(rows, n_)),
        products_(new_products(rows.a, /*one_block=*/n_ <= size_)) {}

  LinearProducts& products() { return *products_; }

  // f(first, x [n, D], logits [n, V], padded [n, V']): the memory of the logits, which `padded` has with the classes of
  // padding, is one for all blocks.
  template <class F>
  void for_each(F f) {
    Tensor memory;
    // With rows that begin at multiples of 64 bytes the products of 50257 classes take 9 % less time (bench/NOTES.md).
    const int64_t n_classes = products_->n_classes();
    const bool has_gaps =
        n_classes >= kMinPaddedRow && !(rows_.is_gpu && n_classes == padded_classes(n_classes, rows_.x.element_size()));
    const int64_t row_stride = has_gaps ? (n_classes + kMultiple - 1) / kMultiple * kMultiple : n_classes;
    for (int64_t first = 0; first < n_; first += size_) {
      const int64_t n = std::min(size_, n_ - first);
      const Tensor x = (positions_.defined() ? at::index_select(rows_.x, 0, positions_.narrow(0, first, n))
                                             : rows_.x.narrow(0, first, n))
                           .to(products_->dtype());
      if (!memory.defined()) {
        memory = new_memory({n, row_stride}, x.options());
        // oneDNN's products of bfloat16 by AMX read behind a row, times 0: a NaN there would be one in the product.
        if (has_gaps && !rows_.is_gpu) memory.narrow(1, n_classes, row_stride - n_classes).zero_();
      }
      const Tensor padded = memory.narrow(0, 0, n).narrow(1, 0, n_classes);
      products_->logits(x, padded);
      Tensor logits = padded.narrow(1, 0, rows_.n_classes());
      f(first, x, logits, padded);
    }
  }

  // Writes what belongs to the rows of the block at `first`: all[...] = block [n, ...].
  void put(Tensor& all, int64_t first, const Tensor& block) const {
    if (positions_.defined()) {
      all.index_copy_(0, positions_.narrow(0, first, block.size(0)), block);
    } else {
      all.narrow(0, first, block.size(0)).copy_(block);
    }
  }

  // dX[...] = g W
  void put_input_gradient(Tensor& all, int64_t first, const Tensor& g) {
    const int64_t n = g.size(0);
    if (!positions_.defined()) return products_->input_gradient(g, all.narrow(0, first, n));
    const Tensor block = new_memory({n, all.size(1)}, all.options());
    products_->input_gradient(g, block);
    put(all, first, block);
  }

 private:
  const Rows& rows_;
  Tensor positions_;
  int64_t n_, size_;
  std::unique_ptr<LinearProducts> products_;
};

Tensor reduced(const LinearCrossEntropyArguments& a, const Tensor& losses, const Tensor& total) {
  if (a.options.is(Reduction::kNone)) return losses.to(loss_dtype(a)).view(a.input.sizes().slice(0, a.input.dim() - 1));
  const Tensor sum = losses.sum(at::kDouble);
  return (total.defined() ? sum / total : sum).to(loss_dtype(a));
}

// The gradient of each row's loss, one for all or [N]; undefined where no gradient is wanted.
Tensor grad_of_rows(const Rows& rows, const OptionalTensor& grad_loss, const Tensor& total, const Tensor& positions) {
  const at::ScalarType dtype = compute_dtype(rows.x);
  if (rows.a.options.is(Reduction::kNone)) {
    TORCH_CHECK_VALUE(grad_loss, "with reduction \"none\" the gradients need that of each loss");
    const Tensor all = grad_loss->reshape({rows.size()}).to(dtype).contiguous();
    return positions.defined() ? all.index_select(0, positions) : all;
  }
  Tensor one = grad_loss ? grad_loss->to(at::kDouble).reshape({}) : at::ones({}, rows.x.options().dtype(at::kDouble));
  return (total.defined() ? one / total : one).to(dtype);
}

// ------------------------------------------------------------------------------------------- all logits at once

// On the CPU, few logits that are computed in their own dtype: what blocks need in addition to the products would take
// longer than the products.
bool fits_at_once(const LinearCrossEntropyArguments& a) {
  const int64_t n_logits = a.input.dim() == 2 ? a.input.size(0) * a.linear_weight.size(0) : 0;
  return !Device(a.input).is_gpu() && a.input.dim() == 2 && a.block_rows == 0 &&
         (a.memory_budget == 0 || n_logits * a.input.element_size() <= a.memory_budget) &&
         a.input.scalar_type() == compute_dtype(a.input) && !a.options.is(Reduction::kNone) &&
         n_logits <= kLogitsAtOnce;
}

Tensor product(const Tensor& a, const Tensor& b, const OptionalTensor& start = {}) {
  const Tensor result = new_memory({a.size(0), b.size(1)}, a.options());
  multiply(result, a, b, start);
  return result;
}

// [V], the sum of contiguous rows [N, V] of C, in double.
template <class C>
Tensor sum_of_rows(const Tensor& rows) {
  const int64_t n_classes = rows.size(1);
  c10::SmallVector<double, 256> sums(n_classes, 0.0);
  const C* row = const_data<C>(rows);
  for (int64_t n = 0; n < rows.size(0); n++, row += n_classes) {
    for (int64_t c = 0; c < n_classes; c++) sums[c] += row[c];
  }
  const Tensor result = at::empty({n_classes}, rows.options());
  std::copy(sums.begin(), sums.end(), mutable_data<C>(result));
  return result;
}

// All logits at once, or nothing if a target is ignored.
template <class C>
std::optional<LossAndGradients> run_at_once(const LinearCrossEntropyArguments& a, bool with_gradients,
                                            const OptionalTensor& grad_loss, OutputMask mask) {
  const Tensor logits = new_memory({a.input.size(0), a.linear_weight.size(0)}, a.input.options());
  CrossEntropyCall<C> call(a.options, logits, a.target, a.weight, a.token_weight);
  if (call.n_ignored() > 0) return std::nullopt;
  multiply(logits, a.input, a.linear_weight.t(), a.linear_bias);
  const Tensor loss = at::empty({}, a.input.options()), state = at::empty({3, logits.size(0)}, a.input.options());
  call.set_state(state);
  if (with_gradients && !grad_loss) call.set_gradient(logits, nullptr, /*one_for_each_row=*/false);
  call.forward(loss);
  if (!with_gradients) return LossAndGradients{loss, Tensor(), Tensor(), Tensor()};
  if (grad_loss) {
    const C grad = grad_loss->item<C>();
    call.set_gradient(logits, &grad, /*one_for_each_row=*/false);
    call.backward();
  }
  const Tensor none = at::empty({0}, a.input.options());
  return LossAndGradients{loss, mask[0] ? product(logits, a.linear_weight) : none,
                          mask[1] ? product(logits.t(), a.input) : none, mask[2] ? sum_of_rows<C>(logits) : none};
}

// The classes of padding of a gradient, which a row of NaN or inf has made NaN.
void clear_padding(const Tensor& padded, int64_t n_classes) {
  if (padded.size(1) > n_classes) padded.narrow(1, n_classes, padded.size(1) - n_classes).zero_();
}

// On a GPU, all logits at once: the kernels reduce the losses.
template <class T>
LossAndGradients run_whole_on_gpu(const LinearCrossEntropyArguments& a, bool with_gradients,
                                  const OptionalTensor& grad_loss, OutputMask mask) {
  const Tensor x = a.input.dim() == 1 ? a.input.unsqueeze(0) : a.input;
  const int64_t n = x.size(0), n_classes = a.linear_weight.size(0);
  const bool probabilities = has_probabilities(like_logits(a), a.target);
  const auto products = new_products(a, /*one_block=*/true);
  const Tensor padded = at::empty({n, products->n_classes()}, x.options().dtype(products->dtype()));
  const Tensor logits = padded.narrow(1, 0, n_classes), x_in = x.to(products->dtype());
  products->logits(x_in, padded);
  const Tensor target = probabilities ? a.target.reshape({n, n_classes}) : a.target.reshape({n});
  const OptionalTensor token_weight = a.token_weight ? OptionalTensor(a.token_weight->reshape({n})) : std::nullopt;
  const Tensor loss = at::empty({}, a.input.options().dtype(loss_dtype(a)));
  const Tensor state = at::empty({3, n}, a.input.options().dtype(compute_dtype(a.input)));
  const Tensor grad = grad_loss ? grad_loss->to(compute_dtype(a.input)).contiguous() : Tensor();
  CrossEntropyCall<T> call(a.options, logits, target, a.weight, token_weight, a.target, 0);
  call.set_state(state);
  if (with_gradients) {
    call.set_gradient(logits, grad.defined() ? const_data<Compute<T>>(grad) : nullptr, /*one_for_each_row=*/false);
  }
  call.forward(loss);
  if (!with_gradients) return {loss, Tensor(), Tensor(), Tensor()};
  clear_padding(padded, n_classes);
  const Tensor none = at::empty({0}, a.input.options());
  LossAndGradients results{loss, none, none, none};
  if (mask[0]) {
    Tensor& grad_input = std::get<1>(results) = at::empty(x.sizes(), x.options());
    products->input_gradient(padded, grad_input);
    grad_input = grad_input.view(a.input.sizes());
  }
  if (mask[1]) {
    products->add_weight_gradient(padded, x_in);
    std::get<2>(results) = products->weight_gradient();
  }
  if (mask[2]) {
    products->add_bias_gradient(logits);
    std::get<3>(results) = products->bias_gradient();
  }
  return results;
}

// ------------------------------------------------------------------------------------------------- implementation

LossAndGradients run(const LinearCrossEntropyArguments& a, bool with_gradients, const OptionalTensor& grad_loss,
                     const MetricGradients& metric_grads, OutputMask mask) {
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);  // a backward may be under it
  check_linear_cross_entropy(a);
  if (fits_at_once(a) && !metric_grads.is_any()) {
    const auto result = a.input.scalar_type() == at::kDouble ? run_at_once<double>(a, with_gradients, grad_loss, mask)
                                                             : run_at_once<float>(a, with_gradients, grad_loss, mask);
    if (result) return *result;
  }
  const bool is_gpu = Device(a.input).is_gpu();
  const LinearPlan plan = is_gpu ? plan_on_gpu(a, with_gradients, mask, /*may_tile=*/true) : LinearPlan{};
  const bool is_whole = is_gpu && plan.block_rows >= (a.input.dim() == 1 ? 1 : a.input.size(0)) &&
                        a.input.numel() > 0 && a.linear_weight.size(0) > 0 && !is_widened(a);
  if (is_whole && !metric_grads.is_any() && !a.options.is(Reduction::kNone)) {
    return with_float_type(a.input.scalar_type(), "linear_cross_entropy",
                           [&]<class T>() { return run_whole_on_gpu<T>(a, with_gradients, grad_loss, mask); });
  }
  const Rows all(a);
  Tensor positions;
  const Rows rows = metric_grads.is_any() ? all : all.only_counted(positions);  // every row has an lse
  const Tensor total = a.options.is(Reduction::kMean) ? rows.total() : Tensor();
  const auto compute = a.input.options().dtype(compute_dtype(a.input));
  OptionalTensor g;
  if (with_gradients) g = grad_of_rows(all, grad_loss, total, positions);
  const Tensor none = with_gradients ? at::empty({0}, a.input.options()) : Tensor();
  if (is_gpu && plan.block_rows == 0) {
    const TiledResults of_tiles =
        run_tiles_of_classes({a, all.x, all.target, all.token_weight, g, metric_grads, mask}, plan);
    return {reduced(a, of_tiles.losses, total), mask[0] ? of_tiles.grad_input.view(a.input.sizes()) : none,
            mask[1] ? of_tiles.grad_weight : none, mask[2] ? of_tiles.grad_bias : none};
  }
  Tensor losses = at::zeros({all.size()}, compute), grad_input;
  if (mask[0]) grad_input = new_memory(all.x.sizes(), a.input.options());
  if (mask[0] && positions.defined()) grad_input.zero_();

  LogitBlocks blocks(all, positions, plan.block_rows);
  blocks.for_each([&](int64_t first, const Tensor& x, Tensor& logits, const Tensor& padded) {
    blocks.put(
        losses, first,
        cross_entropy_of_rows_(a.options, logits, rows.target, a.weight, rows.token_weight, g, metric_grads, first));
    if (with_gradients) clear_padding(padded, logits.size(1));
    if (mask[0]) blocks.put_input_gradient(grad_input, first, padded);
    if (mask[1]) blocks.products().add_weight_gradient(padded, x);
    if (mask[2]) blocks.products().add_bias_gradient(logits);
  });
  return {reduced(a, losses, total), mask[0] ? grad_input.view(a.input.sizes()) : none,
          mask[1] ? blocks.products().weight_gradient() : none, mask[2] ? blocks.products().bias_gradient() : none};
}

Tensor forward(const LinearCrossEntropyArguments& a) {
  return std::get<0>(run(a, /*with_gradients=*/false, {}, {}, {}));
}

LossAndGradients gradients(const LinearCrossEntropyArguments& a, const OptionalTensor& grad_loss,
                           const OptionalTensor& grad_lse, const OptionalTensor& grad_entropy,
                           const OptionalTensor& entropy, OutputMask mask) {
  const auto of_rows = [&](const OptionalTensor& t) {
    return t ? metric_of_rows(*t, a.input, leading_sizes(a.input)) : Tensor();
  };
  TORCH_CHECK(!grad_entropy || entropy, "grad_entropy needs entropy");
  mask[2] = mask[2] && a.linear_bias;
  return run(a, /*with_gradients=*/true, grad_loss, {of_rows(grad_lse), of_rows(grad_entropy), of_rows(entropy)}, mask);
}

CrossEntropyMetricsTuple metrics(const LinearCrossEntropyArguments& a) {
  check_linear_cross_entropy(a);
  const Rows rows(a);
  const auto shape = a.input.sizes().slice(0, a.input.dim() - 1);
  const auto compute = a.input.options().dtype(compute_dtype(a.input));
  Tensor lse = at::empty({rows.size()}, compute), entropy = at::empty({rows.size()}, compute);
  Tensor predicted = at::empty({rows.size()}, a.input.options().dtype(at::kLong));
  Tensor is_correct = at::empty({rows.size()}, a.input.options().dtype(at::kFloat));
  const int64_t block_rows =
      rows.is_gpu ? plan_on_gpu(a, /*with_gradients=*/false, {}, /*may_tile=*/false).block_rows : 0;
  LogitBlocks blocks(rows, {}, block_rows);
  blocks.for_each([&](int64_t first, const Tensor&, const Tensor& logits, const Tensor&) {
    const CrossEntropyMetrics of_block =
        cross_entropy_metrics_of_rows(a.options, logits, rows.target.narrow(0, first, logits.size(0)));
    blocks.put(lse, first, of_block.lse);
    blocks.put(entropy, first, of_block.entropy);
    blocks.put(predicted, first, of_block.predicted_tokens);
    blocks.put(is_correct, first, of_block.is_correct);
  });
  const Tensor counted = rows.counted.defined() ? rows.counted : at::ones_like(is_correct, at::kBool);
  return {lse.view(shape), entropy.view(shape), predicted.view(shape),
          token_accuracy(a.options, is_correct.view(shape), counted)};
}

LossAndMetrics with_metrics(const LinearCrossEntropyArguments& a) {
  return std::tuple_cat(std::make_tuple(forward(a)), metrics(a));
}

// ----------------------------------------------------------------------------------------------------------- shapes

Tensor meta_forward(const LinearCrossEntropyArguments& a) {
  check_linear_cross_entropy(a);
  const auto shape = a.options.is(Reduction::kNone) ? loss_shape(like_logits(a)) : c10::SymDimVector{};
  return at::empty_symint(shape, a.input.options().dtype(loss_dtype(a)));
}

LossAndGradients meta_gradients(const LinearCrossEntropyArguments& a, const OptionalTensor&, const OptionalTensor&,
                                const OptionalTensor&, const OptionalTensor&, OutputMask mask) {
  const auto empty_like = [&](bool wanted, const OptionalTensor& t) {
    return wanted && t ? at::empty_symint(t->sym_sizes(), t->options()) : at::empty({0}, a.input.options());
  };
  return {meta_forward(a), empty_like(mask[0], a.input), empty_like(mask[1], a.linear_weight),
          empty_like(mask[2], a.linear_bias)};
}

CrossEntropyMetricsTuple meta_metrics(const LinearCrossEntropyArguments& a) {
  check_linear_cross_entropy(a);
  return cross_entropy_metrics_meta(a.options, like_logits(a), a.target);
}

LossAndMetrics meta_with_metrics(const LinearCrossEntropyArguments& a) {
  return std::tuple_cat(std::make_tuple(meta_forward(a)), meta_metrics(a));
}

}  // namespace

#define ARGUMENTS                                                                                                     \
  "Tensor input, Tensor linear_weight, Tensor target, Tensor? linear_bias, Tensor? weight, Tensor? token_weight, "    \
  "bool unrounded, int block_rows, int gemm, int reduction, int ignore_index, float label_smoothing, "                \
  "float lse_square_scale, float softcap, float logit_scale, bool zero_if_all_ignored, ScalarType? loss_dtype=None, " \
  "int memory_budget=0)"

TORCH_LIBRARY_FRAGMENT(charlm, m) {
  m.def("linear_cross_entropy(" ARGUMENTS " -> Tensor");
  m.def("linear_cross_entropy_metrics(" ARGUMENTS
        " -> (Tensor lse, Tensor entropy, Tensor predicted_tokens, Tensor token_accuracy)");
  // lse and entropy are differentiable, so forward computes no gradient of the loss.
  m.def("linear_cross_entropy_with_metrics(" ARGUMENTS
        " -> (Tensor loss, Tensor lse, Tensor entropy, Tensor predicted_tokens, Tensor token_accuracy)");
  // The loss, and the gradients of input, linear_weight and linear_bias that are in output_mask. grad_loss: None for 1.
  m.def(
      "_linear_cross_entropy_gradients(Tensor? grad_loss, Tensor? grad_lse, Tensor? grad_entropy, Tensor? entropy, "
      "bool[3] output_mask, " ARGUMENTS
      " -> (Tensor loss, Tensor grad_input, Tensor grad_linear_weight, Tensor grad_linear_bias)");
  implement(m, "linear_cross_entropy", FlatLinear<&forward>::call);
  implement(m, "linear_cross_entropy_metrics", FlatLinear<&metrics>::call);
  implement(m, "linear_cross_entropy_with_metrics", FlatLinear<&with_metrics>::call);
  implement(m, "_linear_cross_entropy_gradients", FlatLinear<&gradients>::call);
}

TORCH_LIBRARY_IMPL(charlm, Meta, m) {
  m.impl("linear_cross_entropy", FlatLinear<&meta_forward>::call);
  m.impl("linear_cross_entropy_metrics", FlatLinear<&meta_metrics>::call);
  m.impl("linear_cross_entropy_with_metrics", FlatLinear<&meta_with_metrics>::call);
  m.impl("_linear_cross_entropy_gradients", FlatLinear<&meta_gradients>::call);
}

}  // namespace charlm
