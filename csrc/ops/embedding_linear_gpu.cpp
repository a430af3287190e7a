// embedding_linear on a GPU, in three ways. For few tokens charlm's own kernels compute the whole layer, forward in one
// launch and backward in three. For more tokens, folded, torch's GEMM computes the table C @ W[:, t]^T of each place t
// in the compute type, a kernel adds up its rows, and in backward each place's rows of gradients are summed by token as
// embedding's are; two more GEMMs turn the table's gradient into those of C and W. Gathered, the rows of charlm's
// embedding meet torch's GEMM in the dtype of the weights.
#include <ATen/ops/addmm.h>
#include <ATen/ops/bmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/gelu.h>
#include <ATen/ops/gelu_backward.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/sum.h>
#include <ATen/ops/tanh_backward.h>
#include <ATen/ops/threshold_backward.h>

#include "core/registration.h"
#include "ops/embedding_gradient.h"
#include "ops/embedding_linear_impl.h"

namespace charlm {

namespace {

bool is_empty(const EmbeddingLinearSizes& s) {
  return s.n_rows == 0 || s.n_places == 0 || s.vocabulary == 0 || s.embedding_dim == 0 || s.hidden == 0;
}

// Whether layer_forward computes the table: each block computes its columns of it anew. The limit of its memory is one
// of the products too, 23,000 for each column: 5 us, as long as a GEMM and its launch.
bool has_layer_forward(const EmbeddingLinearSizes& s) {
  return !is_empty(s) && forward_numbers(s.n_places, s.vocabulary, s.embedding_dim) * s.element_size <= kMostLayerBytes;
}

bool has_layer_backward(const EmbeddingLinearSizes& s) {
  return !is_empty(s) && s.vocabulary <= kMostLayerTokens &&
         backward_numbers(s.vocabulary, s.embedding_dim) * s.element_size <= kMostLayerBytes;
}

}  // namespace

// The same plan for forward and backward. Folded where charlm's own kernels take both, which are fewer launches than
// gathering needs, unless contexts are few and the table is large. Else folded where the table costs a fraction of what
// it saves, and fits the second-level cache of nearly every GPU, since each row of the output reads T rows of it.
// Predicted from sizes. Measured is one layer, 8 places of 27 tokens, D 24, H 200, in a training step on an H200: with
// its loss it takes 0.79 and 0.52 of the time of separate layers, for 4096 and 65536 contexts.
Plan choose_plan_on_gpu(const EmbeddingLinearSizes& s) {
  constexpr int64_t kFewestUses = 4;        // contexts for each token of the vocabulary
  constexpr int64_t kSmallTable = 1 << 24;  // products
  constexpr int64_t kTableBytes = 4 << 20;
  const int64_t numbers = s.vocabulary * s.n_places * s.hidden;
  if (has_layer_forward(s) && has_layer_backward(s) && numbers * s.embedding_dim <= kSmallTable) return Plan::kFolded;
  const bool is_used = s.n_rows / kFewestUses >= s.vocabulary;
  return is_used && numbers * s.element_size <= kTableBytes ? Plan::kFolded : Plan::kGathered;
}

namespace {

bool is_folded(const EmbeddingLinearSizes& sizes, Plan plan) {
  return (plan == Plan::kAuto ? choose_plan_on_gpu(sizes) : plan) == Plan::kFolded;
}

Tensor padding_zeroed(const Tensor& grad_embedding, int64_t padding_idx) {
  if (padding_idx >= 0) grad_embedding.select(0, padding_idx).zero_();
  return grad_embedding;
}

// ----------------------------------------------------------------------------------------------------- few tokens

// `index`: input, contiguous.
template <class T>
EmbeddingLinearParams<T> layer_params(const Device& device, const Tensor& input, const Tensor& index,
                                      const Tensor& embedding_weight, const Tensor& linear_weight,
                                      Activation activation) {
  EmbeddingLinearParams<T> p;
  p.n_rows = n_contexts(input);
  p.n_places = input.size(-1);
  p.vocabulary = embedding_weight.size(0);
  p.embedding_dim = embedding_weight.size(1);
  p.hidden = linear_weight.size(0);
  p.indices = device.gpu_indices(input, index, p.vocabulary, IndexKind::kIndex);
  p.embedding = const_data<T>(embedding_weight);
  p.embedding_row_stride = embedding_weight.stride(0);
  p.embedding_column_stride = embedding_weight.stride(1);
  p.linear = const_data<T>(linear_weight);
  p.linear_row_stride = linear_weight.stride(0);
  p.linear_column_stride = linear_weight.stride(1);
  p.activation = activation;
  return p;
}

template <class T>
void layer_forward(const Device& device, const Tensor& input, const Tensor& embedding_weight,
                   const Tensor& linear_weight, const OptionalTensor& bias, Activation activation, const Tensor& output,
                   const Tensor& before) {
  const Tensor index = input.contiguous(), contiguous_bias = bias ? bias->contiguous() : Tensor();
  auto p = layer_params<T>(device, input, index, embedding_weight, linear_weight, activation);
  if (bias) p.bias = const_data<T>(contiguous_bias);
  p.output = mutable_data<T>(output);
  if (before.numel() > 0) p.before = mutable_data<T>(before);
  device.run_on_gpu(device.kernels<T>().embedding_linear.layer_forward, p);
}

template <class T>
EmbeddingLinearGradients layer_backward(const Device& device, const Tensor& grad_output, const Tensor& input,
                                        const Tensor& embedding_weight, const Tensor& linear_weight, const Tensor& kept,
                                        int64_t padding_idx, Activation activation, std::array<bool, 3> needs) {
  const Tensor index = input.contiguous(), grad = grad_output.contiguous(), contiguous_kept = kept.contiguous();
  auto p = layer_params<T>(device, input, index, embedding_weight, linear_weight, activation);
  p.grad_output = const_data<T>(grad);
  p.kept = const_data<T>(contiguous_kept);
  p.padding_idx = padding_idx;
  Tensor grad_embedding, grad_linear, grad_bias;
  const auto new_gradient = [&](at::IntArrayRef shape, Tensor& gradient) {
    gradient = at::empty(shape, embedding_weight.options());
    return mutable_data<T>(gradient);
  };
  if (needs[0]) p.grad_embedding = new_gradient(embedding_weight.sizes(), grad_embedding);
  if (needs[1]) p.grad_linear = new_gradient(linear_weight.sizes(), grad_linear);
  if (needs[2]) p.grad_bias = new_gradient({p.hidden}, grad_bias);
  const EmbeddingLinearKernels<T>& kernels = device.kernels<T>().embedding_linear;
  constexpr int64_t kBytes = sizeof(Compute<T>);
  device.run_on_gpu(kernels.layer_backward, p, kBytes * kernels.layer_workspace(p));
  return {grad_embedding, grad_linear, grad_bias};
}

// ---------------------------------------------------------------------------------------------------------- folded

template <class T>
class Folded {
  using C = Compute<T>;

