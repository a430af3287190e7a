#pragma once

#include <pybind11/pybind11.h>

namespace charlm {

// count_ngrams and count_spectra, for tokens of each width.
void bind_ngrams(pybind11::module_& m);

}  // namespace charlm
