// cross_entropy's autograd, functorch and autocast. For a mean or a sum the gradient of the loss is nearly always 1, so
// forward computes the logits' gradient in the same pass, and backward returns it. For any other grad_loss, and always
// for float16, backward computes it from the logits and the state of each row: nothing is rounded before the scale is
// known.
#include <ATen/Functions.h>
#include <ATen/SavedTensorHooks.h>
#include <ATen/TensorOperators.h>
#include <ATen/core/grad_mode.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <torch/csrc/autograd/VariableTypeUtils.h>

#include <array>
#include <atomic>
#include <cmath>
#include <utility>

#include "core/autograd_node.h"
#include "core/checks.h"
#include "ops/cross_entropy_op.h"

namespace charlm {

// -------------------------------------------------------------------------------------------------------- formula

namespace {

Tensor transformed(const CrossEntropyOptions& options, const Tensor& input) {
  Tensor z = input.to(compute_dtype(input));
  if (options.logit_scale != 1) z = z * options.logit_scale;
  const double softcap =
      z.scalar_type() == at::kDouble ? softcap_as<double>(options.softcap) : softcap_as<float>(options.softcap);
  return softcap > 0 ? (z / softcap).tanh() * softcap : z;
}

// [C] with a dimension for each of `input`, so that it broadcasts along the classes.
Tensor along_classes(const Tensor& weight, const Tensor& input) {
  c10::SymDimVector shape(input.dim(), 1);
  shape[class_dim(input)] = weight.sym_size(0);
  return weight.view_symint(shape);
}

Tensor reduced(const CrossEntropyOptions& options, const Tensor& loss, const Tensor& share, const Tensor& counted) {
  if (options.is(Reduction::kNone)) return loss;
  if (options.is(Reduction::kSum)) return loss.sum();
  Tensor divisor = share.sum();
  if (options.zero_if_all_ignored) divisor = at::where(counted.any(), divisor, at::ones_like(divisor));
  return loss.sum() / divisor;
}

}  // namespace

Tensor cross_entropy_formula(const CrossEntropyOptions& options, const Tensor& input, const Tensor& given_target,
                             const OptionalTensor& given_weight, const OptionalTensor& given_token_weight) {
  check_cross_entropy(options, input, given_target, given_weight, given_token_weight);
  const int64_t dim = class_dim(input);
  const double smoothing = std::max(0.0, options.label_smoothing);
  const Tensor z = transformed(options, input);
  const Tensor log_p = z.log_softmax(dim);
  const Tensor weight = given_weight ? given_weight->to(z.scalar_type()) : Tensor();
  const Tensor class_weight = weight.defined() ? along_classes(weight, input) : Tensor();

  Tensor loss, share, counted;  // of each target: its loss, its weight in a mean, false if it is ignored
  Tensor square = options.lse_square_scale != 0 ? z.logsumexp(dim).square() * options.lse_square_scale : Tensor();
  if (has_probabilities(input, given_target)) {
    const Tensor weighted = weight.defined() ? log_p * class_weight : log_p;
    loss = -(given_target.to(z.scalar_type()) * weighted).sum(dim) * (1 - smoothing);
    if (smoothing > 0) loss = loss - weighted.mean(dim) * smoothing;
    share = at::ones_like(loss);
    counted = at::ones_like(loss, at::kBool);
    if (square.defined()) loss = loss + square;
  } else {
    const auto shape = loss_shape(input);
    Tensor target = given_target.to(at::kLong).reshape_symint(shape);
    counted = target.ne(options.ignore_index);
    target = at::where(counted, target, at::zeros_like(target));
    const Tensor nothing = at::zeros_like(target, z.options());
    const Tensor log_p_target = log_p.gather(dim, target.unsqueeze(dim)).squeeze(dim);
    const Tensor weights = weight.defined() ? weight.index({target}) : at::ones_like(target, z.options());
    share = at::where(counted, weights, nothing);
    loss = -log_p_target * weights * (1 - smoothing);
    if (smoothing > 0) {
      loss = loss - (weight.defined() ? log_p * class_weight : log_p).mean(dim) * smoothing;
    }
    if (square.defined()) loss = loss + square * weights;
    loss = at::where(counted, loss, nothing);
  }
  if (given_token_weight) {
    const Tensor token_weight = given_token_weight->to(z.scalar_type()).reshape_symint(loss_shape(input));
    loss = loss * token_weight;
    share = share * token_weight;
  }
  return reduced(options, loss, share, counted).to(loss_dtype_of(options, input));
}

std::tuple<Tensor, Tensor> lse_and_entropy_formula(const CrossEntropyOptions& options, const Tensor& input) {
  const int64_t dim = class_dim(input);
  const Tensor z = transformed(options, input), log_p = z.log_softmax(dim);
  return {z.logsumexp(dim), -(log_p.exp() * log_p.masked_fill(log_p == -INFINITY, 0)).sum(dim)};
}

// Precomputed is a gradient that depends on grad_loss by a factor only. Traced calls keep to ops whose results do not
// depend on the value of that factor. Where hooks handle saved tensors (activation checkpointing, offloading), nothing
// of the logits' size is kept beside them. In float16 small entries would be lost before a GradScaler's factor is
// known.
bool may_precompute_gradient(const CrossEntropyOptions& options, const Tensor& input) {
  return !options.is(Reduction::kNone) && input.scalar_type() != at::kHalf && is_plain(input) &&
         !c10::impl::TorchDispatchModeTLS::any_modes_set() &&
         !at::SavedTensorDefaultHooks::get_hooks(/*ignore_is_tracing=*/true).has_value();
}

namespace {

// ------------------------------------------------------------------------------------------------ out of place

// A node of cross_entropy. Its last options are CrossEntropyOptions, which Derived::of_call receives as one argument.
template <class Derived, class... Before>
class CrossEntropyNode
    : public KernelNode<Derived, 6, Before..., int64_t, int64_t, double, double, double, double, bool> {
 public:
  enum { kInput, kTarget, kWeight, kTokenWeight, kState, kEntropy };

  void set_options(const CrossEntropyOptions& o, Before... before) {
    this->options = {before...,          o.reduction, o.ignore_index, o.label_smoothing,
                     o.lse_square_scale, o.softcap,   o.logit_scale,  o.zero_if_all_ignored};
  }

  static variable_list gradients(const BackwardCall& call, Before... before, int64_t reduction, int64_t ignore_index,
                                 double label_smoothing, double lse_square_scale, double softcap, double logit_scale,
                                 bool zero_if_all_ignored) {
    return Derived::of_call(
        call, {reduction, ignore_index, label_smoothing, lse_square_scale, softcap, logit_scale, zero_if_all_ignored},
        before...);
  }
};

using BackwardOp = CrossEntropyOp<std::tuple<Tensor, Tensor>, const Tensor&, const Tensor&, const Tensor&,
                                  const OptionalTensor&, const OptionalTensor&, const Tensor&, const OptionalTensor&,
                                  const OptionalTensor&, const OptionalTensor&, std::array<bool, 2>>;

const BackwardOp& backward_op() {
  static const BackwardOp op("charlm::_cross_entropy_backward");
  return op;
}

struct CrossEntropyBackward final : CrossEntropyNode<CrossEntropyBackward> {
  static constexpr const char* kName = "CrossEntropyBackward";

