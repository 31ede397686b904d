// From a dtype known at run time to a type known at compile time.
#pragma once
#include "cpu/common/vec.h"
#include "cpu/kernels.h"

namespace dyncore::DYNCORE_ISA {

template <class Element>
struct TypeConstant {
  using T = Element;
};

// Calls f(constant) with the dtype's element type as the constant's T.
template <class F>
DYNCORE_INLINE void with_type(Dtype dtype, F f) {
  switch (dtype) {
    case Dtype::float32:
      return f(TypeConstant<float>{});
    case Dtype::bfloat16:
      return f(TypeConstant<bf16>{});
    case Dtype::float16:
      return f(TypeConstant<half>{});
  }
}

}  // namespace dyncore::DYNCORE_ISA
