// Sizes of scratch memory, which no result shows.
#define DYNCORE_ISA tests_of_workspaces  // a namespace of its own for what is compiled here
#include "cpu/common/group.h"
#include "tests/tests.h"

namespace dyncore::tests {

void test_workspaces() {
  using tests_of_workspaces::NC;
  for (int64_t columns = 0; columns <= 9000; ++columns) {
    set_case("workspace_stride of " + std::to_string(columns));
    const int64_t stride = tests_of_workspaces::workspace_stride(columns);
    expect(stride >= columns && stride % NC == 0, "whole panels");
    for (Dtype dtype : kDtypes)
      expect(stride * bytes_of(dtype) % 4096 != 0, std::string("a multiple of 4096 bytes of ") + name_of(dtype));
  }
}

}  // namespace dyncore::tests
