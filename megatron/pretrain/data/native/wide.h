// Whether this processor handles eight words, or 32 bytes, at once.
#pragma once

#if defined(__x86_64__)
#define NEO_HAS_WIDE
#define NEO_WIDE __attribute__((target("avx2,bmi,popcnt")))
#include <immintrin.h>

namespace neo {

inline const bool kHasWide =
    __builtin_cpu_supports("avx2") && __builtin_cpu_supports("bmi") && __builtin_cpu_supports("popcnt");

}  // namespace neo
#endif
