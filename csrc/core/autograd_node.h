// Base of the autograd nodes (one place for the node's mutex, the release of saved tensors and compiled autograd), and
// the choice between a node and torch's own formula.
#pragma once

#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/saved_variable.h>
#include <torch/csrc/autograd/variable.h>
#include <torch/csrc/dynamo/compiled_autograd.h>

#include <algorithm>
#include <array>
#include <mutex>
#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "core/registration.h"

namespace charlm {

using torch::autograd::Node;
using torch::autograd::SavedVariable;
using torch::autograd::variable_list;

// Nodes are counted by c10::intrusive_ptr in newer versions of torch, by std::shared_ptr in older ones.
using NodePtr = decltype(torch::autograd::Edge::function);

template <class N, class... Arguments>
auto make_node(Arguments&&... arguments) {
  if constexpr (std::is_same_v<NodePtr, std::shared_ptr<Node>>) {
    return std::make_shared<N>(std::forward<Arguments>(arguments)...);
  } else {
    return c10::make_intrusive<N>(std::forward<Arguments>(arguments)...);
  }
}

// functorch's wrappers (vmap, grad, jvp) and forward-mode AD need a formula made of torch's own differentiable ops.
// grad and jvp reach the Autograd kernel, vmap alone the FuncTorchBatched kernel.
inline bool needs_formula(const at::Tensor& t) {
  using c10::DispatchKey;
  return t.defined() && (t.key_set().has_any(
                             c10::DispatchKeySet({DispatchKey::FuncTorchGradWrapper, DispatchKey::FuncTorchBatched})) ||
                         t._fw_grad(/*level=*/0).defined());
}

inline bool needs_formula(const std::optional<at::Tensor>& t) { return t.has_value() && needs_formula(*t); }

template <class... Tensors>
bool any_needs_formula(const Tensors&... tensors) {
  return (needs_formula(tensors) || ...);
}

inline bool any_defined(const variable_list& tensors) {
  return std::any_of(tensors.begin(), tensors.end(), [](const at::Tensor& t) { return t.defined(); });
}

// A tensor of numbers for which there are kernels: neither traced nor wrapped.
inline bool is_concrete(const at::Tensor& t) {
  using c10::DispatchKey;
  return (t.is_cpu() || t.is_cuda()) &&
         !t.key_set().has_any(
             c10::DispatchKeySet({DispatchKey::Python, DispatchKey::Functionalize, DispatchKey::FuncTorchGradWrapper,
                                  DispatchKey::FuncTorchBatched, DispatchKey::Batched}));
}

// Double backward uses torch's own ops. On CUDA these end the context for an index out of range, which our forward has
// only recorded: so its error is raised before, at the cost of waiting for the device.
inline void raise_recorded_index_error(const at::Tensor& index) {
  if (!index.is_cuda()) return;
  static const Op<void(const Tensor&)> synchronize("charlm::_synchronize");
  synchronize(index);
}

inline bool requires_grad(const at::Tensor& t) { return t.defined() && t.requires_grad(); }
inline bool requires_grad(const std::optional<at::Tensor>& t) { return t.has_value() && requires_grad(*t); }

template <class... Tensors>
bool any_requires_grad(const Tensors&... tensors) {
  return (requires_grad(tensors) || ...);
}

inline at::Tensor tensor_or_undefined(const std::optional<at::Tensor>& t) { return t.value_or(at::Tensor()); }
inline at::Tensor tensor_or_undefined(const at::Tensor& t) { return t; }

inline std::optional<at::Tensor> optional_if_defined(at::Tensor t) {
  return t.defined() ? std::optional<at::Tensor>(std::move(t)) : std::nullopt;
}

// What one backward call works on.
class BackwardCall {
 public:
  BackwardCall(const variable_list& grads, const SavedVariable* variables, const at::Tensor* tensors, int64_t needs)
      : grads(grads), variables_(variables), tensors_(tensors), needs_(needs) {}

  // The i-th saved tensor; raises if it was modified in place since it was saved, or has been released.
  at::Tensor saved(size_t i) const { return variables_ ? variables_[i].unpack() : tensors_[i]; }
  std::optional<at::Tensor> optional(size_t i) const { return optional_if_defined(saved(i)); }
  // Whether the gradient of the i-th input is needed.
  bool needs(size_t i) const { return (needs_ >> i & 1) != 0; }

  // Double backward: differentiates `formula(inputs)`, in torch's own ops, for the inputs whose gradient is needed.
  // `formula` returns one output, or as many as the node has. It receives aliases of the inputs, where differentiation
  // stops: the paths from one input to another, and the inputs' hooks, belong to the engine that runs this node, which
  // would follow and call them a second time.
  template <class Formula>
  variable_list differentiate(variable_list inputs, const Formula& formula) const {
    variable_list aliases, result(inputs.size());
    for (size_t i = 0; i < inputs.size(); i++) {
      if (needs(i)) aliases.push_back(inputs[i] = inputs[i].view_as(inputs[i]));
    }
    const variable_list all_outputs = as_list(formula(inputs));
    variable_list outputs, output_grads;
    for (size_t i = 0; i < all_outputs.size(); i++) {
      if (!grads[i].defined()) continue;
      outputs.push_back(all_outputs[i]);
      output_grads.push_back(grads[i]);
    }
    const auto computed = torch::autograd::grad(outputs, aliases, output_grads, /*retain_graph=*/true,
                                                /*create_graph=*/true, /*allow_unused=*/true);
    size_t next = 0;
    for (size_t i = 0; i < inputs.size(); i++) {
      if (needs(i)) result[i] = computed[next++];
    }
    return result;
  }

