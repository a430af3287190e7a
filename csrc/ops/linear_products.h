// The matrix products of linear_cross_entropy, a block of rows at a time.
#pragma once

#include <memory>

#include "ops/linear_cross_entropy_op.h"

namespace charlm {

// x [n, D] are rows of the input, g [n, V] the gradients of their logits; W [V, D], b [V]. Sums over rows are in the
// dtype of the arithmetic, and rounded once.
class LinearProducts {
 public:
  virtual ~LinearProducts() = default;

  virtual at::ScalarType dtype() const = 0;  // of x, the logits and g
  // On a GPU the products of large calls have classes of padding, up to a multiple of 16 bytes: V' of them here.
  int64_t n_classes() const { return weight_.size(0); }
  virtual void logits(const Tensor& x, Tensor out) = 0;  // out [n, V'] = x W^T + b
  // g [n, V'], zero for classes of padding; out [n, D] = g W, in the dtype of the input
  virtual void input_gradient(const Tensor& g, Tensor out) = 0;
  virtual void add_weight_gradient(const Tensor& g, const Tensor& x) = 0;
  void add_bias_gradient(const Tensor& g);  // g [n, V]

  Tensor weight_gradient();  // the sum of g^T x over the blocks
  Tensor bias_gradient();

 protected:
  explicit LinearProducts(const LinearCrossEntropyArguments& arguments);

  // weight_sum_ += g^T x, by a product whose result has the dtype of that sum.
  void add_product(const Tensor& g, const Tensor& x);
  Tensor new_weight_sum(at::ScalarType dtype) const;

  const int64_t n_given_classes_;  // V
  Tensor weight_;                  // [V', D], with a stride of 1
  OptionalTensor bias_;
  Tensor weight_sum_;  // [V', D]; undefined before the first block
  Tensor bias_sum_;    // [V]
};

// [n, ...]: rows of t, then zeros.
Tensor padded_rows(const Tensor& t, int64_t n);

// Memory for a result or a buffer: on the CPU in huge pages, since first-touch page faults of ordinary pages take
// longer than the arithmetic.
Tensor new_memory(at::IntArrayRef shape, const at::TensorOptions& options);

// Whether half types are widened to float.
bool is_widened(const LinearCrossEntropyArguments& arguments);

// `one_block`: no second block will be added to the first block's gradient of W.
std::unique_ptr<LinearProducts> new_products(const LinearCrossEntropyArguments& arguments, bool one_block);

}  // namespace charlm
