// Where text may be cut into units that are encoded each on its own.
//
// SentencePiece writes ▁ for every space, puts one more ▁ before the text, and then merges neighbours as
// long as what they make is a piece. Let a and b be neighbouring characters of that marked text that stand
// side by side in no piece. A symbol that reaches over the boundary between them would be a piece with a
// and b side by side; there is none; so no merge ever crosses the boundary. Merges left of it and right of
// it touch different symbols, and within either side the order of merging, by score and then from left to
// right, is the one that the side would have alone. So the ids of the text are the ids of its sides, end
// to end. What follows a merge does not change this: unknown characters become bytes one by one, and
// unused pieces and user-defined symbols, which SentencePiece treats by other rules, are declined.
//
// The same holds of more boundaries. Let c stand before a and d after b. A symbol that reaches over the
// boundary between a and b is ab itself, or it has cab or abd in it. Where ab is no piece, and neither cab
// nor abd stands in one, no merge crosses that boundary. This is looked at in ASCII, where it makes units of
// text without pattern so short that they are seen again; for other characters it costs more than it saves.
//
// A character that stands in no piece has boundaries on both sides and is a unit of its own.
#pragma once

#include <algorithm>
#include <cstring>

#include "vocabulary.h"

namespace neo {

class Splitter {
 public:
  explicit Splitter(const Vocabulary& vocabulary) : vocabulary_(vocabulary) {}

  // Calls take(start, size) for each unit of the text in turn. A unit's first byte never lies inside a
  // character, for boundaries are marked at first bytes alone.
  template <class Take>
  void split(const Byte* text, size_t size, const Take& take) const {
    if (size == 0) return;
    size_t unit = 0;
    for (size_t block = 0; block < size; block += kBlock) {
      uint64_t boundaries = boundaries_of(text, block, std::min(size - block, kBlock), size);
      for (; boundaries; boundaries &= boundaries - 1) {
        const size_t at = block + static_cast<size_t>(__builtin_ctzll(boundaries));
        take(text + unit, at - unit);
        unit = at;
      }
    }
    take(text + unit, size - unit);
  }

 private:
  static constexpr size_t kBlock = 64;

  // Bit i: a unit begins at block + i. Never set for the text's first byte.
  uint64_t boundaries_of(const Byte* text, size_t block, size_t size, size_t text_size) const {
    const size_t before = block ? 2 : 0, after = block + size < text_size;
    const Byte* const at = text + block;
    uint64_t found = is_ascii(at - before, before + size + after)
                         ? ascii_boundaries(at, size, block ? at[-2] << 7 | at[-1] : 0, after)
                         : other_boundaries(at, size, text);
    return block ? found : found & ~1ull;
  }

  static bool is_ascii(const Byte* at, size_t size) {
    Byte all = 0;
    for (size_t i = 0; i < size; ++i) all |= at[i];
    return all < 0x80;
  }

  // Without a branch on the data: what text comes next is what a processor guesses worst. `last` are the
  // two characters before, 7 bits each; 0, which stands in no piece, where there is none. `after`: whether
  // one follows.
  uint64_t ascii_boundaries(const Byte* at, size_t size, uint32_t last, bool after) const {
    uint64_t pairs = 0, triples = 0;
    const auto append = [&last](Byte byte) { return last = (last << 7 | byte) & 0x1FFFFF; };
    for (size_t i = 0; i < size; ++i) {
      const uint64_t joins = vocabulary_.ascii_joins(append(at[i]));
      pairs |= (joins >> 1) << i;
      triples |= (joins & 1) << i;
    }
    const uint64_t next = after ? vocabulary_.ascii_joins(append(at[size])) & 1 : 0;
    const uint64_t joined = pairs | triples | triples >> 1 | next << (size - 1);
    return ~joined & ~0ull >> (kBlock - size);
  }

  uint64_t other_boundaries(const Byte* at, size_t size, const Byte* text) const {
    uint64_t found = 0;
    Symbol previous = at == text ? kNoSymbol : symbol_before(at);
    for (size_t i = 0; i < size; ++i) {
      if ((at[i] & 0xC0) == 0x80) continue;
      const Symbol current = vocabulary_.symbol_of(decode(at + i));
      const bool joins =
          previous != kNoSymbol && current != kNoSymbol && vocabulary_.may_join(previous, current);
      found |= static_cast<uint64_t>(!joins) << i;
      previous = current;
    }
    return found;
  }

  // Of the character that ends before `at`, or, where `at` lies inside a character, of that one: its
  // boundary, if any, was marked in the block where it begins.
  Symbol symbol_before(const Byte* at) const {
    do --at;
    while ((*at & 0xC0) == 0x80);
    return vocabulary_.symbol_of(decode(at));
  }

  const Vocabulary& vocabulary_;
};

}  // namespace neo
