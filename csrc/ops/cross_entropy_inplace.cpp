// cross_entropy(inplace=...): the memory of the logits becomes their gradient, in forward or in backward. Nothing else
// may be differentiated through the logits after that, and everything that would give a wrong gradient is refused
// before anything is written.
#include <torch/csrc/autograd/VariableTypeUtils.h>

#include <algorithm>
#include <atomic>
#include <utility>
#include <vector>

#include "ops/cross_entropy_autograd.h"

namespace charlm {
namespace {

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

// Returns the gradient that is in the logits' memory (written_by_forward), or writes it there.
struct CrossEntropyInplaceBackward final : CrossEntropyNode<CrossEntropyInplaceBackward, 5, bool> {
  enum { kInput, kTarget, kWeight, kTokenWeight, kState };
  static constexpr const char* kName = "CrossEntropyInplaceBackward";
  static constexpr bool kIsTraceable = false;

  static variable_list of_call(const BackwardCall& call, const CrossEntropyOptions& options, bool written_by_forward) {
    const Tensor& grad_loss = call.grads[0];
    Tensor memory = call.saved(kInput);
    if (written_by_forward) {
      at::AutoDispatchBelowADInplaceOrView guard;
      if (is_concrete(memory) && is_concrete(grad_loss)) {
        scale_gradient_(memory, grad_loss);
      } else {
        memory.mul_(grad_loss);
      }
    } else {
      using InplaceBackwardOp =
          CrossEntropyOp<void, Tensor&, const Tensor&, const Tensor&, const OptionalTensor&, const OptionalTensor&,
                         const Tensor&, const OptionalTensor&, const OptionalTensor&, const OptionalTensor&>;
      static const InplaceBackwardOp op("charlm::_cross_entropy_backward_");
      op(options, memory, grad_loss, call.saved(kTarget), call.optional(kWeight), call.optional(kTokenWeight),
         call.saved(kState), {}, {}, {});
    }
    return {memory};
  }

  void compiled_args(torch::dynamo::autograd::CompiledNodeArgs& args) const override {
    check_first_use();
    KernelNode::compiled_args(args);
  }

 private:
  variable_list backward(const BackwardCall& call) override {
    TORCH_CHECK(!at::GradMode::is_enabled(),
                "cross_entropy(inplace=...) has no double backward (create_graph=True): use inplace=None.");
    check_first_use();
    return KernelNode::backward(call);
  }

  // Once: backward writes the memory that it reads.
  void check_first_use() const {
    TORCH_CHECK(
        !used_.exchange(true),
        "cross_entropy(inplace=...) can go backward only once, and a backward has already begun: use inplace=None.");
  }

  // Compiled autograd collects a node's state, which is const there, before it runs the node.
  mutable std::atomic<bool> used_ = false;
};

// ------------------------------------------------------------------------------------------------- overlapping memory
// Whether tensors that are written can share memory with themselves or with others, from sizes and strides alone.

// Whether no two elements can share an address, as far as sizes and strides prove it: sorted by stride, each dimension
// steps over all that the smaller ones reach.
bool is_provably_without_overlap(const Tensor& t) {
  std::vector<std::pair<int64_t, int64_t>> dims;  // (stride, size)
  for (int64_t d = 0; d < t.dim(); d++) {
    if (t.size(d) > 1) dims.emplace_back(t.stride(d), t.size(d));
  }
  std::sort(dims.begin(), dims.end());
  int64_t reach = 0;  // offset of the last element of the smaller dimensions
  for (const auto& [stride, size] : dims) {
    if (stride <= reach) return false;
    reach += stride * (size - 1);
  }
  return true;
}

// The bytes that a tensor touches: runs of `extent` bytes, one every `step` bytes along the dimension of the largest
// stride; `whole` bytes from the first to the last.
struct Footprint {
  explicit Footprint(const Tensor& t) : begin(reinterpret_cast<intptr_t>(t.const_data_ptr())) {
    int64_t outer = -1, last = 0;
    for (int64_t d = 0; d < t.dim(); d++) {
      last += t.stride(d) * (t.size(d) - 1);
      if (t.size(d) > 1 && (outer < 0 || t.stride(d) > t.stride(outer))) outer = d;
    }
    const auto size = static_cast<int64_t>(t.element_size());
    whole = (last + 1) * size;
    step = outer < 0 ? 0 : t.stride(outer) * size;
    extent = outer < 0 ? whole : whole - step * (t.size(outer) - 1);
  }

  // Provably apart: one behind the other, or, as columns of one matrix are, side by side in each step.
  static bool are_apart(const Footprint& a, const Footprint& b) {
    if (a.begin + a.whole <= b.begin || b.begin + b.whole <= a.begin) return true;
    if (a.step != b.step || a.step == 0) return false;
    const int64_t between = ((b.begin - a.begin) % a.step + a.step) % a.step;
    return a.extent <= between && between + b.extent <= a.step;
  }

