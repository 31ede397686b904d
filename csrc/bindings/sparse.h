// The bindings of the sparse ops: sparse_linear and sparse_mlp.
#pragma once
#include <pybind11/pybind11.h>

namespace dyncore::bindings {

void define_sparse(pybind11::module_& module);

}  // namespace dyncore::bindings
