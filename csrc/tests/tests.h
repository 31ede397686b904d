// The parts of the kernel test, and what runs each kernel in every instruction set and on several threads.
#pragma once
#include "common/isa.h"
#include "tests/problem.h"

namespace dyncore::tests {

void test_plans();
void test_check_plan();
void test_workspaces();
void test_rows();
void test_grouped_linear();
void test_grouped_mlp();
void test_compressed();
void test_sparse_linear();
void test_sparse_mlp();
void test_tree_route();
void test_attention();
void test_cuda_plans();
void test_cuda_rows();
void test_concurrent_calls();

constexpr int kThreads[] = {1, 3};

// make(kernels, threads) returns the outputs' bytes, which must not depend on the thread count; check(outputs) compares
// those of each instruction set with what is wanted.
template <class Make, class Check>
void on_every_isa(const std::string& name, Make make, Check check) {
  for (const std::string& isa : supported_isas()) {
    select_isa(isa);
    set_case(name + " on " + isa);
    auto first = make(kernels(), kThreads[0]);
    check(first);
    for (int threads : kThreads) {
      if (threads == kThreads[0]) continue;
      const auto other = make(kernels(), threads);
      for (size_t i = 0; i < first.size(); ++i)
        expect(first[i].bytes() == other[i].bytes(), "output " + std::to_string(i) + ": bits depend on the threads");
    }
  }
  select_isa("");
}

using Outputs = std::vector<Image>;

}  // namespace dyncore::tests
