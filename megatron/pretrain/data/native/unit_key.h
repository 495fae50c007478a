// Units as keys of the caches, and the caches' slots.
#pragma once

#include <algorithm>

#include "hash.h"

namespace neo {

// Units are read in whole words, text in blocks of 64 bytes and four bytes from the end of one: so many bytes
// past the end of a text must be readable. What they hold does not matter.
constexpr size_t kReadAhead = 80;

// Words that keep the first `size` of 16 bytes.
struct Masks {
  uint64_t words[16][2] = {};
  constexpr Masks() {
    for (size_t size = 0; size < 16; ++size)
      for (size_t i = 0; i < size; ++i) words[size][i / 8] |= 0xFFull << (8 * (i % 8));
  }
};
constexpr Masks kMasks;

// A unit of up to 15 bytes is two words: its bytes, zeros, and its size in the last byte. Different units
// give different words, for the size tells zeros of the text from those that fill up.
struct ShortKey {
  static constexpr size_t kMostBytes = 15;

  ShortKey() = default;
  ShortKey(const Byte* unit, size_t size) {
    Byte bytes[16];
    std::memcpy(bytes, unit, sizeof bytes);
    low = load(bytes) & kMasks.words[size][0];
    high = (load(bytes + 8) & kMasks.words[size][1]) | static_cast<uint64_t>(size) << 56;
    hash = mix(low ^ 0xA0761D6478BD642Full, high ^ 0xE7037ED1A0B428DBull);
  }

  uint64_t low, high, hash;
};

// 32 bytes: the key, how many ids, the ids.
template <class Id>
struct ShortSlot {
  static constexpr size_t kMostIds = (16 - sizeof(Id)) / sizeof(Id);

  bool holds(const ShortKey& key) const { return low == key.low && high == key.high; }
  void fill(const ShortKey& key, const uint32_t* from, size_t n) {
    low = key.low;
    high = key.high;
    count = static_cast<Id>(n);
    for (size_t i = 0; i < kMostIds; ++i) ids[i] = i < n ? static_cast<Id>(from[i]) : Id{};
  }

  uint64_t low, high;
  Id count;
  Id ids[kMostIds];
};

// A longer unit, by its bytes; they are compared, the hash only says where to look.
struct LongKey {
  static constexpr size_t kMostBytes = 64;

  LongKey(const Byte* unit, size_t unit_size) : text(unit), size(unit_size), hash(unit_size) {
    size_t at = 0;
    for (; at + 8 <= size; at += 8) hash = mix(hash ^ load(unit + at), 0x9FB21C651E98DF25ull);
    hash = mix(hash ^ load(unit + size - 8), 0xD6E8FEB86659FD93ull);
  }

  const Byte* text;
  size_t size;
  uint64_t hash;
};

template <class Id>
struct LongSlot {
  static constexpr size_t kBytes = 192;
  static constexpr size_t kMostIds = (kBytes - LongKey::kMostBytes - 8) / sizeof(Id);

  bool holds(const LongKey& key) const {
    return size == key.size && hash == static_cast<uint32_t>(key.hash >> 32) &&
           std::memcmp(text, key.text, key.size) == 0;
  }
  void fill(const LongKey& key, const uint32_t* from, size_t n) {
    hash = static_cast<uint32_t>(key.hash >> 32);
    size = static_cast<uint16_t>(key.size);
    count = static_cast<uint16_t>(n);
    std::memcpy(text, key.text, key.size);
    std::copy(from, from + n, ids);
  }

  uint32_t hash;
  uint16_t size;
  uint16_t count;
  Byte text[LongKey::kMostBytes];
  Id ids[kMostIds];
};

}  // namespace neo