  Tensor precomputed;  // the logits' gradient for unit grad_loss, if forward computed it; used once

  // Outputs: the loss, and for cross_entropy_with_metrics lse and entropy.
  static variable_list of_call(const BackwardCall& call, CrossEntropyOptions options) {
    const Tensor x = call.saved(kInput), y = call.saved(kTarget);
    const bool has_metrics = call.grads.size() > 1;
    const OptionalTensor w = call.optional(kWeight), t = call.optional(kTokenWeight);
    if (at::GradMode::is_enabled()) {
      raise_recorded_index_error(y);
      if (call.grads[0].defined()) options.loss_dtype = call.grads[0].scalar_type();
      return call.differentiate({x, y, tensor_or_undefined(w)}, [&](const variable_list& in) -> variable_list {
        const Tensor loss = cross_entropy_formula(options, in[0], in[1], optional_if_defined(in[2]), t);
        if (!has_metrics) return {loss};
        const auto [lse, entropy] = lse_and_entropy_formula(options, in[0]);
        return {loss, lse, entropy};
      });
    }
    const auto zeros = [&] {
      const auto shape = options.is(Reduction::kNone) ? loss_shape(x) : c10::SymDimVector{};
      return at::zeros_symint(shape, x.options().dtype(compute_dtype(x)));
    };
    const Tensor grad_loss = call.grads[0].defined() ? call.grads[0] : zeros();
    const auto grad_of = [&](size_t i) { return has_metrics ? optional_if_defined(call.grads[i]) : std::nullopt; };
    const Tensor state = call.saved(kState);
    variable_list result(3);  // input, target, weight
    if (call.needs(0) || call.needs(1)) {
      std::tie(result[0], result[1]) = backward_op()(options, grad_loss, x, y, w, t, state, grad_of(1), grad_of(2),
                                                     call.optional(kEntropy), {call.needs(0), call.needs(1)});
    }
    if (call.needs(2)) result[2] = weight_gradient(options, grad_loss, x, y, t, state).to(w->scalar_type());
    return result;
  }