 public:
  Folded(const Device& device, const Tensor& input, const Tensor& embedding_weight, const Tensor& linear_weight,
         Activation activation)
      : device_(device),
        sizes_(embedding_linear_sizes(input, embedding_weight, linear_weight)),
        activation_(activation),
        input_(input),
        embedding_(embedding_weight.to(kComputeDtype).expand({sizes_.n_places, -1, -1})),
        linear_(linear_weight.to(kComputeDtype)
                    .reshape({sizes_.hidden, sizes_.n_places, sizes_.embedding_dim})
                    .permute({1, 0, 2})),
        dtype_(embedding_weight.scalar_type()) {}

  void forward(const OptionalTensor& bias, const Tensor& output, const Tensor& before) {
    const Tensor index = input_.contiguous(), table = at::bmm(embedding_, linear_.transpose(1, 2));
    const Tensor wide_bias = bias ? bias->to(kComputeDtype).contiguous() : Tensor();
    TableSumParams<T> rows;
    rows.indices = device_.gpu_indices(input_, index, sizes_.vocabulary, IndexKind::kIndex);
    rows.n_rows = sizes_.n_rows;
    rows.n_places = sizes_.n_places;
    rows.vocabulary = sizes_.vocabulary;
    rows.hidden = sizes_.hidden;
    rows.table = const_data<C>(table);
    if (bias) rows.bias = const_data<C>(wide_bias);
    rows.activation = activation_;
    rows.output = mutable_data<T>(output);
    if (before.numel() > 0) rows.before = mutable_data<T>(before);
    device_.run_on_gpu(device_.kernels<T>().embedding_linear.sum_table_rows, rows);
  }

