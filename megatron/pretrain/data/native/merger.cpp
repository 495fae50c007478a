#include "merger.h"

#include <algorithm>

namespace neo {
const std::vector<uint32_t>& Merger::merge(const Byte* text, size_t size) {
  ids_.clear();
  read_symbols(text, size);
  if (symbols_.size() > kShortUnit)
    merge_long();
  else if (symbols_.size() > 1)
    merge_short();
  spell(text);
  return ids_;
}

void Merger::read_symbols(const Byte* text, size_t size) {
  symbols_.clear();
  for (const Byte* at = text; at < text + size; at += character_size(*at))
    symbols_.push_back(vocabulary_.symbol_of(decode(at)));
}

// The merges lie in an array beside the symbols, so that the first of the smallest ranks is the pair that
// SentencePiece's queue would give. A merge changes what its two neighbours can become and nothing else; the
// tables' memory is fetched for both while the arrays close up.
void Merger::merge_short() {
  size_t last = symbols_.size() - 1;  // has no right neighbour
  Symbol* symbols = symbols_.data();
  for (size_t i = 0; i < last; ++i)
    merges_[i] = vocabulary_.merge_to(vocabulary_.pair(symbols[i], symbols[i + 1]));
  for (;;) {
    size_t best = 0;
    int32_t rank = Merge::kNever;
    for (size_t i = 0; i < last; ++i) {
      const bool is_better = merges_[i].rank < rank;
      best = is_better ? i : best;
      rank = is_better ? merges_[i].rank : rank;
    }
    if (rank == Merge::kNever) break;
    const Symbol merged = merges_[best].symbol;
    symbols[best] = merged;
    const bool has_left = best > 0, has_right = best + 1 < last;
    const auto left = has_left ? vocabulary_.look_ahead(symbols[best - 1], merged) : Vocabulary::Pair{};
    const auto right = has_right ? vocabulary_.look_ahead(merged, symbols[best + 2]) : Vocabulary::Pair{};
    for (size_t i = best + 1; i < last; ++i) {
      symbols[i] = symbols[i + 1];
      merges_[i] = merges_[i + 1];
    }
    --last;
    if (has_left) merges_[best - 1] = vocabulary_.merge_of(left);
    if (has_right) merges_[best] = vocabulary_.merge_of(right);
  }
  symbols_.resize(last + 1);
}

// The same with a heap, in which pairs that went out of date stay until they come up. Symbols only grow,
// so a place that holds the symbol it held has merged nothing, and its neighbour is the one it had; if
// that, too, holds what it held, the pair is as it was noted.
void Merger::merge_long() {
  if (symbols_.size() > kLongestUnit) throw TooLong("2^31 characters or more without end");
  const auto count = static_cast<int32_t>(symbols_.size());
  places_.clear();
  candidates_.clear();
  for (int32_t i = 0; i < count; ++i) places_.push_back({symbols_[i], i - 1, i + 1 < count ? i + 1 : -1});
  for (int32_t i = 0; i + 1 < count; ++i) note(i, i + 1);
  std::make_heap(candidates_.begin(), candidates_.end());
  while (!candidates_.empty()) {
    std::pop_heap(candidates_.begin(), candidates_.end());
    const Candidate best = candidates_.back();
    candidates_.pop_back();
    Place& left = places_[best.left];
    if (left.symbol != best.left_symbol || left.next < 0) continue;
    Place& right = places_[left.next];
    if (right.symbol != best.right_symbol) continue;
    left.symbol = best.merged;
    right.symbol = kNoSymbol;
    left.next = right.next;
    if (left.next >= 0) places_[left.next].previous = best.left;
    const auto add = [this](int32_t from, int32_t to) {
      const size_t before = candidates_.size();
      note(from, to);
      if (candidates_.size() > before) std::push_heap(candidates_.begin(), candidates_.end());
    };
    if (left.previous >= 0) add(left.previous, best.left);
    if (left.next >= 0) add(best.left, left.next);
  }
  symbols_.clear();
  for (int32_t i = 0; i >= 0; i = places_[i].next) symbols_.push_back(places_[i].symbol);
  if (places_.size() > kRareUnit) {
    places_ = {};
    candidates_ = {};
  }
}

void Merger::note(int32_t left, int32_t right) {
  const Symbol left_symbol = places_[left].symbol, right_symbol = places_[right].symbol;
  const Merge merge = vocabulary_.merge_of(left_symbol, right_symbol);
  if (merge.rank != Merge::kNever)
    candidates_.push_back({merge.rank, left, merge.symbol, left_symbol, right_symbol});
}

// Byte fallback: a character that stayed alone and is no piece becomes the ids of its UTF-8 bytes. One
// without a symbol is a unit of its own, so it is what `text` begins with.
void Merger::spell(const Byte* text) {
  for (const Symbol symbol : symbols_) {
    if (vocabulary_.is_piece(symbol)) {
      ids_.push_back(symbol);
      continue;
    }
    Byte bytes[4];
    uint32_t character = symbol == kNoSymbol ? decode(text) : vocabulary_.character_of(symbol);
    if (character == ' ') character = kSpaceMark;
    const size_t size = encode(character, bytes);
    for (size_t i = 0; i < size; ++i) ids_.push_back(vocabulary_.byte_id(bytes[i]));
  }
}

}  // namespace neo
