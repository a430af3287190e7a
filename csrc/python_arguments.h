// Reads the Python arguments of a call. The common types are accepted here, within some nanoseconds; everything else is
// left to charlm/_checks.py, which converts it or raises torch's error.
#pragma once

#include <pybind11/gil_safe_call_once.h>
#include <torch/csrc/Dtype.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>
#include <torch/extension.h>

#include <optional>

#include "core/device.h"

namespace charlm {

namespace py = pybind11;

class PythonArguments {
 public:
  explicit PythonArguments(const char* function) : function_(function) {}

  const at::Tensor& tensor(const char* name, py::handle value) {
    if (!THPVariable_Check(value.ptr())) checks("tensor")(function_, name, value);
    const at::Tensor& result = THPVariable_Unpack(value.ptr());
    if (!kernels_take(value, result)) have_kernels_ = false;
    return result;
  }

  std::optional<at::Tensor> optional_tensor(const char* name, py::handle value) {
    return value.is_none() ? std::nullopt : std::optional<at::Tensor>(tensor(name, value));
  }

  // False once a tensor was read that the kernels do not know: another device, a sparse layout, torch's quantized
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
  static bool kernels_take(py::handle object, const at::Tensor& t) {
    if (t.key_set().has(c10::DispatchKey::Python))
      return checks("is_kernel_tensor")(object).cast<bool>() && on_device(t);
    return t.layout() == at::kStrided && !t.is_nested() && !t.is_quantized() && on_device(t);
  }

  static bool on_device(const at::Tensor& t) { return t.is_cpu() || t.is_meta() || (t.is_cuda() && gpu()); }

  const char* const function_;
  bool have_kernels_ = true;
};

}  // namespace charlm
