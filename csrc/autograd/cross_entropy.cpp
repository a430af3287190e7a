// cross_entropy's derivatives. Where the loss is a mean or a sum, its gradient is nearly always 1: the forward then
// makes the logits' gradient in the same walk, and the backward hands it over. For any other gradient of the loss, and
// always for float16, the backward makes it from the logits and two numbers per row: nothing is rounded before the
// scale is known.
#include <ATen/TensorOperators.h>
#include <ATen/autocast_mode.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/result_type.h>
#include <torch/csrc/autograd/VariableTypeUtils.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/library.h>

#include <atomic>
#include <cmath>
#include <utility>

#include "../memory_overlap.h"
#include "cross_entropy_ahead.h"
#include "cross_entropy_formula.h"
#include "kernel_node.h"

namespace charlm {
namespace {

// ------------------------------------------------------------------------------------------------ out of place

// A node of cross_entropy: its last options are CrossEntropyOptions, and Derived::of_call takes them as one.
template <class Derived, class... Before>
class CrossEntropyNode
    : public KernelNode<Derived, 5, Before..., int64_t, int64_t, double, double, double, double, bool> {
 public:
  enum { kInput, kTarget, kWeight, kTokenWeight, kNormalizer };

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

struct CrossEntropyBackward final : CrossEntropyNode<CrossEntropyBackward> {
  static constexpr const char* kName = "CrossEntropyBackward";

  Tensor precomputed;  // the logits' gradient for unit grad_loss, if forward computed it; used once

  static variable_list of_call(const BackwardCall& call, const CrossEntropyOptions& options) {
    const Tensor &grad_loss = call.grads[0], x = call.saved(kInput), y = call.saved(kTarget);
    const OptionalTensor w = call.optional(kWeight), t = call.optional(kTokenWeight);
    if (at::GradMode::is_enabled()) {
      raise_recorded_index_error(y);
      return call.differentiate({x, y, tensor_or_undefined(w)}, [&](const variable_list& in) {
        return cross_entropy_formula(options, in[0], in[1], optional_if_defined(in[2]), t);
      });
    }
    const Tensor state = call.saved(kNormalizer);
    variable_list result(3);  // input, target, weight
    if (call.needs(0)) {
      static const BackwardOp op("charlm::cross_entropy_backward");
      result[0] = op(options, grad_loss, x, y, w, t, state);
    }
    static const BackwardOp target_op("charlm::cross_entropy_target_backward");
    if (call.needs(1)) result[1] = target_op(options, grad_loss, x, y, w, t, state);
    if (call.needs(2)) result[2] = weight_gradient(options, grad_loss, x, y, t, state).to(w->scalar_type());
    return result;
  }

  // With neither weight nor smoothing, the targets' gradient is -log p times the gradient of each row's loss; the
  // weight's is the sum over rows of that times the (smoothed) targets. In float: it is rounded once, at the end.
  static Tensor weight_gradient(const CrossEntropyOptions& options, const Tensor& grad_loss, const Tensor& x,
                                const Tensor& y, const OptionalTensor& t, const Tensor& state) {
    static const BackwardOp op("charlm::cross_entropy_target_backward");
    CrossEntropyOptions plain = options;
    plain.label_smoothing = 0;
    const double smoothing = std::max(0.0, options.label_smoothing);
    const at::ScalarType compute = compute_dtype(x);
    const Tensor p = y.to(compute);
    const Tensor minus_log_p = op(plain, grad_loss, x.to(compute), p, {}, t, state);
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
      static const RescaleOp op("charlm::cross_entropy_rescale_");
      at::AutoDispatchBelowADInplaceOrView guard;
      op({options...}, grad, grad_loss, call.saved(kInput), call.saved(kTarget), call.optional(kWeight),
         call.optional(kTokenWeight), call.saved(kNormalizer));
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

LossAndNormalizer by_formula(const CrossEntropyOptions& options, const Tensor& input, const Tensor& target,
                             const OptionalTensor& weight, const OptionalTensor& token_weight) {
  return {cross_entropy_formula(options, input, target, weight, token_weight), at::empty({0}, input.options())};
}

LossAndNormalizer cross_entropy(const CrossEntropyOptions& options, const Tensor& input, const Tensor& target,
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
  Tensor loss, normalizer;
  if (requires_grad(input) && !requires_grad(target) && !requires_grad(weight) && may_go_ahead(options, input)) {
    static const ForwardBackwardOp op_with_gradient("charlm::cross_entropy_forward_backward");
    at::AutoDispatchBelowADInplaceOrView guard;
    std::tie(loss, normalizer, node->precomputed) = op_with_gradient(options, input, target, weight, token_weight);
  } else {
    std::tie(loss, normalizer) = below_autograd();
  }
  node->set_options(options);
  node->save(input, target, weight, token_weight, normalizer);
  torch::autograd::set_history(loss, node);
  return {loss, normalizer};
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
      static const auto scale = c10::Dispatcher::singleton()
                                    .findSchemaOrThrow("charlm::cross_entropy_scale_grad_", "")
                                    .typed<void(Tensor&, const Tensor&)>();
      at::AutoDispatchBelowADInplaceOrView guard;
      scale.call(memory, grad_loss);
    } else {
      static const InplaceBackwardOp op("charlm::cross_entropy_backward_");
      op(options, memory, grad_loss, call.saved(kTarget), call.optional(kWeight), call.optional(kTokenWeight),
         call.saved(kNormalizer));
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

  bool is_traceable() const override { return false; }

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

[[noreturn]] LossAndNormalizer refuse_transforms(const CrossEntropyOptions&, Tensor&, const Tensor&,
                                                 const OptionalTensor&, const OptionalTensor&) {
  TORCH_CHECK(false,
              "cross_entropy(inplace=...) works neither under torch.func's transforms nor in forward-mode AD: use "
              "inplace=None");
  throw;  // not reached: tells the compiler that the check above does not return
}

constexpr char kInplaceForward[] = "charlm::cross_entropy_inplace_forward";
constexpr char kInplaceBackward[] = "charlm::cross_entropy_inplace_backward";

template <const char* kName>
LossAndNormalizer cross_entropy_inplace(const CrossEntropyOptions& options, Tensor& input, const Tensor& target,
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
  if (!at::GradMode::is_enabled() || !requires_grad(input)) {  // nobody will go backward: nothing is written
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
  auto [loss, normalizer] = [&] {
    at::AutoDispatchBelowAutograd guard;  // ADInplaceOrView comes next: it counts the new version of the logits
    return op(options, input, target, weight, token_weight);
  }();
  node->set_options(options, written_by_forward);
  if (written_by_forward) {
    node->save(input.detach(), Tensor(), Tensor(), Tensor(), Tensor());
  } else {
    node->save(input.detach(), target, weight, token_weight, normalizer);
  }
  torch::autograd::set_history(loss, node);
  torch::autograd::rebase_history(input, overwritten);
  return {loss, normalizer};
}

LossAndNormalizer cross_entropy_inplace_backward(const CrossEntropyOptions& options, Tensor& input,
                                                 const Tensor& target, const OptionalTensor& weight,
                                                 const OptionalTensor& token_weight) {
  return cross_entropy_inplace<kInplaceBackward>(options, input, target, weight, token_weight);
}

LossAndNormalizer cross_entropy_inplace_forward(const CrossEntropyOptions& options, Tensor& input, const Tensor& target,
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

constexpr char kBackwardInplace[] = "charlm::cross_entropy_backward_";
using BumpForward = BumpVersion<LossAndNormalizer, const Tensor&, const OptionalTensor&, const OptionalTensor&>;
using BumpBackward =
    BumpVersion<void, const Tensor&, const Tensor&, const OptionalTensor&, const OptionalTensor&, const Tensor&>;

// ---------------------------------------------------------------------------------------------------- autocast

// In float32 under autocast, as torch's own cross_entropy_loss is.
template <c10::DeviceType kDevice, const char* kName, class Input>
LossAndNormalizer autocast(const CrossEntropyOptions& options, Input input, const Tensor& target,
                           const OptionalTensor& weight, const OptionalTensor& token_weight) {
  c10::impl::ExcludeDispatchKeyGuard no_autocast(at::autocast::get_autocast_dispatch_key_from_device_type(kDevice));
  const auto cast = [](const Tensor& t) { return at::autocast::cached_cast(at::kFloat, t, kDevice); };
  const auto cast_optional = [&](const OptionalTensor& t) { return t ? OptionalTensor(cast(*t)) : std::nullopt; };
  Tensor logits = cast(input);
  static const CrossEntropyOp<LossAndNormalizer, Input, const Tensor&, const OptionalTensor&, const OptionalTensor&> op(
      kName);
  return op(options, logits, cast(target), cast_optional(weight), token_weight);
}

constexpr char kCrossEntropy[] = "charlm::cross_entropy";

template <c10::DeviceType kDevice>
void register_autocast(torch::Library& m) {
  m.impl("cross_entropy", Flat<&autocast<kDevice, kCrossEntropy, const Tensor&>>::call);
  m.impl("cross_entropy_inplace_forward", Flat<&autocast<kDevice, kInplaceForward, Tensor&>>::call);
  m.impl("cross_entropy_inplace_backward", Flat<&autocast<kDevice, kInplaceBackward, Tensor&>>::call);
}

}  // namespace

TORCH_LIBRARY_IMPL(charlm, Autograd, m) {
  m.impl("cross_entropy", Flat<&cross_entropy>::call);
  m.impl("cross_entropy_inplace_forward", Flat<&cross_entropy_inplace_forward>::call);
  m.impl("cross_entropy_inplace_backward", Flat<&cross_entropy_inplace_backward>::call);
  for (const char* name :
       {"cross_entropy_forward_backward", "cross_entropy_backward", "cross_entropy_backward_", "cross_entropy_rescale_",
        "cross_entropy_scale_grad_", "cross_entropy_target_backward", "cross_entropy_block_"}) {
    m.impl(name, torch::autograd::autogradNotImplementedFallback());
  }
}

TORCH_LIBRARY_IMPL(charlm, ADInplaceOrView, m) {
  m.impl("cross_entropy_inplace_forward", Flat<&BumpForward::call<kInplaceForward>>::call);
  m.impl("cross_entropy_inplace_backward", Flat<&BumpForward::call<kInplaceBackward>>::call);
  m.impl("cross_entropy_backward_", Flat<&BumpBackward::call<kBackwardInplace>>::call);
}

TORCH_LIBRARY_IMPL(charlm, FuncTorchBatched, m) {
  m.impl("cross_entropy", Flat<&by_formula>::call);
  m.impl("cross_entropy_inplace_forward", Flat<&refuse_transforms>::call);
  m.impl("cross_entropy_inplace_backward", Flat<&refuse_transforms>::call);
}

TORCH_LIBRARY_IMPL(charlm, AutocastCPU, m) { register_autocast<c10::DeviceType::CPU>(m); }

TORCH_LIBRARY_IMPL(charlm, AutocastCUDA, m) { register_autocast<c10::DeviceType::CUDA>(m); }

}  // namespace charlm
