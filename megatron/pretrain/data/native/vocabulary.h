// What merging needs to know of a model, in tables made for looking up.
//
// SentencePiece merges strings. Here a string is a number, its symbol: the piece's id, or, from
// `pieces` on, a character that stands in pieces without being one. Every string that can come up has
// exactly one symbol: merging starts from characters and each merge makes a piece, and no two pieces
// have the same text. So two symbols that lie side by side make a piece if and only if their pair is in
// the table of merges, which holds every way to cut a piece into two strings that have symbols.
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <vector>

#include "hash.h"
#include "model.h"
#include "utf8.h"

namespace neo {

using Symbol = uint32_t;
constexpr int kSymbolBits = 20;
// A character that stands in no piece. It has no neighbour to merge with: see `may_join`.
constexpr Symbol kNoSymbol = (1u << kSymbolBits) - 1;
constexpr uint32_t kSpaceMark = 0x2581;  // ▁, which SentencePiece writes for a space

// What a pair of symbols becomes. Ranks are the scores' order as integers: the smaller rank has the
// greater score, equal scores have equal ranks.
struct Merge {
  static constexpr int32_t kNever = 0x7FFFFFFF;
  int32_t rank = kNever;
  Symbol symbol = kNoSymbol;
};

// A set of hashes that is never wrong about what it has. 2 Mbit, 256 KiB: it stays in a core's own cache.
class Filter {
 public:
  void add(uint64_t hash) { words_[hash >> 6 & kMask] |= 1ull << (hash & 63); }
  void prefetch(uint64_t hash) const { __builtin_prefetch(&words_[hash >> 6 & kMask]); }
  bool may_have(uint64_t hash) const { return words_[hash >> 6 & kMask] >> (hash & 63) & 1; }

 private:
  static constexpr size_t kMask = (1 << 15) - 1;
  std::vector<uint64_t> words_ = std::vector<uint64_t>(kMask + 1);
};

// The same for pairs of characters, made for being asked eight at once: by a hash's upper bits a word, and a
// bit of it, counted from its top. 64 KiB, which stays near the core; of pairs that it lacks, one in 25
// seems to be there.
class JoinFilter {
 public:
  static constexpr int kWordShift = 18, kBitShift = 13;

  void add(uint32_t hash) { words_[hash >> kWordShift] |= 0x80000000u >> (hash >> kBitShift & 31); }
  bool may_have(uint32_t hash) const {
    return words_[hash >> kWordShift] << (hash >> kBitShift & 31) >> 31;
  }
  const uint32_t* words() const { return words_.data(); }

 private:
  std::vector<uint32_t> words_ = std::vector<uint32_t>(size_t{1} << (32 - kWordShift));
};

class Vocabulary {
 public:
  static constexpr uint32_t kLeftFactor = 0x9E3779B1, kRightFactor = 0x85EBCA77;

  explicit Vocabulary(const Model& model);

  bool add_dummy_prefix() const { return add_dummy_prefix_; }
  bool has_space() const { return is_piece(symbol_of(kSpaceMark)); }

  // A space counts as the space mark: the text that SentencePiece merges has no space left in it.
  Symbol symbol_of(uint32_t code_point) const {
    if (code_point < kBasic) return basic_[code_point];
    return pages_[page_of_[code_point >> kPageBits] << kPageBits | (code_point & kPageMask)];
  }
  // Of the characters below 65,536.
  const Symbol* symbols() const { return basic_.data(); }
  const JoinFilter& join_filter() const { return join_filter_; }
  Symbol pieces() const { return pieces_; }
  bool is_piece(Symbol symbol) const { return symbol < pieces_; }
  // Of an ASCII character that is one id where it stands alone; else kNoSymbol.
  Symbol ascii_id(Byte byte) const { return ascii_ids_[byte]; }
  // The character of a symbol that is no piece.
  uint32_t character_of(Symbol symbol) const { return extra_characters_[symbol - pieces_]; }
  uint32_t byte_id(Byte byte) const { return byte_ids_[byte]; }

  // Two symbols side by side whose merge will be asked for. Both tables are larger than the nearest cache, and
  // to wait for one after the other would be most of the time of merging.
  struct Pair {
    uint64_t key = 0, hash = 0;
  };
  Pair look_ahead(Symbol left, Symbol right) const {
    const uint64_t key = pair_key(left, right);
    const uint64_t hash = hash_of(key);
    merge_filter_.prefetch(hash);
    __builtin_prefetch(&merges_[hash >> 24 & merge_mask_]);
    return {key, hash};
  }
  Merge merge_of(const Pair& pair) const {
    if (!merge_filter_.may_have(pair.hash)) return Merge{};
    for (size_t slot = pair.hash >> 24 & merge_mask_;; slot = (slot + 1) & merge_mask_) {
      if (merges_[slot] >> kMergedBits == pair.key) return merge_to(merges_[slot] & kNoSymbol);
      if (merges_[slot] == kEmptySlot) return Merge{};
    }
  }
  Merge merge_of(Symbol left, Symbol right) const {
    const uint64_t key = pair_key(left, right);
    return merge_of(Pair{key, hash_of(key)});
  }

