// Every kernel of every instruction set that this machine has, at odd sizes, against plain loops in double. Built with
// sanitizers by `make sanitize`. With arguments: the parts that are named alone.
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstring>

#include "tests/tests.h"

int main(int argc, char** argv) {
  using namespace dyncore::tests;
  struct Part {
    const char* name;
    void (*run)();
  };
  const Part parts[] = {{"plans", test_plans},
                        {"check_plan", test_check_plan},
                        {"workspaces", test_workspaces},
                        {"rows", test_rows},
                        {"grouped_linear", test_grouped_linear},
                        {"grouped_mlp", test_grouped_mlp},
                        {"compressed", test_compressed},
                        {"sparse_linear", test_sparse_linear},
                        {"sparse_mlp", test_sparse_mlp},
                        {"tree_route", test_tree_route},
                        {"attention", test_attention},
#if defined(DYNCORE_CUDA_ON_HOST)
                        {"cuda plans", test_cuda_plans},
                        {"cuda rows", test_cuda_rows},
#endif
                        {"concurrent calls", test_concurrent_calls}};
  for (int i = 1; i < argc; ++i) {
    const auto named = [&](const Part& part) { return std::strcmp(argv[i], part.name) == 0; };
    if (std::any_of(std::begin(parts), std::end(parts), named)) continue;
    std::fprintf(stderr, "expected names of parts, got \"%s\"; there are:", argv[i]);
    for (const Part& part : parts) std::fprintf(stderr, " \"%s\"", part.name);
    std::fprintf(stderr, "\n");
    return 2;
  }
  for (const Part& part : parts) {
    const auto named = [&](const char* name) { return std::strcmp(name, part.name) == 0; };
    if (argc > 1 && std::none_of(argv + 1, argv + argc, named)) continue;
    const auto start = std::chrono::steady_clock::now();
    part.run();
    const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
    std::printf("%-16s %6.1f s\n", part.name, seconds.count());
    std::fflush(stdout);
  }
  std::printf("%d failures\n", failures());
  return failures() == 0 ? 0 : 1;
}
