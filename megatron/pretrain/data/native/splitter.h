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
#include "row.h"

namespace neo {

class Splitter {
 public:
  explicit Splitter(const Vocabulary& vocabulary) : vocabulary_(vocabulary) {}

  // Calls take(start, size) for each unit of the text in turn. A unit's first byte never lies inside a
  // character, for boundaries are marked at first bytes alone. `kReadAhead` bytes after the text must be
  // readable.
  template <class Take>
  void split(const Byte* text, size_t size, const Take& take) const {
    split(text, size, take, [](const Row&, const Byte* unit) { return unit; });
  }

  // The same, but a row, of blocks that are not all ASCII, is offered to take_row(row, unit) first, where
  // `unit` is where the unit begins that is not yet taken. It returns where the first begins that it left,
  // which is `unit` or where one of the row's units begins.
  template <class Take, class TakeRow>
  void split(const Byte* text, size_t size, const Take& take, const TakeRow& take_row) const {
    if (size == 0) return;
    const Byte* unit = text;
    const auto take_to = [&](const Byte* next) {
      take(unit, static_cast<size_t>(next - unit));
      unit = next;
    };
    for (size_t block = 0; block < size;) {
      const Byte* const at = text + block;
      const size_t block_size = std::min(size - block, kBlock);
      const size_t before = block ? 2 : 0, after = block + block_size < size;
      if (is_ascii(at - before, before + block_size + after)) {
        uint64_t boundaries = ascii_boundaries(at, block_size, before, after);
        if (!block) boundaries &= ~1ull;
        for (; boundaries; boundaries &= boundaries - 1) take_to(at + __builtin_ctzll(boundaries));
        block += block_size;
      } else {
        block += split_row(text, block, size, unit, take, take_row);
      }
    }
    take_to(text + size);
  }

 private:
  static constexpr size_t kBlock = Row::kBytes;

  // Takes the units that end in a row at text[block]; returns how many bytes the row has.
  template <class Take, class TakeRow>
  __attribute__((noinline)) size_t split_row(const Byte* text, size_t block, size_t size, const Byte*& unit,
                                             const Take& take, const TakeRow& take_row) const {
    Row row;
    read_row(vocabulary_, text + block, size - block, block == 0, row);
    if (row.count == 0) return row.size;
    unit = take_row(row, unit);
    for (uint64_t left = ~row.joined & ~0ull >> (64 - row.count); left; left &= left - 1) {
      const Byte* const next = row.start(1 + static_cast<size_t>(__builtin_ctzll(left)));
      if (next <= unit) continue;
      take(unit, static_cast<size_t>(next - unit));
      unit = next;
    }
    return row.size;
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

  const Vocabulary& vocabulary_;
};

}  // namespace neo
