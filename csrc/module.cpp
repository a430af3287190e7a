// The Python module charlm._C: each op as a function, which costs some microseconds less than a call through torch.ops,
// and information about the build. A function that reads its arguments by python_arguments.h returns NotImplemented for
// tensors that no kernel supports; before the other functions, Python calls have_kernels.
#include <torch/extension.h>

#include <map>
#include <string>
#include <utility>

#include "core/device.h"
#include "core/registration.h"
#include "cpu/isa.h"
#include "ops/embedding_linear_impl.h"
#include "ops/linear_cross_entropy_op.h"
#include "python_arguments.h"

namespace charlm {

void bind_ngrams(pybind11::module_& m);  // ngrams/ngrams.cpp

namespace {

template <class F>
py::object without_gil(F&& f) {
  const Tensor result = [&] {
    const py::gil_scoped_release release;
    return f();
  }();
  return py::reinterpret_steal<py::object>(THPVariable_Wrap(result));
}

py::object not_implemented() { return py::reinterpret_borrow<py::object>(Py_NotImplemented); }

py::object embedding(py::handle weight, py::handle indices, py::handle padding_idx, py::handle scale_grad_by_freq,
                     py::handle sparse) {
  PythonArguments arguments("embedding");
  const Tensor &index = arguments.tensor("input", indices), &table = arguments.tensor("weight", weight);
  if (!arguments.have_kernels()) return not_implemented();
  const int64_t row = table.dim() == 0 ? -1 : arguments.padding_row(padding_idx, table.size(0));
  const bool by_freq = arguments.boolean("scale_grad_by_freq", scale_grad_by_freq);
  const bool is_sparse = arguments.boolean("sparse", sparse);
  static const Op<Tensor(const Tensor&, const Tensor&, int64_t, bool, bool)> op("charlm::embedding");
  return without_gil([&] { return op(table, index, row, by_freq, is_sparse); });
}

// The scalar options of cross_entropy and linear_cross_entropy.
CrossEntropyOptions cross_entropy_options(const PythonArguments& arguments, py::handle reduction,
                                          py::handle ignore_index, py::handle label_smoothing,
                                          py::handle lse_square_scale, py::handle softcap, py::handle logit_scale,
                                          py::handle all_ignored, py::handle loss_dtype) {
  const bool zero = PythonArguments::is(all_ignored, "zero");
  if (!zero && !PythonArguments::is(all_ignored, "nan")) {
    PythonArguments::checks("choice")("all_ignored", all_ignored, py::make_tuple("nan", "zero"));
  }
  return {arguments.reduction(reduction),
          arguments.integer("ignore_index", ignore_index),
          arguments.number("label_smoothing", label_smoothing),
          arguments.number("lse_square_scale", lse_square_scale),
          arguments.softcap(softcap),
          arguments.number("logit_scale", logit_scale),
          zero,
          PythonArguments::optional_dtype("loss_dtype", loss_dtype)};
}

py::object cross_entropy(py::handle input, py::handle target, py::handle weight, py::handle token_weight,
                         py::handle reduction, py::handle ignore_index, py::handle label_smoothing,
                         py::handle lse_square_scale, py::handle softcap, py::handle logit_scale,
                         py::handle all_ignored, py::handle loss_dtype, py::handle inplace) {
  PythonArguments arguments("cross_entropy");
  Tensor x = arguments.tensor("input", input);
  const Tensor& y = arguments.tensor("target", target);
  const OptionalTensor w = arguments.optional_tensor("weight", weight);
  const OptionalTensor t = arguments.optional_tensor("token_weight", token_weight);
  if (!arguments.have_kernels()) return not_implemented();
  const CrossEntropyOptions options =
      cross_entropy_options(arguments, reduction, ignore_index, label_smoothing, lse_square_scale, softcap, logit_scale,
                            all_ignored, loss_dtype);
  const bool forward = PythonArguments::is(inplace, "forward");
  if (!inplace.is_none() && !forward && !PythonArguments::is(inplace, "backward")) {
    PythonArguments::checks("choice")("inplace", inplace, py::make_tuple(py::none(), "backward", "forward"));
  }
  TORCH_CHECK_VALUE(
      !forward || !options.is(Reduction::kNone),
      "inplace=\"forward\" needs reduction \"mean\" or \"sum\": with \"none\" the gradient is not yet known");
  // In no_grad and inference mode nothing is written.
  if (inplace.is_none() || !at::GradMode::is_enabled()) {
    static const ForwardOp op("charlm::cross_entropy");
    return without_gil([&] { return std::get<0>(op(options, x, y, w, t)); });
  }
  static const InplaceForwardOp forward_op("charlm::cross_entropy_inplace_forward");
  static const InplaceForwardOp backward_op("charlm::cross_entropy_inplace_backward");
  return without_gil([&] { return std::get<0>((forward ? forward_op : backward_op)(options, x, y, w, t)); });
}

py::object linear_cross_entropy(py::handle input, py::handle linear_weight, py::handle target, py::handle linear_bias,
                                py::handle weight, py::handle token_weight, int64_t block_rows, py::handle reduction,
                                py::handle ignore_index, py::handle label_smoothing, py::handle lse_square_scale,
                                py::handle softcap, py::handle logit_scale, py::handle all_ignored,
                                py::handle loss_dtype) {
  PythonArguments arguments("linear_cross_entropy");
  const LinearCrossEntropyArguments a{
      arguments.tensor("input", input),
      arguments.tensor("linear_weight", linear_weight),
      arguments.tensor("target", target),
      arguments.optional_tensor("linear_bias", linear_bias),
      arguments.optional_tensor("weight", weight),
      arguments.optional_tensor("token_weight", token_weight),
      /*unrounded=*/false,
      block_rows,
      static_cast<int64_t>(Gemm::kAuto),
      cross_entropy_options(arguments, reduction, ignore_index, label_smoothing, lse_square_scale, softcap, logit_scale,
                            all_ignored, loss_dtype)};
  if (!arguments.have_kernels()) return not_implemented();
  static const LinearForwardOp op("charlm::linear_cross_entropy");
  return without_gil([&] { return op(a); });
}

py::object embedding_linear(py::handle input, py::handle embedding_weight, py::handle linear_weight,
                            py::handle linear_bias, py::handle padding_idx, int64_t activation, int64_t plan) {
  PythonArguments arguments("embedding_linear");
  const Tensor &index = arguments.tensor("input", input),
               &table = arguments.tensor("embedding_weight", embedding_weight);
  const Tensor& linear = arguments.tensor("linear_weight", linear_weight);
  const OptionalTensor bias = arguments.optional_tensor("linear_bias", linear_bias);
  if (!arguments.have_kernels()) return not_implemented();
  const int64_t row = table.dim() == 0 ? -1 : arguments.padding_row(padding_idx, table.size(0));
  static const Op<std::tuple<Tensor, Tensor>(const Tensor&, const Tensor&, const Tensor&, const OptionalTensor&,
                                             int64_t, int64_t, int64_t)>
      op("charlm::embedding_linear");
  return without_gil([&] { return std::get<0>(op(index, table, linear, bias, row, activation, plan)); });
}

// The forward's plan and the backward's, as kAuto chooses them on the tensors' device.
std::pair<int64_t, int64_t> embedding_linear_plans(const Tensor& input, const Tensor& embedding_weight,
                                                   const Tensor& linear_weight) {
  const EmbeddingLinearSizes sizes = embedding_linear_sizes(input, embedding_weight, linear_weight);
  const bool is_cuda = embedding_weight.is_cuda();
  return {static_cast<int64_t>(is_cuda ? choose_plan_on_gpu(sizes) : choose_forward_plan_on_cpu(sizes)),
          static_cast<int64_t>(is_cuda ? choose_plan_on_gpu(sizes) : choose_backward_plan_on_cpu(sizes))};
}

py::object entropy(py::handle logits) {
  PythonArguments arguments("entropy");
  const Tensor& x = arguments.tensor("logits", logits);
  if (!arguments.have_kernels()) return not_implemented();
  static const Op<std::tuple<Tensor, Tensor>(const Tensor&)> op("charlm::entropy");
  return without_gil([&] { return std::get<0>(op(x)); });
}

py::object kl_div(py::handle p, py::handle q, int64_t p_kind, int64_t q_kind) {
  PythonArguments arguments("kl_divergence");
  const Tensor &x = arguments.tensor("p", p), &y = arguments.tensor("q", q);
  if (!arguments.have_kernels()) return not_implemented();
  static const Op<std::tuple<Tensor, Tensor>(const Tensor&, const Tensor&, int64_t, int64_t)> op("charlm::kl_div");
  return without_gil([&] { return std::get<0>(op(x, y, p_kind, q_kind)); });
}

// Wrapped by torch, so that the warning of a positive input is Python's.
at::Tensor pointwise_kl_div(const at::Tensor& input, const at::Tensor& target, bool log_target, bool reduce,
                            int64_t divisor) {
  static const Op<Tensor(const Tensor&, const Tensor&, bool, bool, c10::SymInt)> op("charlm::pointwise_kl_div");
  return op(input, target, log_target, reduce, divisor);
}

// Whether the kernels know all tensors. TypeError for what is no tensor; a name that ends in "?" may be None.
bool have_kernels(py::handle function, py::handle names, py::handle tensors) {
  PythonArguments arguments("");  // its errors are not used
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(tensors.ptr()); i++) {
    PyObject* const tensor = PyTuple_GET_ITEM(tensors.ptr(), i);
    PyObject* const name = PyTuple_GET_ITEM(names.ptr(), i);
    if (tensor == Py_None && PyUnicode_READ_CHAR(name, PyUnicode_GET_LENGTH(name) - 1) == '?') continue;
    if (THPVariable_Check(tensor)) {
      arguments.tensor("", tensor);
    } else {
      PythonArguments::checks("tensor")(function, py::handle(name), py::handle(tensor));
    }
  }
  return arguments.have_kernels();
}

bool has_cuda_kernels() { return gpu() != nullptr; }

// Runs the GPU kernels of another library on CPU tensors: `address` is that of its charlm::Gpu, 0 for none.
void run_cpu_ops_on_gpu(uintptr_t address) { run_cpu_ops_on(reinterpret_cast<const Gpu*>(address)); }

std::map<std::string, std::string> build_config() {
  return {{"compiler", __VERSION__}, {"cxx_standard", std::to_string(__cplusplus)}, {"torch", TORCH_VERSION}};
}

}  // namespace
}  // namespace charlm

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  using namespace charlm;
  m.def("embedding", &embedding);
  m.def("embedding_linear", &embedding_linear);
  m.def("embedding_linear_plans", &embedding_linear_plans);
  m.def("linear_cross_entropy", &linear_cross_entropy);
  m.def("cross_entropy", &cross_entropy);
  m.def("entropy", &entropy);
  m.def("kl_div", &kl_div);
  m.def("pointwise_kl_div", torch::wrap_pybind_function_no_gil(&pointwise_kl_div));
  m.def("have_kernels", &have_kernels);
  m.def("has_cuda_kernels", &has_cuda_kernels);
  m.def("compiled_isas", &compiled_isas);
  m.def("supported_isas", &supported_isas);
  m.def("cpu_isa", &cpu_isa);
  m.def("set_cpu_isa", &set_cpu_isa, py::arg("name"));
  m.def("run_cpu_ops_on_gpu", &run_cpu_ops_on_gpu, py::arg("address"));
  m.def("build_config", &build_config);
  bind_ngrams(m);
}
