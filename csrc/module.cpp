// The Python module charlm._C: each op as a function, which costs some microseconds less than a call through torch.ops,
// and information about the build. A function that reads its arguments by PythonArguments returns NotImplemented for
// tensors that no kernel supports; before the other functions, Python calls have_kernels.
#include <pybind11/gil_safe_call_once.h>
#include <torch/csrc/Dtype.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>
#include <torch/extension.h>

#include <map>
#include <optional>
#include <string>
#include <utility>

#include "core/device.h"
#include "core/registration.h"
#include "cpu/isa.h"
#include "ops/embedding_linear_impl.h"
#include "ops/linear_cross_entropy_op.h"
#include "ops/linear_plan.h"

namespace charlm {

void bind_corpus(pybind11::module_& m);  // corpus/corpus.cpp
void bind_ngrams(pybind11::module_& m);  // ngrams/ngrams.cpp

namespace {

namespace py = pybind11;

// Reads the Python arguments of a call. The common types are accepted here, within some nanoseconds; everything else is
// left to charlm/_checks.py, which converts it or raises torch's error.
class PythonArguments {
 public:
  explicit PythonArguments(const char* function) : function_(function) {}

  const at::Tensor& tensor(const char* name, py::handle value) {
    if (!THPVariable_Check(value.ptr())) {
      checks("tensor")(function_, name, value);
      throw py::type_error(std::string(name) + " only claims to be a Tensor");  // by its __class__
    }
    const at::Tensor& result = THPVariable_Unpack(value.ptr());
    if (!is_supported(value, result)) have_kernels_ = false;
    return result;
  }

  std::optional<at::Tensor> optional_tensor(const char* name, py::handle value) {
    return value.is_none() ? std::nullopt : std::optional<at::Tensor>(tensor(name, value));
  }

  // False once a tensor was read that the kernels do not support: another device, a sparse layout, torch's quantized
  // dtypes, or a subclass that implements torch's own ops only.
  bool have_kernels() const { return have_kernels_; }

  double number(const char* name, py::handle value) const {
    if (PyFloat_CheckExact(value.ptr())) return PyFloat_AS_DOUBLE(value.ptr());
    return checks("number")(function_, name, value).cast<double>();
  }

  int64_t integer(const char* name, py::handle value) const {
    int overflow = 0;
    if (PyLong_CheckExact(value.ptr())) {
      const int64_t result = PyLong_AsLongLongAndOverflow(value.ptr(), &overflow);
      if (overflow == 0) return result;
    }
    return checks("integer")(function_, name, value).cast<int64_t>();
  }

  bool boolean(const char* name, py::handle value) const {
    if (!PyBool_Check(value.ptr())) checks("boolean")(function_, name, value);
    return value.ptr() == Py_True;
  }

  int64_t reduction(py::handle value) const {
    if (is(value, "mean")) return 1;
    if (is(value, "sum")) return 2;
    if (is(value, "none")) return 0;
    return checks("reduction_number")(value).cast<int64_t>();
  }

  double softcap(py::handle value) const {
    if (value.is_none()) return 0.0;
    if (PyFloat_CheckExact(value.ptr()) && PyFloat_AS_DOUBLE(value.ptr()) > 0) return PyFloat_AS_DOUBLE(value.ptr());
    return checks("softcap_number")(function_, value).cast<double>();
  }

  static std::optional<at::ScalarType> optional_dtype(const char* name, py::handle value) {
    if (value.is_none()) return std::nullopt;
    if (!THPDtype_Check(value.ptr())) checks("dtype")(name, value);
    return reinterpret_cast<THPDtype*>(value.ptr())->scalar_type;
  }

  // The row of `padding_idx`, -1 for None.
  int64_t padding_row(py::handle value, int64_t num_embeddings) const {
    return value.is_none() ? -1 : checks("padding_row")(function_, value, num_embeddings).cast<int64_t>();
  }

  static bool is(py::handle value, const char* text) {
    return PyUnicode_Check(value.ptr()) && PyUnicode_CompareWithASCIIString(value.ptr(), text) == 0;
  }

  static py::object checks(const char* name) {
    PYBIND11_CONSTINIT static py::gil_safe_call_once_and_store<py::object> module;
    return module.call_once_and_store_result([] { return py::module_::import("charlm._checks"); })
        .get_stored()
        .attr(name);
  }

 private:
  static bool is_supported(py::handle object, const at::Tensor& t) {
    if (t.key_set().has(c10::DispatchKey::Python))
      return checks("is_kernel_tensor")(object).cast<bool>() && is_on_supported_device(t);
    return t.layout() == at::kStrided && !t.is_nested() && !t.is_quantized() && is_on_supported_device(t);
  }

  static bool is_on_supported_device(const at::Tensor& t) {
    return t.is_cpu() || t.is_meta() || (t.is_cuda() && gpu());
  }

  const char* const function_;
  bool have_kernels_ = true;
};

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
                                py::handle loss_dtype, int64_t memory_budget) {
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
                            all_ignored, loss_dtype),
      memory_budget};
  if (!arguments.have_kernels()) return not_implemented();
  static const LinearForwardOp op("charlm::linear_cross_entropy");
  return without_gil([&] { return op(a); });
}

// The plan on a GPU of a loss with both gradients: rows of a block, classes of a tile, tiles that are kept in the
// budget and in the gradient of the weight.
std::tuple<int64_t, int64_t, int64_t, int64_t> linear_cross_entropy_plan(int64_t n_rows, int64_t n_features,
                                                                         int64_t n_classes, int64_t element_size,
                                                                         bool may_tile, int64_t memory_budget) {
  const LinearPlan plan = choose_linear_plan_on_gpu({.n_rows = n_rows,
                                                     .n_features = n_features,
                                                     .n_classes = n_classes,
                                                     .element_size = element_size,
                                                     .is_half = element_size == 2,
                                                     .with_gradients = true,
                                                     .wants_input = true,
                                                     .wants_weight = true,
                                                     .may_tile = may_tile,
                                                     .budget = memory_budget});
  return {plan.block_rows, plan.tile_classes, plan.kept, plan.kept_in_weight};
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

py::object kl_divergence(py::handle p, py::handle q, int64_t p_kind, int64_t q_kind) {
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

// Whether the kernels support all tensors. TypeError for what is no tensor; a name that ends in "?" may be None.
bool have_kernels(py::handle function, py::handle names, py::handle tensors) {
  PythonArguments arguments("");  // raises nothing: only tensors are passed to it
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
  m.def("linear_cross_entropy_plan", &linear_cross_entropy_plan);
  m.def("linear_cross_entropy", &linear_cross_entropy);
  m.def("cross_entropy", &cross_entropy);
  m.def("entropy", &entropy);
  m.def("kl_divergence", &kl_divergence);
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
  bind_corpus(m);
}
