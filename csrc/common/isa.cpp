#include "common/isa.h"

#include <cstdint>
#include <stdexcept>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace dyncore {

// The tables of the instruction sets (csrc/cpu/table.cpp).
namespace baseline {
const Kernels& table();
}
#if defined(DYNCORE_WITH_avx2)
namespace avx2 {
const Kernels& table();
}
#endif
#if defined(DYNCORE_WITH_avx512)
namespace avx512 {
const Kernels& table();
}
#endif
#if defined(DYNCORE_WITH_avx512_bf16)
namespace avx512_bf16 {
const Kernels& table();
}
#endif

namespace {

struct Features {
  bool avx2 = false;
  bool avx512 = false;
  bool avx512_bf16 = false;
};

Features detect() {
  Features found;
#if defined(__x86_64__)
  unsigned a, b, c, d;
  if (!__get_cpuid(1, &a, &b, &c, &d)) return found;
  const bool fma = c >> 12 & 1, osxsave = c >> 27 & 1, f16c = c >> 29 & 1;
  if (!fma || !f16c || !osxsave || !__get_cpuid_count(7, 0, &a, &b, &c, &d)) return found;
  uint32_t low, high;
  __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));  // the register states that the operating system saves
  const bool saves_ymm = (low & 0x06) == 0x06, saves_zmm = (low & 0xe6) == 0xe6;
  found.avx2 = saves_ymm && (b >> 5 & 1);
  const bool f = b >> 16 & 1, dq = b >> 17 & 1, bw = b >> 30 & 1, vl = b >> 31 & 1;
  found.avx512 = found.avx2 && saves_zmm && f && dq && bw && vl;
  if (found.avx512 && __get_cpuid_count(7, 1, &a, &b, &c, &d)) found.avx512_bf16 = a >> 5 & 1;
#endif
  return found;
}

struct Entry {
  std::string name;
  const Kernels* table;
};

const std::vector<Entry>& supported() {
  static const std::vector<Entry> entries = [] {
    [[maybe_unused]] const Features has = detect();
    std::vector<Entry> list{{"baseline", &baseline::table()}};
#if defined(DYNCORE_WITH_avx2)
    if (has.avx2) list.push_back({"avx2", &avx2::table()});
#endif
#if defined(DYNCORE_WITH_avx512)
    if (has.avx512) list.push_back({"avx512", &avx512::table()});
#endif
#if defined(DYNCORE_WITH_avx512_bf16)
    if (has.avx512_bf16) list.push_back({"avx512_bf16", &avx512_bf16::table()});
#endif
    return list;
  }();
  return entries;
}

const Entry* selected = nullptr;

const Entry& current() {
  return selected ? *selected : supported().back();
}

}  // namespace

std::vector<std::string> supported_isas() {
  std::vector<std::string> names;
  for (const Entry& entry : supported()) names.push_back(entry.name);
  return names;
}

void select_isa(const std::string& name) {
  if (name.empty()) {
    selected = nullptr;
    return;
  }
  std::string names;
  for (const Entry& entry : supported()) {
    if (entry.name == name) {
      selected = &entry;
      return;
    }
    names += (names.empty() ? "" : ", ") + entry.name;
  }
  throw std::invalid_argument("DYNCORE_CPU_ISA: expected one of " + names + " on this machine, got '" + name + "'");
}

const std::string& selected_isa() {
  return current().name;
}
const Kernels& kernels() {
  return *current().table;
}

}  // namespace dyncore