  std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& grad_output, const Tensor& kept, int64_t padding_idx,
                                              std::array<bool, 3> needs) {
    const Tensor grad_sums = differentiated(grad_output, kept);
    Tensor grad_embedding, grad_linear, grad_bias;
    if (needs[0] || needs[1]) {
      const Tensor grad_table = summed_by_token(grad_sums);
      if (needs[0]) {
        const Tensor sum = at::bmm(grad_table, linear_).sum(0);
        grad_embedding = padding_zeroed(sum, padding_idx).to(dtype_);
      }
      if (needs[1]) {
        const Tensor by_place = at::bmm(grad_table.transpose(1, 2), embedding_);  // [T, H, D]
        grad_linear = by_place.permute({1, 0, 2})
                          .to(dtype_)
                          .reshape({sizes_.hidden, sizes_.n_places * sizes_.embedding_dim})
                          .contiguous();
      }
    }
    if (needs[2]) grad_bias = grad_sums.sum(0).to(dtype_);
    return {grad_embedding, grad_linear, grad_bias};
  }

 private:
  static constexpr at::ScalarType kComputeDtype = std::is_same_v<C, double> ? at::kDouble : at::kFloat;

  // The gradient of the activation's argument, [N, H].
  Tensor differentiated(const Tensor& grad_output, const Tensor& kept) const {
    const auto shape = {sizes_.n_rows, sizes_.hidden};
    if (activation_ == Activation::kNone) return grad_output.to(kComputeDtype).contiguous().view(shape);
    const Tensor grad = grad_output.contiguous(), contiguous_kept = kept.contiguous();
    const Tensor grad_sums = at::empty(shape, grad.options().dtype(kComputeDtype));
    device_.run_on_gpu(device_.kernels<T>().embedding_linear.activation_gradient,
                       ActivationGradientParams<T>{activation_, const_data<T>(grad), const_data<T>(contiguous_kept),
                                                   grad.numel(), mutable_data<C>(grad_sums)});
    return grad_sums;
  }

  // The gradient of the table: [T, V, H], each place from a multiple of 16 bytes on.
  Tensor summed_by_token(const Tensor& grad_sums) const {
    const int64_t places = sizes_.n_places, numbers = sizes_.vocabulary * sizes_.hidden;
    constexpr int64_t kPack = 16 / sizeof(C);
    const Tensor padded = at::empty({places, (numbers + kPack - 1) / kPack * kPack}, grad_sums.options());
    const Tensor table = padded.narrow(1, 0, numbers).view({places, sizes_.vocabulary, sizes_.hidden});
    const Tensor columns = input_.reshape({sizes_.n_rows, places}).t().contiguous();  // [T, N]
    for (int64_t t = 0; t < places; t++) {
      const GpuIndices index{input_, columns.select(0, t), /*place=*/t};
      sum_by_index_on_gpu<C>(device_, index, grad_sums, /*padding_idx=*/-1, /*scale_grad_by_freq=*/false,
                             table.select(0, t));
    }
    return table;
  }

