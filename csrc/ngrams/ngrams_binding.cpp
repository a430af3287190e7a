// N-gram counting over numpy arrays; charlm/ngrams.py checks the arguments.
#include <pybind11/numpy.h>

#include <memory>
#include <string>
#include <utility>

#include "ngrams/ngrams.h"

namespace charlm {
namespace {

namespace py = pybind11;

// A one-dimensional array that owns what the vector held.
template <class T>
py::array_t<T> as_array(std::vector<T>&& values) {
  auto owned = std::make_unique<std::vector<T>>(std::move(values));
  const std::vector<T>& kept = *owned;
  const py::capsule owner(owned.get(), [](void* vector) { delete static_cast<std::vector<T>*>(vector); });
  owned.release();
  return py::array_t<T>(kept.size(), kept.data(), owner);
}

// (counts, how many grams have each).
py::tuple as_arrays(const ngrams::Spectrum& spectrum) {
  std::vector<int64_t> counts, grams;
  for (const auto& [count, number] : spectrum) {
    counts.push_back(count);
    grams.push_back(number);
  }
  return py::make_tuple(as_array(std::move(counts)), as_array(std::move(grams)));
}

py::list as_arrays(const std::vector<ngrams::Spectrum>& spectra) {
  py::list list;
  for (const ngrams::Spectrum& spectrum : spectra) list.append(as_arrays(spectrum));
  return list;
}

template <class Token>
using Tokens = py::array_t<Token, py::array::c_style>;

template <class Token>
py::list count_ngrams(const Tokens<Token>& tokens, int64_t max_length, int64_t starts, int64_t boundary,
                      int64_t threads, size_t buffer_bytes) {
  std::vector<ngrams::Level> levels;
  {
    const py::gil_scoped_release release;
    levels = ngrams::count(tokens.data(), tokens.size(), {max_length, starts, boundary, threads, buffer_bytes});
  }
  py::list list;
  for (ngrams::Level& level : levels) {
    list.append(py::make_tuple(as_array(std::move(level.parent)), as_array(std::move(level.token)),
                               as_array(std::move(level.count))));
  }
  return list;
}

template <class Token>
py::tuple count_spectra(const Tokens<Token>& tokens, int64_t max_length, int64_t threads, size_t buffer_bytes) {
  ngrams::Spectra spectra;
  {
    const py::gil_scoped_release release;
    spectra = ngrams::count_spectra(tokens.data(), tokens.size(),
                                    {max_length, tokens.size(), /*boundary=*/-1, threads, buffer_bytes});
  }
  return py::make_tuple(as_arrays(spectra.grams), as_arrays(spectra.contexts));
}

template <class Token>
void bind_for(py::module_& m) {
  using py::arg;
  m.def("count_ngrams", &count_ngrams<Token>, arg("tokens").noconvert(), arg("max_length"), arg("starts"),
        arg("boundary"), arg("threads"), arg("buffer_bytes"));
  m.def("count_spectra", &count_spectra<Token>, arg("tokens").noconvert(), arg("max_length"), arg("threads"),
        arg("buffer_bytes"));
}

}  // namespace

void bind_ngrams(py::module_& m) {
  bind_for<uint8_t>(m);
  bind_for<uint16_t>(m);
  bind_for<uint32_t>(m);
  m.attr("max_ngram_tokens") = ngrams::kMaxTokens;
}

}  // namespace charlm