  // With neither weight nor smoothing, the targets' gradient is -log p times the gradient of each row's loss; the
  // weight's is the sum over rows of that times the (smoothed) targets. In float: it is rounded once, at the end.
  static Tensor weight_gradient(const CrossEntropyOptions& options, const Tensor& grad_loss, const Tensor& x,
                                const Tensor& y, const OptionalTensor& t, const Tensor& state) {
    CrossEntropyOptions plain = options;
    plain.label_smoothing = 0;
    const double smoothing = std::max(0.0, options.label_smoothing);
    const at::ScalarType compute = compute_dtype(x);
    const Tensor p = y.to(compute);
    const Tensor minus_log_p =
        std::get<1>(backward_op()(plain, grad_loss, x.to(compute), p, {}, t, state, {}, {}, {}, {false, true}));
    const c10::SymInt classes = n_classes(x);
    const Tensor grad =
        minus_log_p * (p * (1 - smoothing) + smoothing / static_cast<double>(classes.guard_int(__FILE__, __LINE__)));
    return x.dim() == 1 ? grad : grad.movedim(1, -1).reshape_symint({-1, classes}).sum(0);
  }

 private:
  variable_list backward(const BackwardCall& call) override {
    Tensor grad = std::exchange(precomputed, Tensor());
    const Tensor& grad_loss = call.grads[0];
    if (!grad.defined() || at::GradMode::is_enabled() || !is_plain(grad_loss)) return KernelNode::backward(call);
    const auto rescale = [&](auto... options) {
      at::AutoDispatchBelowADInplaceOrView guard;
      cross_entropy_rescale_({options...}, grad, grad_loss, call.saved(kInput), call.saved(kTarget),
                             call.optional(kWeight), call.optional(kTokenWeight), call.saved(kState));
    };
    std::apply(rescale, options);
    return {grad, Tensor(), Tensor()};
  }