  const Device& device_;
  const EmbeddingLinearSizes sizes_;
  const Activation activation_;
  const Tensor input_, embedding_, linear_;  // [..., T]; [T, V, D], one table seen T times; [T, H, D]
  const at::ScalarType dtype_;
};

// -------------------------------------------------------------------------------------------------------- gathered

// [N, T * D]
Tensor gathered(const Tensor& input, const Tensor& embedding_weight) {
  static const Op<Tensor(const Tensor&, const Tensor&, int64_t, bool, bool)> op("charlm::embedding");
  return op(embedding_weight, input, -1, false, false)
      .view({n_contexts(input), input.size(-1) * embedding_weight.size(1)});
}

// The output and, for an activation that needs it, its argument.
std::tuple<Tensor, Tensor> gathered_forward(const Tensor& input, const Tensor& embedding_weight,
                                            const Tensor& linear_weight, const OptionalTensor& bias,
                                            Activation activation, at::IntArrayRef shape) {
  const Tensor rows = gathered(input, embedding_weight), weight = linear_weight.t();
  const Tensor sums = (bias ? at::addmm(*bias, rows, weight) : at::mm(rows, weight)).view(shape);
  const Tensor nothing = at::empty({0}, sums.options());
  switch (activation) {
    case Activation::kTanh:
      return {sums.tanh_(), nothing};
    case Activation::kRelu:
      return {sums.relu_(), nothing};
    case Activation::kGelu:
      return {at::gelu(sums), sums};
    default:
      return {sums, nothing};
  }
}

Tensor gathered_grad_sums(const Tensor& grad_output, const Tensor& kept, Activation activation) {
  switch (activation) {
    case Activation::kTanh:
      return at::tanh_backward(grad_output, kept);
    case Activation::kRelu:
      return at::threshold_backward(grad_output, kept, 0);
    case Activation::kGelu:
      return at::gelu_backward(grad_output, kept);
    default:
      return grad_output;
  }
}

std::tuple<Tensor, Tensor, Tensor> gathered_backward(const Tensor& grad_output, const Tensor& input,
                                                     const Tensor& embedding_weight, const Tensor& linear_weight,
                                                     const Tensor& kept, int64_t padding_idx, Activation activation,
                                                     std::array<bool, 3> needs) {
  const int64_t hidden = linear_weight.size(0), vocabulary = embedding_weight.size(0), dim = embedding_weight.size(1);
  const Tensor grad_sums = gathered_grad_sums(grad_output, kept, activation).reshape({n_contexts(input), hidden});
  Tensor grad_embedding, grad_linear, grad_bias;
  if (needs[0]) {
    static const Op<Tensor(const Tensor&, const Tensor&, c10::SymInt, int64_t, bool)> op("charlm::_embedding_backward");
    at::DimVector shape(input.sizes().begin(), input.sizes().end());
    shape.push_back(dim);
    grad_embedding = op(at::mm(grad_sums, linear_weight).view(shape), input, vocabulary, padding_idx, false);
  }
  if (needs[1]) grad_linear = at::mm(grad_sums.t(), gathered(input, embedding_weight));
  if (needs[2]) grad_bias = grad_sums.sum(0);
  return {grad_embedding, grad_linear, grad_bias};
}

}  // namespace

std::tuple<Tensor, Tensor> embedding_linear_on_gpu(const Device& device, const Tensor& input,
                                                   const Tensor& embedding_weight, const Tensor& linear_weight,
                                                   const OptionalTensor& linear_bias, Activation activation,
                                                   Plan plan) {
  at::DimVector shape(input.sizes().begin(), input.sizes().end());
  shape.back() = linear_weight.size(0);
  const EmbeddingLinearSizes sizes = embedding_linear_sizes(input, embedding_weight, linear_weight);
  if (!is_folded(sizes, plan)) {
    return gathered_forward(input, embedding_weight, linear_weight, linear_bias, activation, shape);
  }
  return with_float_type(embedding_weight.scalar_type(), "embedding_linear", [&]<class T>() {
    const Tensor output = at::empty(shape, embedding_weight.options());
    const Tensor before =
        keeps_input(activation) ? at::empty(shape, output.options()) : at::empty({0}, output.options());
    if (has_layer_forward(sizes)) {
      layer_forward<T>(device, input, embedding_weight, linear_weight, linear_bias, activation, output, before);
    } else {
      Folded<T>(device, input, embedding_weight, linear_weight, activation).forward(linear_bias, output, before);
    }
    return std::make_tuple(output, before);
  });
}

EmbeddingLinearGradients embedding_linear_backward_on_gpu(const Device& device, const Tensor& grad_output,
                                                          const Tensor& input, const Tensor& embedding_weight,
                                                          const Tensor& linear_weight, const Tensor& kept,
                                                          int64_t padding_idx, Activation activation, Plan plan,
                                                          std::array<bool, 3> needs) {
  const EmbeddingLinearSizes sizes = embedding_linear_sizes(input, embedding_weight, linear_weight);
  if (!is_folded(sizes, plan)) {
    return gathered_backward(grad_output, input, embedding_weight, linear_weight, kept, padding_idx, activation, needs);
  }
  return with_float_type(embedding_weight.scalar_type(), "embedding_linear_backward", [&]<class T>() {
    return has_layer_backward(sizes) ? layer_backward<T>(device, grad_output, input, embedding_weight, linear_weight,
                                                         kept, padding_idx, activation, needs)
                                     : Folded<T>(device, input, embedding_weight, linear_weight, activation)
                                           .backward(grad_output, kept, padding_idx, needs);
  });
}

}  // namespace charlm
