// The table of contents: every op's schema.
#include <ATen/core/Tensor.h>
#include <torch/library.h>

// The scalar arguments that every cross_entropy schema ends with: CrossEntropyOptions.
#define CROSS_ENTROPY_OPTIONS                                                                       \
  "int reduction, int ignore_index, float label_smoothing, float lse_square_scale, float softcap, " \
  "float logit_scale, bool zero_if_all_ignored)"
#define TARGETS "Tensor target, Tensor? weight, Tensor? token_weight, "
// The arguments of linear_cross_entropy before these: LinearCrossEntropyArguments.
#define LINEAR_ARGUMENTS                                                                                           \
  "Tensor input, Tensor linear_weight, Tensor target, Tensor? linear_bias, Tensor? weight, Tensor? token_weight, " \
  "bool unrounded, int block_rows, int gemm, "

TORCH_LIBRARY(charlm, m) {
  m.def("embedding(Tensor weight, Tensor indices, int padding_idx, bool scale_grad_by_freq, bool sparse) -> Tensor");
  m.def(
      "embedding_backward(Tensor grad_output, Tensor indices, SymInt num_embeddings, int padding_idx, "
      "bool scale_grad_by_freq) -> Tensor");

  // (output, before): the activation's input where its derivative needs it, else nothing.
  m.def(
      "embedding_linear(Tensor input, Tensor embedding_weight, Tensor linear_weight, Tensor? linear_bias, "
      "int padding_idx, int activation, int plan) -> (Tensor output, Tensor before)");
  m.def(
      "embedding_linear_backward(Tensor grad_output, Tensor input, Tensor embedding_weight, Tensor linear_weight, "
      "Tensor kept, int padding_idx, int activation, int plan, bool[3] output_mask) -> (Tensor, Tensor, Tensor)");

  // (loss, normalizer), the normalizer being what the gradients need of each row.
  m.def("cross_entropy(Tensor input, " TARGETS CROSS_ENTROPY_OPTIONS " -> (Tensor loss, Tensor normalizer)");
  // The same and the gradient of the logits, should the gradient of the loss be 1: one walk over the logits for both.
  m.def("cross_entropy_forward_backward(Tensor input, " TARGETS CROSS_ENTROPY_OPTIONS
        " -> (Tensor loss, Tensor normalizer, Tensor grad)");
  // The loss; the logits' memory becomes their gradient in this call, or in backward.
  m.def("cross_entropy_inplace_forward(Tensor(a!) input, " TARGETS CROSS_ENTROPY_OPTIONS
        " -> (Tensor loss, Tensor normalizer)");
  m.def("cross_entropy_inplace_backward(Tensor(a!) input, " TARGETS CROSS_ENTROPY_OPTIONS
        " -> (Tensor loss, Tensor normalizer)");
  // The gradients: of the logits, of the logits in their memory, of class probabilities.
  m.def("cross_entropy_backward(Tensor grad_loss, Tensor input, " TARGETS "Tensor normalizer, " CROSS_ENTROPY_OPTIONS
        " -> Tensor");
  m.def("cross_entropy_backward_(Tensor(a!) input, Tensor grad_loss, " TARGETS
        "Tensor normalizer, " CROSS_ENTROPY_OPTIONS " -> ()");
  // Rescales the gradient computed in forward (unit grad_loss) to the actual grad_loss.
  m.def("cross_entropy_rescale_(Tensor(a!) grad, Tensor grad_loss, Tensor input, " TARGETS
        "Tensor normalizer, " CROSS_ENTROPY_OPTIONS " -> ()");
  // The same where the logits are gone: grad *= factor, which reads and writes nothing if factor is 1.
  m.def("cross_entropy_scale_grad_(Tensor(a!) grad, Tensor factor) -> ()");
  m.def("cross_entropy_target_backward(Tensor grad_loss, Tensor input, " TARGETS
        "Tensor normalizer, " CROSS_ENTROPY_OPTIONS " -> Tensor");
  m.def("cross_entropy_metrics(Tensor input, Tensor target, " CROSS_ENTROPY_OPTIONS
        " -> (Tensor lse, Tensor entropy, Tensor predicted_tokens, Tensor token_accuracy)");
  // linear_cross_entropy's part of it: the losses [n] of logits [n, V], in the dtype of the arithmetic, which are those
  // of targets first_row, first_row + 1, ...; with grad_loss, () or one for each target, the logits become their
  // gradient.
  m.def("cross_entropy_block_(Tensor(a!) logits, " TARGETS "Tensor? grad_loss, int first_row, " CROSS_ENTROPY_OPTIONS
        " -> Tensor");

  m.def("linear_cross_entropy(" LINEAR_ARGUMENTS CROSS_ENTROPY_OPTIONS " -> Tensor");
  // The loss, and the gradients of input, linear_weight and linear_bias, of those that output_mask asks for; grad_loss:
  // that of the loss, None for 1.
  m.def("linear_cross_entropy_gradients(Tensor? grad_loss, bool[3] output_mask, " LINEAR_ARGUMENTS CROSS_ENTROPY_OPTIONS
        " -> (Tensor loss, Tensor grad_input, Tensor grad_linear_weight, Tensor grad_linear_bias)");
  m.def("linear_cross_entropy_metrics(" LINEAR_ARGUMENTS CROSS_ENTROPY_OPTIONS
        " -> (Tensor lse, Tensor entropy, Tensor predicted_tokens, Tensor token_accuracy)");

  // (entropy, state), the state being what the gradient needs of each row.
  m.def("entropy(Tensor logits) -> (Tensor entropy, Tensor state)");
  m.def("entropy_backward(Tensor grad_output, Tensor logits, Tensor state) -> Tensor");
  // (divergence, state) of p and q of one shape; kinds: 0 logits, 1 log-probabilities, 2 probabilities.
  m.def("kl_div(Tensor p, Tensor q, int p_kind, int q_kind) -> (Tensor divergence, Tensor state)");
  m.def(
      "kl_div_backward(Tensor grad_output, Tensor p, Tensor q, Tensor state, int p_kind, int q_kind, "
      "bool[2] output_mask) -> (Tensor, Tensor)");

  // torch's kl_div: each element's value, or with `reduce` their sum divided by `divisor`.
  m.def("pointwise_kl_div(Tensor input, Tensor target, bool log_target, bool reduce, SymInt divisor) -> Tensor");
  m.def(
      "pointwise_kl_div_backward(Tensor grad_output, Tensor input, Tensor target, bool log_target, bool reduce, "
      "SymInt divisor, bool[2] output_mask) -> (Tensor, Tensor)");

  // Waits for the device of `on` and raises the IndexError of an index that a kernel found out of range.
  m.def("synchronize(Tensor on) -> ()");
}

namespace charlm {
namespace {

// On the CPU a bad index is raised by the call itself.
void synchronize(const at::Tensor&) {}

}  // namespace

TORCH_LIBRARY_IMPL(charlm, CPU, m) { m.impl("synchronize", &synchronize); }
TORCH_LIBRARY_IMPL(charlm, Meta, m) { m.impl("synchronize", &synchronize); }

}  // namespace charlm
