// Byte-pair encoding of one unit of text, as SentencePiece does it: again and again the pair of
// neighbours with the greatest score is merged, the leftmost of several with that score.
#pragma once

#include <array>
#include <limits>
#include <stdexcept>
#include <vector>

#include "vocabulary.h"

namespace neo {

// Text whose number of characters or ids has no place in 32 bits; the message says what of it.
struct TooLong : std::length_error {
  using std::length_error::length_error;
};

class Merger {
 public:
  explicit Merger(const Vocabulary& vocabulary) : vocabulary_(vocabulary) {}

  // The ids of `size` bytes of valid UTF-8, in which a space stands for the space mark. The view is valid
  // until the next call. Time: O(n^2) with a small constant for a short unit, O(n log n) for a long one.
  const std::vector<uint32_t>& merge(const Byte* text, size_t size);

 private:
  // Up to so many characters scanning an array for the best merge beats a heap.
  static constexpr size_t kShortUnit = 48;
  static constexpr size_t kLongestUnit = std::numeric_limits<int32_t>::max();
  // The memory of one with more characters is given back.
  static constexpr size_t kRareUnit = 1 << 16;

  // A symbol of a long unit, in a doubly linked list; a place that was merged into its left neighbour
  // holds kNoSymbol.
  struct Place {
    Symbol symbol;
    int32_t previous, next;
  };
  // A pair that could be merged when it was noted. It is out of date once either symbol has changed.
  struct Candidate {
    int32_t rank, left;
    Symbol merged, left_symbol, right_symbol;
    // The order of a heap whose top is the smallest rank, and among these the leftmost.
    bool operator<(const Candidate& other) const {
      return rank != other.rank ? rank > other.rank : left > other.left;
    }
  };

  void read_symbols(const Byte* text, size_t size);
  void merge_short();
  void merge_long();
  void note(int32_t left, int32_t right);
  void spell(const Byte* text);

  const Vocabulary& vocabulary_;
  std::vector<Symbol> symbols_;
  // Of a short unit: what each symbol would make with its right neighbour.
  std::array<Merge, kShortUnit> merges_;
  std::vector<Place> places_;
  std::vector<Candidate> candidates_;
  std::vector<uint32_t> ids_;
};

}  // namespace neo
