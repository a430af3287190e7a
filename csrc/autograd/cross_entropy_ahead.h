// Whether the forward of a loss may make its gradient too.
#pragma once

#include <ATen/SavedTensorHooks.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>

#include "../cross_entropy.h"
#include "node.h"

namespace charlm {

// Where the gradient depends on the loss's by a factor alone. A traced call keeps to ops whose results do not depend on
// the value of that factor; and where hooks decide what becomes of saved tensors (activation checkpointing,
// offloading), nothing of the logits' size is kept beside them. In float16, small entries would be lost before a
// GradScaler's factor is known.
inline bool may_go_ahead(const CrossEntropyOptions& options, const Tensor& input) {
  return !options.is(Reduction::kNone) && input.scalar_type() != at::kHalf && is_plain(input) &&
         !c10::impl::TorchDispatchModeTLS::any_modes_set() &&
         !at::SavedTensorDefaultHooks::get_hooks(/*ignore_is_tracing=*/true).has_value();
}

}  // namespace charlm