  void release_precomputed() override { precomputed.reset(); }
};

void check_no_derivative(const Tensor& target, const Tensor& input, const OptionalTensor& weight,
                         const OptionalTensor& token_weight) {
  if (!at::GradMode::is_enabled()) return;
  TORCH_CHECK(!requires_grad(weight) || has_probabilities(input, target),
              "the derivative for 'weight' is not implemented for class indices: it must not require grad");
  TORCH_CHECK(!requires_grad(token_weight),
              "the derivative for 'token_weight' is not implemented: it must not require grad");
}

LossAndState by_formula(const CrossEntropyOptions& options, const Tensor& input, const Tensor& target,
                        const OptionalTensor& weight, const OptionalTensor& token_weight) {
  return {cross_entropy_formula(options, input, target, weight, token_weight), at::empty({0}, input.options())};
}

LossAndState autograd(const CrossEntropyOptions& options, const Tensor& input, const Tensor& target,
                      const OptionalTensor& weight, const OptionalTensor& token_weight) {
  static const ForwardOp op("charlm::cross_entropy");
  if (const auto dtype = promoted_dtype(input, target, weight)) {
    return op(options, input.to(*dtype), target.to(*dtype), to(weight, *dtype), token_weight);
  }
  check_no_derivative(target, input, weight, token_weight);
  if (needs_formula(input) || needs_formula(target) || needs_formula(weight) || needs_formula(token_weight)) {
    return by_formula(options, input, target, weight, token_weight);
  }
  const auto below_autograd = [&] {
    at::AutoDispatchBelowADInplaceOrView guard;
    return op(options, input, target, weight, token_weight);
  };
  if (!at::GradMode::is_enabled() || !(requires_grad(input) || requires_grad(target) || requires_grad(weight))) {
    return below_autograd();
  }
  const auto node = make_node<CrossEntropyBackward>();
  node->set_next_edges(torch::autograd::collect_next_edges(input, target, tensor_or_undefined(weight)));
  Tensor loss, state;
  if (requires_grad(input) && !requires_grad(target) && !requires_grad(weight) &&
      may_precompute_gradient(options, input)) {
    at::AutoDispatchBelowADInplaceOrView guard;
    std::tie(loss, state, node->precomputed) =
        cross_entropy_forward_backward(options, input, target, weight, token_weight);
  } else {
    std::tie(loss, state) = below_autograd();
  }
  node->set_options(options);
  node->save(input, target, weight, token_weight, state, Tensor());
  torch::autograd::set_history(loss, node);
  return {loss, state};
}

// -------------------------------------------------------------------------------------------------- with metrics

using WithMetricsOp =
    CrossEntropyOp<LossStateAndMetrics, const Tensor&, const Tensor&, const OptionalTensor&, const OptionalTensor&>;

const WithMetricsOp& with_metrics_op() {
  static const WithMetricsOp op("charlm::cross_entropy_with_metrics");
  return op;
}

LossStateAndMetrics with_metrics_by_formula(const CrossEntropyOptions& options, const Tensor& input,
                                            const Tensor& target, const OptionalTensor& weight,
                                            const OptionalTensor& token_weight) {
  const auto [loss, state] = by_formula(options, input, target, weight, token_weight);
  const auto [lse, entropy] = lse_and_entropy_formula(options, input);
  const int64_t dim = class_dim(input);
  const Tensor predicted = transformed(options, input).argmax(dim);
  const bool probabilities = has_probabilities(input, target);
  const Tensor expected = probabilities ? target.argmax(dim) : target.to(at::kLong).reshape_symint(loss_shape(input));
  const Tensor counted = probabilities ? expected.eq(expected) : expected.ne(options.ignore_index);
  const Tensor right = predicted.eq(expected).logical_and(counted).to(at::kFloat);
  if (options.is(Reduction::kNone)) return {loss, state, lse, entropy, predicted, right};
  const Tensor n = counted.sum();
  return {loss, state, lse, entropy, predicted, right.sum().div(options.zero_if_all_ignored ? n.clamp_min(1) : n)};
}

LossStateAndMetrics with_metrics_autograd(const CrossEntropyOptions& options, const Tensor& input, const Tensor& target,
                                          const OptionalTensor& weight, const OptionalTensor& token_weight) {
  if (const auto dtype = promoted_dtype(input, target, weight)) {
    return with_metrics_op()(options, input.to(*dtype), target.to(*dtype), to(weight, *dtype), token_weight);
  }
  check_no_derivative(target, input, weight, token_weight);
  if (needs_formula(input) || needs_formula(target) || needs_formula(weight) || needs_formula(token_weight)) {
    return with_metrics_by_formula(options, input, target, weight, token_weight);
  }
  const auto below_autograd = [&] {
    at::AutoDispatchBelowADInplaceOrView guard;
    return with_metrics_op()(options, input, target, weight, token_weight);
  };
  if (!at::GradMode::is_enabled() || !(requires_grad(input) || requires_grad(target) || requires_grad(weight))) {
    return below_autograd();
  }
  const auto node = make_node<CrossEntropyBackward>();
  node->set_next_edges(torch::autograd::collect_next_edges(input, target, tensor_or_undefined(weight)));
  auto results = below_autograd();
  auto& [loss, state, lse, entropy, predicted_tokens, token_accuracy] = results;
  node->set_options(options);
  // Detached, or the output would hold the node that holds it.
  node->save(input, target, weight, token_weight, state, entropy.detach());
  torch::autograd::set_history(variable_list{loss, lse, entropy}, node);
  return results;
}

// ---------------------------------------------------------------------------------------------------- in place

// The history of logits whose memory is, or will be, their gradient: nothing may be differentiated through it.
struct OverwrittenLogitsBackward final : Node {
  std::string name() const override { return "OverwrittenLogitsBackward"; }
  variable_list apply(variable_list&&) override { refuse(); }
  void compiled_args(torch::dynamo::autograd::CompiledNodeArgs&) const override { refuse(); }

