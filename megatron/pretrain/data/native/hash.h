// Reading and mixing words of memory.
#pragma once

#include <cstring>

#include "utf8.h"

namespace neo {

// Words are taken for their bytes in order, and the numbers of a set go to the disk as they lie in memory.
static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__);

inline uint64_t load(const Byte* at) {
  uint64_t word;
  std::memcpy(&word, at, sizeof word);
  return word;
}

// Every bit of the result follows from all bits of both.
inline uint64_t mix(uint64_t a, uint64_t b) {
  const unsigned __int128 product = static_cast<unsigned __int128>(a) * b;
  return static_cast<uint64_t>(product) ^ static_cast<uint64_t>(product >> 64);
}

}  // namespace neo
