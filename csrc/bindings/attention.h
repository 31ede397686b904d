#pragma once
#include <pybind11/pybind11.h>

namespace dyncore::bindings {

// Adds attention to the module dyncore._C.
void define_attention(pybind11::module_& m);

}  // namespace dyncore::bindings
