// Registration of the ops, and calls through the dispatcher.
#pragma once

#include <ATen/autocast_mode.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/library.h>

#include "core/tensors.h"

namespace charlm {

// An op, called through the dispatcher: Op<Tensor(const Tensor&)> op("charlm::entropy").
template <class Function>
class Op;

template <class Result, class... Arguments>
class Op<Result(Arguments...)> {
 public:
  explicit Op(const char* name)
      : handle_(c10::Dispatcher::singleton().findSchemaOrThrow(name, "").template typed<Result(Arguments...)>()) {}

  Result operator()(Arguments... arguments) const { return handle_.call(std::forward<Arguments>(arguments)...); }

 private:
  c10::TypedOperatorHandle<Result(Arguments...)> handle_;
};

// Registers one implementation for every device that has kernels.
template <class Function>
void implement(torch::Library& m, const char* name, Function function) {
  m.impl(name, torch::dispatch(c10::DispatchKey::CPU, Function(function)));
  m.impl(name, torch::dispatch(c10::DispatchKey::CUDA, Function(function)));
}

// Tensors in the dtype that autocast prescribes for an op, with autocast switched off while this object lives.
class Autocast {
 public:
  explicit Autocast(c10::DeviceType device)
      : device_(device), guard_(at::autocast::get_autocast_dispatch_key_from_device_type(device)) {}

  Tensor cast(const Tensor& t, at::ScalarType dtype = at::kFloat) const {
    return at::autocast::cached_cast(dtype, t, device_);
  }

  OptionalTensor cast(const OptionalTensor& t, at::ScalarType dtype = at::kFloat) const {
    return t ? OptionalTensor(cast(*t, dtype)) : std::nullopt;
  }

 private:
  const c10::DeviceType device_;
  const c10::impl::ExcludeDispatchKeyGuard guard_;
};

}  // namespace charlm