  intptr_t begin;
  int64_t whole, step, extent;
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
  if (!is_concrete(input) || input.numel() == 0) return;
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

constexpr char kOverwriteInForward[] = "charlm::cross_entropy_inplace_forward";
constexpr char kOverwriteInBackward[] = "charlm::cross_entropy_inplace_backward";

template <const char* kName>
LossAndState overwrite(const CrossEntropyOptions& options, Tensor& input, const Tensor& target,
                       const OptionalTensor& weight, const OptionalTensor& token_weight) {
  constexpr bool written_by_forward = kName == kOverwriteInForward;
  check_cross_entropy(options, input, target, weight, token_weight);
  check_no_derivative(target, input, weight, token_weight);
  const auto dtype = promoted_dtype(input, target, weight);
  TORCH_CHECK(!dtype,
              "cross_entropy(inplace=...) needs logits, probabilities and weight of one dtype: convert them to ",
              *dtype, ", or use inplace=None");
  if (any_needs_formula(input, target, weight, token_weight)) {
    refuse_transforms(options, input, target, weight, token_weight);
  }
  if (!at::GradMode::is_enabled() || !requires_grad(input)) {  // without a backward nothing is written
    static const ForwardOp op("charlm::cross_entropy");
    return op(options, input, target, weight, token_weight);
  }
  TORCH_CHECK(!any_requires_grad(target, weight),
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
    node->save(input.detach(), Tensor(), Tensor(), Tensor(), Tensor());
  } else {
    node->save(input.detach(), target, weight, token_weight, state);
  }
  torch::autograd::set_history(loss, node);
  torch::autograd::rebase_history(input, overwritten);
  return {loss, state};
}

LossAndState overwrite_in_backward(const CrossEntropyOptions& options, Tensor& input, const Tensor& target,
                                   const OptionalTensor& weight, const OptionalTensor& token_weight) {
  return overwrite<kOverwriteInBackward>(options, input, target, weight, token_weight);
}

LossAndState overwrite_in_forward(const CrossEntropyOptions& options, Tensor& input, const Tensor& target,
                                  const OptionalTensor& weight, const OptionalTensor& token_weight) {
  TORCH_CHECK_VALUE(
      !options.is(Reduction::kNone),
      "inplace=\"forward\" needs reduction \"mean\" or \"sum\": with \"none\" the gradient is not yet known");
  // In float16, small entries would be lost before a GradScaler's factor is known: backward writes them then.
  if (input.scalar_type() == at::kHalf) {
    return overwrite_in_backward(options, input, target, weight, token_weight);
  }
  return overwrite<kOverwriteInForward>(options, input, target, weight, token_weight);
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

constexpr char kOverwriteWithGradient[] = "charlm::_cross_entropy_backward_";
using BumpForward = BumpVersion<LossAndState, const Tensor&, const OptionalTensor&, const OptionalTensor&>;
using BumpBackward = BumpVersion<void, const Tensor&, const Tensor&, const OptionalTensor&, const OptionalTensor&,
                                 const Tensor&, const OptionalTensor&, const OptionalTensor&, const OptionalTensor&>;

// In float32, as torch's own cross_entropy_loss: the float32 copy of half logits is overwritten.
template <c10::DeviceType kDevice, const char* kName>
LossAndState autocast(const CrossEntropyOptions& options, Tensor& input, const Tensor& target,
                      const OptionalTensor& weight, const OptionalTensor& token_weight) {
  const Autocast autocast(kDevice);
  Tensor logits = autocast.cast(input);
  static const InplaceForwardOp op(kName);
  return op(options, logits, autocast.cast(target), autocast.cast(weight), token_weight);
}

template <c10::DeviceType kDevice>
void register_autocast(torch::Library& m) {
  m.impl("cross_entropy_inplace_forward", Flat<&autocast<kDevice, kOverwriteInForward>>::call);
  m.impl("cross_entropy_inplace_backward", Flat<&autocast<kDevice, kOverwriteInBackward>>::call);
}

}  // namespace

TORCH_LIBRARY_IMPL(charlm, Autograd, m) {
  m.impl("cross_entropy_inplace_forward", Flat<&overwrite_in_forward>::call);
  m.impl("cross_entropy_inplace_backward", Flat<&overwrite_in_backward>::call);
  m.impl("_cross_entropy_backward_", torch::autograd::autogradNotImplementedFallback());
}

TORCH_LIBRARY_IMPL(charlm, ADInplaceOrView, m) {
  m.impl("cross_entropy_inplace_forward", Flat<&BumpForward::call<kOverwriteInForward>>::call);
  m.impl("cross_entropy_inplace_backward", Flat<&BumpForward::call<kOverwriteInBackward>>::call);
  m.impl("_cross_entropy_backward_", Flat<&BumpBackward::call<kOverwriteWithGradient>>::call);
}

TORCH_LIBRARY_IMPL(charlm, FuncTorchBatched, m) {
  m.impl("cross_entropy_inplace_forward", Flat<&refuse_transforms>::call);
  m.impl("cross_entropy_inplace_backward", Flat<&refuse_transforms>::call);
}

TORCH_LIBRARY_IMPL(charlm, AutocastCPU, m) { register_autocast<c10::DeviceType::CPU>(m); }
TORCH_LIBRARY_IMPL(charlm, AutocastCUDA, m) { register_autocast<c10::DeviceType::CUDA>(m); }

}  // namespace charlm
