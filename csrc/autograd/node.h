// What the autograd kernels share: which inputs leave C++ autograd for torch's own formula, and nodes.
#pragma once

#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/saved_variable.h>
#include <torch/csrc/autograd/variable.h>

#include <optional>
#include <utility>

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
inline bool needs_formula(const at::Tensor& t) {
  using c10::DispatchKey;
  return t.defined() && (t.key_set().has_any(
                             c10::DispatchKeySet({DispatchKey::FuncTorchGradWrapper, DispatchKey::FuncTorchBatched})) ||
                         t._fw_grad(/*level=*/0).defined());
}

inline bool needs_formula(const std::optional<at::Tensor>& t) { return t.has_value() && needs_formula(*t); }

// A tensor of numbers for which there are kernels: neither traced nor wrapped.
inline bool is_plain(const at::Tensor& t) {
  using c10::DispatchKey;
  return (t.is_cpu() || t.is_cuda()) &&
         !t.key_set().has_any(
             c10::DispatchKeySet({DispatchKey::Python, DispatchKey::Functionalize, DispatchKey::FuncTorchGradWrapper,
                                  DispatchKey::FuncTorchBatched, DispatchKey::Batched}));
}

// On CUDA torch's own ops, of which derivatives of derivatives are made, end the context for an index that our forward
// has only recorded: so it is raised before, at the cost of waiting for the device.
inline void raise_recorded_index_error(const at::Tensor& index) {
  if (!index.is_cuda()) return;
  static const auto synchronize =
      c10::Dispatcher::singleton().findSchemaOrThrow("charlm::synchronize", "").typed<void(const at::Tensor&)>();
  synchronize.call(index);
}

inline bool requires_grad(const at::Tensor& t) { return t.defined() && t.requires_grad(); }
inline bool requires_grad(const std::optional<at::Tensor>& t) { return t.has_value() && requires_grad(*t); }

inline at::Tensor tensor_or_undefined(const std::optional<at::Tensor>& t) { return t.value_or(at::Tensor()); }
inline at::Tensor tensor_or_undefined(const at::Tensor& t) { return t; }

inline std::optional<at::Tensor> optional_if_defined(at::Tensor t) {
  return t.defined() ? std::optional<at::Tensor>(std::move(t)) : std::nullopt;
}

}  // namespace charlm
