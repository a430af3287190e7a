// linear_cross_entropy on a GPU, a tile of classes at a time.
#pragma once

#include "ops/linear_cross_entropy_op.h"
#include "ops/linear_plan.h"

namespace charlm {

// A call whose targets are class indices, without label smoothing.
struct TiledCall {
  const LinearCrossEntropyArguments& a;
  Tensor x;                     // [N, D]
  Tensor target;                // [N]
  OptionalTensor token_weight;  // [N]
  OptionalTensor grad_of_rows;  // [] or [N]: the gradient of each row's loss; none: no gradients
  MetricGradients metric_grads;
  OutputMask mask;
};

struct TiledResults {
  Tensor losses;  // [N], in the compute type
  Tensor grad_input, grad_weight, grad_bias;
};

TiledResults run_tiles_of_classes(const TiledCall& call, const LinearPlan& plan);

}  // namespace charlm