  [[noreturn]] static void refuse() {
    TORCH_CHECK(false,
                "these logits were given to cross_entropy(inplace=...), which turns their memory into their gradient: "
                "nothing else can be differentiated through them. Use inplace=None.");
    throw;  // not reached: tells the compiler that the check above does not return
  }
};

// Hands on the gradient that is in the logits' memory (written_by_forward), or writes it there.
struct CrossEntropyInplaceBackward final : CrossEntropyNode<CrossEntropyInplaceBackward, bool> {
  static constexpr const char* kName = "CrossEntropyInplaceBackward";

  static variable_list of_call(const BackwardCall& call, const CrossEntropyOptions& options, bool written_by_forward) {
    const Tensor& grad_loss = call.grads[0];
    Tensor memory = call.saved(kInput);
    if (written_by_forward) {
      at::AutoDispatchBelowADInplaceOrView guard;
      if (is_plain(memory) && is_plain(grad_loss)) {
        scale_gradient_(memory, grad_loss);
      } else {
        memory.mul_(grad_loss);
      }
    } else {
      using InplaceBackwardOp = CrossEntropyOp<void, Tensor&, const Tensor&, const Tensor&, const OptionalTensor&,
                                               const OptionalTensor&, const Tensor&>;
      static const InplaceBackwardOp op("charlm::_cross_entropy_backward_");
      op(options, memory, grad_loss, call.saved(kTarget), call.optional(kWeight), call.optional(kTokenWeight),
         call.saved(kState));
    }
    return {memory};
  }

  void compiled_args(torch::dynamo::autograd::CompiledNodeArgs& args) const override {
    use();
    KernelNode::compiled_args(args);
  }

 private:
  variable_list backward(const BackwardCall& call) override {
    TORCH_CHECK(!at::GradMode::is_enabled(),
                "cross_entropy(inplace=...) has no double backward (create_graph=True): use inplace=None.");
    use();
    return KernelNode::backward(call);
  }

  bool is_recorded_by_compiled_autograd() const override { return false; }

  // Once: backward writes the memory that it reads.
  void use() const {
    TORCH_CHECK(!used_.exchange(true),
                "cross_entropy(inplace=...) can go backward only once, and a backward has begun: use inplace=None.");
  }

