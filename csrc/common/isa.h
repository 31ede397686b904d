// Which instruction set the kernels run with: the best this processor has, or a lower one by name.
#pragma once
#include <string>
#include <vector>

#include "cpu/kernels.h"

namespace dyncore {

// Names that were compiled in and that this processor and operating system support, slowest first.
std::vector<std::string> supported_isas();

// Selects by name; an empty name selects the best. Throws std::invalid_argument for an unknown or unsupported one.
void select_isa(const std::string& name);

const std::string& selected_isa();
const Kernels& kernels();

}  // namespace dyncore
