// The units of a row of characters, and the ids of those that are no more than three characters.
#pragma once

#include "row.h"

namespace neo {

// What one symbol, or two or three side by side, become follows from the table of merges alone:
//   one    a character is its piece, or, where it is none, the ids of its bytes.
//   two    they are one piece if their text is one, for then they can be merged, and there is nothing else
//          to merge; else each stands alone.
//   three  of the pairs that can be merged, the one with the smaller rank is, the left of equals, as
//          SentencePiece does it. What comes of it and the third may be a piece in turn; that ends it.
class RowUnits {
 public:
  // unit: where the unit begins that is not yet taken, in the row or before it. The row has less than 64
  // characters, so that with character 0 there is a bit for each.
  RowUnits(const Row& row, const Byte* unit) : row_(row) {
    begins_ = ~row.joined << 1 & ~0ull >> (63 - row.count);
    begins_ |= static_cast<uint64_t>(unit == row.start(0) && row.starts[0] < 0);
    if (!begins_) return;
    first_ = static_cast<size_t>(__builtin_ctzll(begins_));
    last_ = static_cast<size_t>(63 - __builtin_clzll(begins_));
  }

  // Whether a unit is known to begin in the row; only then do the others say anything.
  bool has_some() const { return begins_; }
  // The characters where the first unit begins, and the last, of which it is not known where it ends.
  size_t first() const { return first_; }
  size_t last() const { return last_; }
  // Bit k: a unit that ends before `last`, of two characters, or of three or more, begins at character k.
  uint64_t twos() const { return inside() & ~(begins_ >> 1) & begins_ >> 2; }
  uint64_t longs() const { return inside() & ~(begins_ >> 1 | begins_ >> 2); }
  uint64_t characters() const { return ((1ull << last_) - 1) & ~0ull << first_; }

  // Of a unit that begins at character k and ends before `last`: characters and bytes.
  size_t size(size_t k) const { return static_cast<size_t>(__builtin_ctzll(begins_ >> (k + 1))) + 1; }
  size_t bytes(size_t k) const { return static_cast<size_t>(row_.start(k + size(k)) - row_.start(k)); }

 private:
  uint64_t inside() const { return begins_ & ~(1ull << last_); }

  const Row& row_;
  uint64_t begins_;
  size_t first_ = 0, last_ = 0;
};

// The ids of a row's units of one and two characters, without a branch on the data but for their number.
template <class Id>
struct ShortUnits {
  __attribute__((always_inline))  // as `write`: its users keep it in registers
  ShortUnits(const Vocabulary& vocabulary, const Row& row, const RowUnits& units) {
    // Eight at once; those past the last have no meaning, but there is room for them.
    for (size_t k = 0; k < units.last(); k += Row::kAhead)
      for (size_t i = k; i < k + Row::kAhead; ++i) ids[i] = static_cast<Id>(row.symbols[i]);
    pieces = row.pieces << 1 | static_cast<uint64_t>(vocabulary.is_piece(row.symbols[0]));
    for (uint64_t left = units.twos(); left; left &= left - 1) {
      const auto k = static_cast<size_t>(__builtin_ctzll(left));
      const Symbol merged = vocabulary.pair(row.symbols[k], row.symbols[k + 1]);
      const uint64_t is_merged = merged != kNoSymbol;
      ids[k] = is_merged ? static_cast<Id>(merged) : ids[k];
      pieces |= is_merged << k | is_merged << (k + 1);
      absorbed |= is_merged << (k + 1);
    }
  }

  // Writes the ids of characters `from` to `to`, where all units are of this kind and pieces. What lies behind
  // the end that is returned may be written, too.
  __attribute__((always_inline)) Id* write(size_t from, size_t to, Id* out) const {
    const uint64_t kept = ~absorbed;
    for (size_t k = from; k < to; ++k) {
      *out = ids[k];
      out += kept >> k & 1;
    }
    return out;
  }

  Id ids[Row::kBytes + Row::kAhead];
  uint64_t pieces;        // bit k: character k is a piece, or has become part of a pair
  uint64_t absorbed = 0;  // bit k: character k is the second of such a pair
};

// The symbols that a unit of three characters becomes; returns how many.
inline size_t merge_three(const Vocabulary& vocabulary, const Symbol* three, Symbol* merged) {
  const Merge left = vocabulary.merge_to(vocabulary.pair(three[0], three[1]));
  const Merge right = vocabulary.merge_to(vocabulary.pair(three[1], three[2]));
  if (left.rank == Merge::kNever && right.rank == Merge::kNever) {
    std::copy(three, three + 3, merged);
    return 3;
  }
  const bool is_left = left.rank <= right.rank;
  merged[0] = is_left ? left.symbol : three[0];
  merged[1] = is_left ? three[2] : right.symbol;
  const Merge all = vocabulary.merge_of(merged[0], merged[1]);
  if (all.rank == Merge::kNever) return 2;
  merged[0] = all.symbol;
  return 1;
}

}  // namespace neo
