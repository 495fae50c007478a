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

#include "ascii_joins.h"
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
                         ? ascii_boundaries(at, size, before, after)
                         : other_boundaries(at, size, text);
    return block ? found : found & ~1ull;
  }

  static bool is_ascii(const Byte* at, size_t size) {
    Byte all = 0;
    for (size_t i = 0; i < size; ++i) all |= at[i];
    return all < 0x80;
  }

  // before, after: how many characters of the text stand next to the block.
  uint64_t ascii_boundaries(const Byte* at, size_t size, size_t before, size_t after) const {
    // 0 stands in no piece: so it may stand for what is not there.
    Byte padded[2 + kBlock] = {};
    const bool is_whole = before == 2 && size == kBlock;
    if (!is_whole) std::memcpy(padded + 2 - before, at - before, before + size);
    const auto [pairs, triples] = ascii_joins(vocabulary_, is_whole ? at : padded + 2, size);
    uint64_t next = 0;
    if (after) {
      const uint32_t last = size > 1 ? at[size - 2] : before ? at[-1] : 0;
      next = vocabulary_.ascii_joins(last << 14 | at[size - 1] << 7 | at[size]) & 1;
    }
    const uint64_t joined = pairs | triples | triples >> 1 | next << (size - 1);
    return ~joined & ~0ull >> (kBlock - size);
  }

  // In two passes, so that the look-ups of many characters are under way at once.
  uint64_t other_boundaries(const Byte* at, size_t size, const Byte* text) const {
    Symbol symbols[kBlock + 1];
    Byte starts[kBlock];
    symbols[0] = at == text ? kNoSymbol : symbol_before(at);
    size_t count = 0;
    size_t i = 0;
    while (i < size && (at[i] & 0xC0) == 0x80) ++i;
    while (i < size) {
      starts[count] = static_cast<Byte>(i);
      const Character character = read_character(at + i);
      symbols[++count] = vocabulary_.symbol_of(character.code_point);
      i += character.size;
    }
    uint64_t found = 0;
    for (size_t k = 0; k < count; ++k) {
      const bool joins = (symbols[k] != kNoSymbol) & (symbols[k + 1] != kNoSymbol) &
                         vocabulary_.may_join(symbols[k], symbols[k + 1]);
      found |= static_cast<uint64_t>(!joins) << starts[k];
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