  const variable_list& grads;

 private:
  static variable_list as_list(variable_list outputs) { return outputs; }
  static variable_list as_list(at::Tensor output) { return {std::move(output)}; }

  const SavedVariable* const variables_;
  const at::Tensor* const tensors_;
  const int64_t needs_;  // a bit for each input
};

// A node that saves kSaved tensors and some numbers, Options. `Derived` provides
//   static constexpr const char* kName
//   static variable_list gradients(const BackwardCall&, const Options&...)      one gradient for each input
// and may override `backward`, for what only eager mode does.
template <class Derived, size_t kSaved, class... Options>
class KernelNode : public torch::autograd::Node {
 public:
  std::array<SavedVariable, kSaved> saved;
  std::tuple<Options...> options;

  template <class... Tensors>
  void save(const Tensors&... tensors) {
    static_assert(sizeof...(Tensors) == kSaved);
    saved = {SavedVariable(tensor_or_undefined(tensors), /*is_output=*/false)...};
  }

  std::string name() const override { return Derived::kName; }

  // Two threads may go backward through one graph: [Thread Safety on Autograd Node] in torch's function.h.
  variable_list apply(variable_list&& grads) final {
    std::lock_guard<std::mutex> lock(mutex_);
    if (!any_defined(grads)) return variable_list(num_outputs());
    return backward(BackwardCall(grads, saved.data(), nullptr, needs()));
  }

  void release_variables() final {
    std::lock_guard<std::mutex> lock(mutex_);
    for (SavedVariable& variable : saved) variable.reset_data();
    release_precomputed();
  }

  // Compiled autograd's graph is specialized on the numbers; the tensors are its inputs.
  void compiled_args(torch::dynamo::autograd::CompiledNodeArgs& args) const override {
    for (const SavedVariable& variable : saved) args.collect(variable, /*is_output=*/false);
    std::apply([&](const auto&... option) { (args.collect(option), ...); }, options);
  }

  // Records a call of `traced` in compiled autograd's graph.
  variable_list apply_with_saved(const variable_list& grads,
                                 torch::dynamo::autograd::SwapSavedVariables& swapped) override {
    for (SavedVariable& variable : saved) swapped.before(variable);
    std::apply([&](auto&... option) { (swapped.before(option), ...); }, options);
    variable_list result = any_defined(grads) ? record(grads, swapped) : variable_list(num_outputs());
    for (SavedVariable& variable : saved) swapped.after(variable);
    std::apply([&](auto&... option) { (swapped.after(option), ...); }, options);
    return result;
  }

 protected:
  virtual variable_list backward(const BackwardCall& call) {
    return std::apply([&](const auto&... option) { return Derived::gradients(call, option...); }, options);
  }
  virtual void release_precomputed() {}
  // False: compiled autograd calls the node as a whole, and does not trace what it calls.
  static constexpr bool kIsTraceable = true;

 private:
  int64_t needs() {
    int64_t bits = 0;
    for (size_t i = 0; i < num_outputs(); i++) bits |= int64_t{task_should_compute_output(i)} << i;
    return bits;
  }

  variable_list record(const variable_list& grads, torch::dynamo::autograd::SwapSavedVariables& swapped) {
    using namespace torch::dynamo::autograd;
    PackedArgs packed;
    for (const SavedVariable& variable : saved) packed.pack(variable.unpack());
    std::apply([&](const auto&... option) { (packed.pack(option), ...); }, options);
    packed.pack(needs());
    const auto& compiler = getPyCompilerInterface();
    PyObject* const py_compiler = swapped.get_py_compiler();
    const std::string& function = traced_name(compiler, py_compiler);
    const auto outputs = IValuePacker<std::vector<std::optional<torch::autograd::InputMetadata>>>::pack(
        get_input_metadata(next_edges()));
    return compiler->call_function(py_compiler, "apply_functional", function, grads, std::move(packed).vec(), outputs);
  }

  static variable_list traced(const variable_list& grads, const std::vector<c10::IValue>& values) {
    using namespace torch::dynamo::autograd;
    TORCH_CHECK_NOT_IMPLEMENTED(!at::GradMode::is_enabled(), Derived::kName,
                                " has no double backward under compiled autograd (create_graph=True): run this "
                                "backward in eager mode.");
    PackedArgs packed(values);
    std::array<at::Tensor, kSaved> tensors;
    for (at::Tensor& tensor : tensors) tensor = packed.unpack<at::Tensor>();
    const std::tuple<Options...> options{packed.unpack<Options>()...};  // braces: in this order
    const BackwardCall call(grads, nullptr, tensors.data(), packed.unpack<int64_t>());
    return std::apply([&](const auto&... option) { return Derived::gradients(call, option...); }, options);
  }

  static const std::string& traced_name(const std::unique_ptr<torch::dynamo::autograd::PyCompilerInterface>& compiler,
                                        PyObject* py_compiler) {
    using torch::dynamo::autograd::IValuePacker;
    static const std::string bound = [&] {
      std::vector<at::TypePtr> schema(kSaved, IValuePacker<at::Tensor>::packed_type());
      (schema.push_back(IValuePacker<Options>::packed_type()), ...);
      schema.push_back(IValuePacker<int64_t>::packed_type());  // needs
      return compiler->bind_function(py_compiler, Derived::kName, &traced, schema, /*is_custom_function=*/true,
                                     Derived::kIsTraceable);
    }();
    return bound;
  }
};

}  // namespace charlm
