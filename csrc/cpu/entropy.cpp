// entropy on the CPU.
#include "../entropy.h"

#include <torch/library.h>

#include "adapter.h"

namespace charlm {
namespace {

// A call's logits, and the state that forward writes and backward reads, as pointers.
template <class T>
EntropyRows<T> entropy_rows(const Tensor& logits, const Tensor& state) {
  auto* const data = static_cast<Compute<T>*>(const_cast<void*>(state.const_data_ptr()));
  const int64_t n = state.size(1);
  EntropyRows<T> rows;
  rows.n_classes = logits.size(1);
  rows.logits = const_data<T>(logits);
  rows.logits_stride = logits.stride(0);
  rows.row_max = data;
  rows.row_sum = data + n;
  rows.row_distance = data + 2 * n;
  return rows;
}

std::tuple<Tensor, Tensor> entropy(const Tensor& input) {
  check_entropy(input);
  const Tensor logits = as_class_rows(input);
  const int64_t n = logits.size(0), n_classes = logits.size(1);
  const Tensor output = at::empty_symint(leading_sizes(input), input.options());
  const Tensor state = at::empty({kEntropyState, n}, input.options().dtype(row_dtype(input)));
  if (n_classes == 0) return {output.zero_(), state.zero_()};
  with_float_type(input.scalar_type(), "entropy", [&]<class T>() {
    EntropyRows<T> rows = entropy_rows<T>(logits, state);
    rows.entropy = mutable_data<T>(output);
    Blocks(n, n_classes).parallel_for([&](int64_t, int64_t begin, int64_t end) {
      cpu_kernels().of<T>().entropy.forward(rows, begin, end);
    });
  });
  return {output, state};
}

Tensor entropy_backward(const Tensor& given_grad_output, const Tensor& input, const Tensor& state) {
  check_entropy_gradient(given_grad_output, input, state);
  const Tensor logits = as_class_rows(input), grad_output = given_grad_output.to(row_dtype(input)).contiguous();
  const Tensor grad = new_output(input.sizes(), input.options());
  with_float_type(input.scalar_type(), "entropy_backward", [&]<class T>() {
    EntropyRows<T> rows = entropy_rows<T>(logits, state);
    rows.grad_output = const_data<Compute<T>>(grad_output);
    rows.grad = mutable_data<T>(grad);
    Blocks(logits.size(0), rows.n_classes).parallel_for([&](int64_t, int64_t begin, int64_t end) {
      cpu_kernels().of<T>().entropy.backward(rows, begin, end);
    });
  });
  return grad;
}

}  // namespace

TORCH_LIBRARY_IMPL(charlm, CPU, m) {
  m.impl("entropy", &entropy);
  m.impl("entropy_backward", &entropy_backward);
}

}  // namespace charlm