  // What a merge makes that makes this; never, where it is kNoSymbol.
  Merge merge_to(uint64_t symbol) const {
    return symbol == kNoSymbol ? Merge{} : Merge{rank_of(symbol), static_cast<Symbol>(symbol)};
  }
  // The piece that is two characters' text; kNoSymbol where there is none. Of the merges these are few, so
  // that their table is near the core. Two slots are looked at together: it is a branch less.
  Symbol pair(Symbol left, Symbol right) const {
    const uint64_t key = pair_key(left, right);
    for (size_t slot = pair_slot(left, right);; slot += 2) {
      const uint64_t one = pairs_[slot & pair_mask_], other = pairs_[(slot + 1) & pair_mask_];
      const uint64_t found = one >> kMergedBits == key ? one : other;
      if (found >> kMergedBits == key) return found & kNoSymbol;
      if (one == kEmptySlot || other == kEmptySlot) return kNoSymbol;
    }
  }

  // False only where the characters stand side by side in no piece. (True may be a chance match of the
  // filter; that costs time, not exactness.) Neither may be kNoSymbol.
  bool may_join(Symbol left, Symbol right) const { return join_filter_.may_have(join_hash(left, right)); }
  // Of three ASCII characters, 7 bits each: bit 0, whether they stand side by side in some piece; bit 1,
  // whether the last two are a piece.
  uint64_t ascii_joins(uint32_t three) const { return ascii_joins_[three >> 4] >> (2 * (three & 15)) & 3; }
  const uint32_t* ascii_joins_table() const { return ascii_joins_.data(); }

 private:
  class Builder;

  static constexpr uint32_t kBasic = 0x10000;
  static constexpr int kPageBits = 8;
  static constexpr uint32_t kPageMask = (1u << kPageBits) - 1;
  static constexpr uint32_t kPages = 0x110000 >> kPageBits;
  // A slot of the merges' table: the pair, and in the low bits the piece that it makes.
  static constexpr int kMergedBits = 64 - 2 * kSymbolBits;
  // Two that stand in no piece have an empty slot's pair, and it says that they make none.
  static constexpr uint64_t kEmptySlot = ~0ull;
  static_assert(kMergedBits >= kSymbolBits && (kEmptySlot & kNoSymbol) == kNoSymbol);

  // In most models ids follow the scores, and nothing need be fetched.
  int32_t rank_of(uint64_t piece) const {
    return ids_are_ranks_ ? static_cast<int32_t>(piece) : ranks_[piece];
  }
  static uint64_t pair_key(Symbol left, Symbol right) {
    return static_cast<uint64_t>(left) << kSymbolBits | right;
  }
  static uint64_t hash_of(uint64_t key) { return mix(key ^ 0xA0761D6478BD642Full, 0xE7037ED1A0B428DBull); }
  // Made for each character of a text: less thorough, and faster.
  static uint32_t join_hash(Symbol left, Symbol right) { return left * kLeftFactor + right * kRightFactor; }
  size_t pair_slot(Symbol left, Symbol right) const {
    return (left * 0x9E3779B97F4A7C15ull + right * 0xC2B2AE3D27D4EB4Full) >> 40 & pair_mask_;
  }

  // Of the characters below 65,536, so that one look-up is enough for almost every text.
  std::vector<Symbol> basic_ = std::vector<Symbol>(kBasic, kNoSymbol);
  // Of the others, by pages of 256; pages without a character in a piece are one.
  std::vector<Symbol> pages_;
  std::array<uint16_t, kPages> page_of_{};
  std::vector<uint32_t> extra_characters_;
  std::array<uint32_t, 256> byte_ids_{};
  std::vector<int32_t> ranks_;
  bool ids_are_ranks_ = false;
  std::vector<uint64_t> merges_;
  size_t merge_mask_ = 0;
  std::vector<uint64_t> pairs_;
  size_t pair_mask_ = 0;
  Filter merge_filter_;
  JoinFilter join_filter_;
  std::vector<uint32_t> ascii_joins_ = std::vector<uint32_t>((1 << 21) / 16);
  std::array<Symbol, 128> ascii_ids_{};
  Symbol pieces_ = 0;
  bool add_dummy_prefix_ = true;
};

}  // namespace neo
