// The bindings of the CUDA kernels, where they were built.
#pragma once
#include <pybind11/pybind11.h>

namespace dyncore::bindings {

void define_cuda(pybind11::module_& module);

}  // namespace dyncore::bindings
