// Logits (or probabilities, or their gradients) of any shape, seen as the rows that the kernels work on.
#pragma once

#include "cross_entropy.h"

namespace charlm {

// [N, V] with a stride of 1 along the classes; a view wherever the strides allow it.
inline Tensor as_rows(const Tensor& t) {
  if (t.dim() == 2 && t.stride(1) == 1) return t;
  if (t.dim() == 1) return t.unsqueeze(0).contiguous();
  const Tensor classes_last = t.dim() == 2 ? t : t.movedim(1, -1);
  const int64_t v = classes_last.size(-1), n = c10::multiply_integers(classes_last.sizes().slice(0, t.dim() - 1));
  const Tensor rows = classes_last.reshape({n, v});
  return rows.stride(1) == 1 || v == 1 ? rows : rows.contiguous();
}

// Rows [N, V] in the shape of the logits that they belong to.
inline Tensor in_shape_of(const Tensor& rows, const Tensor& input) {
  if (input.dim() == 2) return rows;
  if (input.dim() == 1) return rows.view(input.sizes());
  at::DimVector shape(input.sizes().begin(), input.sizes().end());
  shape.erase(shape.begin() + 1);
  shape.push_back(input.size(1));
  return rows.view(shape).movedim(-1, 1);
}

}  // namespace charlm