  // Compiled autograd collects a node's state, which is const there, before it runs the node.
  mutable std::atomic<bool> used_ = false;
};

// Refuses, before anything is written, logits whose memory cannot become their gradient.
void check_can_be_overwritten(const Tensor& input, const Tensor& target, const OptionalTensor& weight,
                              const OptionalTensor& token_weight) {
  torch::autograd::check_inplace(input, /*requires_grad=*/true);
  TORCH_CHECK(!input.is_neg(),
              "cross_entropy(inplace=...): these logits are a lazily negated view, whose memory cannot become their "
              "gradient. Use inplace=None, or resolve_neg() them first.");
  TORCH_CHECK(!input.retains_grad(),
              "cross_entropy(inplace=...): these logits retain their gradient (retain_grad()), which would stay None, "
              "since their memory becomes the gradient. Use inplace=None, or read the logits after backward.");
  if (!is_plain(input) || input.numel() == 0) return;
  TORCH_CHECK(is_provably_without_overlap(input), "cross_entropy(inplace=...): logits of shape ", input.sizes(),
              " and strides ", input.strides(),
              " may overlap themselves in memory, so that writing one element changes another. Use inplace=None, or "
              "clone() them first.");
  const auto check_apart = [&](const OptionalTensor& other, const char* name) {
    TORCH_CHECK(!other || other->numel() == 0 || Footprint::are_apart(Footprint(input), Footprint(*other)),
                "cross_entropy(inplace=...): ", name,
                " may share memory with the logits, which are overwritten. Use inplace=None, or clone() it first.");
  };
  check_apart(target, "target");
  check_apart(weight, "weight");
  check_apart(token_weight, "token_weight");
}

[[noreturn]] LossAndState refuse_transforms(const CrossEntropyOptions&, Tensor&, const Tensor&, const OptionalTensor&,
                                            const OptionalTensor&) {
  TORCH_CHECK(false,
              "cross_entropy(inplace=...) works neither under torch.func's transforms nor in forward-mode AD: use "
              "inplace=None");
  throw;  // not reached: tells the compiler that the check above does not return
}

constexpr char kInplaceForward[] = "charlm::cross_entropy_inplace_forward";
constexpr char kInplaceBackward[] = "charlm::cross_entropy_inplace_backward";

template <const char* kName>
LossAndState cross_entropy_inplace(const CrossEntropyOptions& options, Tensor& input, const Tensor& target,
                                   const OptionalTensor& weight, const OptionalTensor& token_weight) {
  constexpr bool written_by_forward = kName == kInplaceForward;
  check_cross_entropy(options, input, target, weight, token_weight);
  check_no_derivative(target, input, weight, token_weight);
  const auto dtype = promoted_dtype(input, target, weight);
  TORCH_CHECK(!dtype,
              "cross_entropy(inplace=...) needs logits, probabilities and weight of one dtype: convert them to ",
              *dtype, ", or use inplace=None");
  if (needs_formula(input) || needs_formula(target) || needs_formula(weight) || needs_formula(token_weight)) {
    refuse_transforms(options, input, target, weight, token_weight);
  }
  if (!at::GradMode::is_enabled() || !requires_grad(input)) {  // without a backward nothing is written
    static const ForwardOp op("charlm::cross_entropy");
    return op(options, input, target, weight, token_weight);
  }
  TORCH_CHECK(!requires_grad(target) && !requires_grad(weight),
              "cross_entropy(inplace=...) gives no gradient to probability targets or weight: use inplace=None, or "
              "detach them");
  check_can_be_overwritten(input, target, weight, token_weight);

  const auto node = make_node<CrossEntropyInplaceBackward>();
  node->set_next_edges(torch::autograd::collect_next_edges(input));
  const auto overwritten = make_node<OverwrittenLogitsBackward>();
  overwritten->set_next_edges(torch::autograd::collect_next_edges(input));

  static const InplaceForwardOp op(kName);
  auto [loss, state] = [&] {
    at::AutoDispatchBelowAutograd guard;  // ADInplaceOrView comes next: it counts the new version of the logits
    return op(options, input, target, weight, token_weight);
  }();
  node->set_options(options, written_by_forward);
  if (written_by_forward) {
    node->save(input.detach(), Tensor(), Tensor(), Tensor(), Tensor(), Tensor());
  } else {
    node->save(input.detach(), target, weight, token_weight, state, Tensor());
  }
  torch::autograd::set_history(loss, node);
  torch::autograd::rebase_history(input, overwritten);
  return {loss, state};
}

LossAndState cross_entropy_inplace_backward(const CrossEntropyOptions& options, Tensor& input, const Tensor& target,
                                            const OptionalTensor& weight, const OptionalTensor& token_weight) {
  return cross_entropy_inplace<kInplaceBackward>(options, input, target, weight, token_weight);
}

LossAndState cross_entropy_inplace_forward(const CrossEntropyOptions& options, Tensor& input, const Tensor& target,
                                           const OptionalTensor& weight, const OptionalTensor& token_weight) {
  TORCH_CHECK_VALUE(
      !options.is(Reduction::kNone),
      "inplace=\"forward\" needs reduction \"mean\" or \"sum\": with \"none\" the gradient is not yet known");
  // In float16, small entries would be lost before a GradScaler's factor is known: backward writes them then.
  if (input.scalar_type() == at::kHalf) {
    return cross_entropy_inplace_backward(options, input, target, weight, token_weight);
  }
  return cross_entropy_inplace<kInplaceForward>(options, input, target, weight, token_weight);
}

// Counts the new version of a tensor that an op writes, as torch's own in-place ops do.
template <class Result, class... Tensors>
struct BumpVersion {
  template <const char* kName>
  static Result call(const CrossEntropyOptions& options, Tensor& input, Tensors... tensors) {
    static const CrossEntropyOp<Result, Tensor&, Tensors...> op(kName);
    const auto run = [&] {
      at::AutoDispatchBelowADInplaceOrView guard;
      return op(options, input, tensors...);
    };
    if constexpr (std::is_void_v<Result>) {
      run();
      torch::autograd::impl::bump_version(input);
    } else {
      auto result = run();
      torch::autograd::impl::bump_version(input);
      return result;
    }
  }
};

constexpr char kBackwardInplace[] = "charlm::_cross_entropy_backward_";
using BumpForward = BumpVersion<LossAndState, const Tensor&, const OptionalTensor&, const OptionalTensor&>;
using BumpBackward =
    BumpVersion<void, const Tensor&, const Tensor&, const OptionalTensor&, const OptionalTensor&, const Tensor&>;

// ---------------------------------------------------------------------------------------------------- autocast

// In float32, as torch's own cross_entropy_loss.
template <c10::DeviceType kDevice, const char* kName, class Input>
LossAndState autocast(const CrossEntropyOptions& options, Input input, const Tensor& target,
                      const OptionalTensor& weight, const OptionalTensor& token_weight) {
  const Autocast autocast(kDevice);
  Tensor logits = autocast.cast(input);
  static const CrossEntropyOp<LossAndState, Input, const Tensor&, const OptionalTensor&, const OptionalTensor&> op(
      kName);
  return op(options, logits, autocast.cast(target), autocast.cast(weight), token_weight);
}

template <c10::DeviceType kDevice>
LossStateAndMetrics with_metrics_autocast(const CrossEntropyOptions& options, const Tensor& input, const Tensor& target,
                                          const OptionalTensor& weight, const OptionalTensor& token_weight) {
  const Autocast autocast(kDevice);
  return with_metrics_op()(options, autocast.cast(input), autocast.cast(target), autocast.cast(weight), token_weight);
}

constexpr char kCrossEntropy[] = "charlm::cross_entropy";

template <c10::DeviceType kDevice>
void register_autocast(torch::Library& m) {
  m.impl("cross_entropy", Flat<&autocast<kDevice, kCrossEntropy, const Tensor&>>::call);
  m.impl("cross_entropy_with_metrics", Flat<&with_metrics_autocast<kDevice>>::call);
  m.impl("cross_entropy_inplace_forward", Flat<&autocast<kDevice, kInplaceForward, Tensor&>>::call);
  m.impl("cross_entropy_inplace_backward", Flat<&autocast<kDevice, kInplaceBackward, Tensor&>>::call);
}

}  // namespace

TORCH_LIBRARY_IMPL(charlm, Autograd, m) {
  m.impl("cross_entropy", Flat<&autograd>::call);
  m.impl("cross_entropy_with_metrics", Flat<&with_metrics_autograd>::call);
  m.impl("cross_entropy_inplace_forward", Flat<&cross_entropy_inplace_forward>::call);
  m.impl("cross_entropy_inplace_backward", Flat<&cross_entropy_inplace_backward>::call);
  m.impl("_cross_entropy_backward", torch::autograd::autogradNotImplementedFallback());
  m.impl("_cross_entropy_backward_", torch::autograd::autogradNotImplementedFallback());
}

TORCH_LIBRARY_IMPL(charlm, ADInplaceOrView, m) {
  m.impl("cross_entropy_inplace_forward", Flat<&BumpForward::call<kInplaceForward>>::call);
  m.impl("cross_entropy_inplace_backward", Flat<&BumpForward::call<kInplaceBackward>>::call);
  m.impl("_cross_entropy_backward_", Flat<&BumpBackward::call<kBackwardInplace>>::call);
}

TORCH_LIBRARY_IMPL(charlm, FuncTorchBatched, m) {
  m.impl("cross_entropy", Flat<&by_formula>::call);
  m.impl("cross_entropy_with_metrics", Flat<&with_metrics_by_formula>::call);
  m.impl("cross_entropy_inplace_forward", Flat<&refuse_transforms>::call);
  m.impl("cross_entropy_inplace_backward", Flat<&refuse_transforms>::call);
}

TORCH_LIBRARY_IMPL(charlm, AutocastCPU, m) { register_autocast<c10::DeviceType::CPU>(m); }

TORCH_LIBRARY_IMPL(charlm, AutocastCUDA, m) { register_autocast<c10::DeviceType::CUDA>(m); }

}  // namespace charlm
