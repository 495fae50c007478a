#include "vocabulary.h"

#include <algorithm>
#include <cstdlib>
#include <functional>
#include <limits>
#include <string>

namespace neo {
namespace {

// A piece that text can spell. The others keep their ids but nothing ever merges to them: reserved pieces
// are no target of merges, merged text has the mark where the text had spaces, and it is valid UTF-8.
bool can_be_spelled(const Piece& piece) {
  const auto* at = reinterpret_cast<const Byte*>(piece.text.data());
  return piece.type == PieceType::kNormal && piece.text.find(' ') == std::string_view::npos &&
         is_utf8(at, at + piece.text.size());
}

// The byte that a piece such as <0x0A> stands for; -1 where it is spelled otherwise.
int byte_of(std::string_view text) {
  static constexpr std::string_view digits = "0123456789ABCDEF";
  if (text.size() != 6 || text.substr(0, 3) != "<0x" || text[5] != '>') return -1;
  const size_t high = digits.find(text[3]), low = digits.find(text[4]);
  return high == digits.npos || low == digits.npos ? -1 : static_cast<int>(high << 4 | low);
}

// Whether of two pieces that merging may make, the one with the smaller id always has the greater score.
bool fall_with_ids(const std::vector<Piece>& pieces) {
  float last = std::numeric_limits<float>::infinity();
  for (const Piece& piece : pieces) {
    if (piece.type != PieceType::kNormal) continue;
    if (!(piece.score < last)) return false;
    last = piece.score;
  }
  return true;
}

// Of each piece that merging may make: the scores in falling order, equal scores one rank.
std::vector<int32_t> rank_scores(const std::vector<Piece>& pieces) {
  std::vector<Symbol> order;
  for (Symbol id = 0; id < pieces.size(); ++id)
    if (pieces[id].type == PieceType::kNormal) order.push_back(id);
  const auto is_better = [&pieces](Symbol one, Symbol other) {
    return pieces[one].score > pieces[other].score;
  };
  // As training leaves them; sorting would take longer than all else here.
  if (!std::is_sorted(order.begin(), order.end(), is_better))
    std::sort(order.begin(), order.end(), is_better);
  std::vector<int32_t> ranks(pieces.size());
  for (size_t place = 1; place < order.size(); ++place)
    ranks[order[place]] = ranks[order[place - 1]] + is_better(order[place - 1], order[place]);
  return ranks;
}

size_t power_of_two_from(size_t size) {
  size_t power = 1;
  while (power < size) power *= 2;
  return power;
}

// Pieces by their texts. All cuts of a piece are looked up; so a hash is one that gives that of a text's end
// from those of the text and its beginning: the text as a number in a base, whose powers are at hand.
class PieceIndex {
 public:
  static constexpr Symbol kAbsent = kNoSymbol;

  explicit PieceIndex(const std::vector<Piece>& pieces)
      : pieces_(pieces), mask_(power_of_two_from(2 * pieces.size() + 1) - 1), slots_(mask_ + 1) {
    for (Symbol id = 0; id < pieces.size(); ++id) {
      const std::string_view text = pieces[id].text;
      const uint64_t hash = mix(hash_of(text), kMixer);
      size_t slot = hash & mask_;
      for (; slots_[slot].id != kAbsent; slot = (slot + 1) & mask_)
        if (slots_[slot].holds(hash) && pieces[slots_[slot].id].text == text)
          throw Declined("two of its pieces have the same text");
      slots_[slot] = {static_cast<uint32_t>(hash >> 32), id};
    }
  }

  static uint64_t append(uint64_t hash, char byte) { return hash * kBase + static_cast<Byte>(byte) + 1; }
  static uint64_t hash_of(std::string_view text) {
    uint64_t hash = 0;
    for (const char byte : text) hash = append(hash, byte);
    return hash;
  }

  // The piece with this text, whose hash is given.
  Symbol find(std::string_view text, uint64_t text_hash) const {
    const uint64_t hash = mix(text_hash, kMixer);
    for (size_t slot = hash & mask_; slots_[slot].id != kAbsent; slot = (slot + 1) & mask_)
      if (slots_[slot].holds(hash) && pieces_[slots_[slot].id].text == text) return slots_[slot].id;
    return kAbsent;
  }

  static constexpr uint64_t kBase = 0x9E3779B97F4A7C15ull;

 private:
  struct Slot {
    bool holds(uint64_t of) const { return hash == static_cast<uint32_t>(of >> 32); }
    uint32_t hash = 0;
    Symbol id = kAbsent;
  };
  static constexpr uint64_t kMixer = 0xD6E8FEB86659FD93ull;

  const std::vector<Piece>& pieces_;
  size_t mask_;
  std::vector<Slot> slots_;
};

}  // namespace

class Vocabulary::Builder {
 public:
  Builder(Vocabulary& to, const Model& model) : to_(to), pieces_(model.pieces), index_(model.pieces) {
    to_.add_dummy_prefix_ = model.add_dummy_prefix;
  }

  void build() {
    if (pieces_.size() >= kNoSymbol / 2) throw Declined("it has too many pieces");
    to_.pieces_ = static_cast<Symbol>(pieces_.size());
    add_page();  // of all characters that stand in no piece
    to_.ranks_ = rank_scores(pieces_);
    to_.ids_are_ranks_ = fall_with_ids(pieces_);
    index_bytes();
    for (Symbol id = 0; id < to_.pieces_; ++id) is_spelled_.push_back(can_be_spelled(pieces_[id]));
    for (Symbol id = 0; id < to_.pieces_; ++id)
      if (is_spelled_[id]) add_piece(id);
    fill_merge_table();
    fill_pair_table();
    slot_of_character(' ') = to_.symbol_of(kSpaceMark);
    for (Byte byte = 0; byte < 128; ++byte)
      to_.ascii_ids_[byte] = to_.is_piece(to_.symbol_of(byte)) ? to_.symbol_of(byte) : kNoSymbol;
  }

 private:
  struct Character {
    Symbol symbol;
    uint32_t code_point;
    size_t start;
    uint64_t hash_before;  // of the text up to it

    uint32_t in_text() const { return code_point == kSpaceMark ? ' ' : code_point; }
  };

  void index_bytes() {
    std::array<bool, 256> found{};
    for (Symbol id = 0; id < to_.pieces_; ++id) {
      if (pieces_[id].type != PieceType::kByte) continue;
      const int byte = byte_of(pieces_[id].text);
      if (byte < 0) throw Declined("it has a byte piece that names no byte");
      to_.byte_ids_[byte] = id;
      found[byte] = true;
    }
    if (std::count(found.begin(), found.end(), true) != 256) throw Declined("it lacks byte pieces");
  }

  Symbol& slot_of_character(uint32_t code_point) {
    if (code_point < kBasic) return to_.basic_[code_point];
    uint16_t& page = to_.page_of_[code_point >> kPageBits];
    if (page == 0) {
      page = static_cast<uint16_t>(to_.pages_.size() >> kPageBits);
      add_page();
    }
    return to_.pages_[page << kPageBits | (code_point & kPageMask)];
  }

  void add_page() { to_.pages_.resize(to_.pages_.size() + (1 << kPageBits), kNoSymbol); }

  Symbol character(uint32_t code_point, std::string_view text) {
    Symbol& symbol = slot_of_character(code_point);
    if (symbol != kNoSymbol) return symbol;
    const Symbol piece = spelled(text, PieceIndex::hash_of(text));
    if (piece != kNoSymbol) return symbol = piece;
    to_.extra_characters_.push_back(code_point);
    symbol = to_.pieces_ + static_cast<Symbol>(to_.extra_characters_.size()) - 1;
    if (symbol >= kNoSymbol) throw Declined("it has too many characters");
    return symbol;
  }

  Symbol spelled(std::string_view text, uint64_t hash) const {
    const Symbol id = index_.find(text, hash);
    return id != PieceIndex::kAbsent && is_spelled_[id] ? id : kNoSymbol;
  }

  // All that follows from the piece's being there: its characters, which of them may be neighbours, and
  // the pairs that merge to it.
  void add_piece(Symbol id) {
    const std::string_view text = pieces_[id].text;
    read_characters(text);
    add_neighbours();
    const size_t n = characters_.size();
    const uint64_t whole = PieceIndex::hash_of(text);
    for (size_t i = 1; i < n; ++i) {
      const size_t cut = characters_[i].start;
      const uint64_t before = characters_[i].hash_before;
      const Symbol left = i == 1 ? characters_[0].symbol : spelled(text.substr(0, cut), before);
      if (left == kNoSymbol) continue;
      const uint64_t after = whole - before * power(text.size() - cut);
      const Symbol right = i == n - 1 ? characters_[n - 1].symbol : spelled(text.substr(cut), after);
      if (right != kNoSymbol) merges_.push_back(pair_key(left, right) << kMergedBits | id);
      if (right != kNoSymbol && n == 2) pairs_.push_back(merges_.back());
    }
  }

  void read_characters(std::string_view text) {
    characters_.clear();
    uint64_t hash = 0;
    for (size_t at = 0; at < text.size();) {
      const auto* bytes = reinterpret_cast<const Byte*>(text.data()) + at;
      const size_t size = character_size(*bytes);
      const uint32_t code_point = decode(bytes);
      characters_.push_back({character(code_point, text.substr(at, size)), code_point, at, hash});
      for (const size_t end = at + size; at < end; ++at) hash = PieceIndex::append(hash, text[at]);
    }
  }

  uint64_t power(size_t exponent) {
    while (powers_.size() <= exponent) powers_.push_back(powers_.back() * PieceIndex::kBase);
    return powers_[exponent];
  }

  // Which characters stand side by side in the piece.
  void add_neighbours() {
    for (size_t i = 1; i < characters_.size(); ++i) {
      const Character &left = characters_[i - 1], &right = characters_[i];
      to_.join_filter_.add(join_hash(left.symbol, right.symbol));
      const uint32_t l = left.in_text(), r = right.in_text();
      if ((l | r) >= 0x80) continue;
      if (characters_.size() == 2)
        for (uint32_t first = 0; first < 0x80; ++first) add_ascii_join(first, l, r, 2);
      else if (i > 1 && characters_[i - 2].in_text() < 0x80)
        add_ascii_join(characters_[i - 2].in_text(), l, r, 1);
    }
  }

  void add_ascii_join(uint32_t first, uint32_t second, uint32_t third, uint32_t bit) {
    const uint32_t three = first << 14 | second << 7 | third;
    to_.ascii_joins_[three >> 4] |= bit << (2 * (three & 15));
  }

  void fill_merge_table() {
    const size_t slots = power_of_two_from(2 * merges_.size() + 1);
    to_.merge_mask_ = slots - 1;
    to_.merges_.assign(slots, kEmptySlot);
    for (const uint64_t merge : merges_) {
      const uint64_t hash = hash_of(merge >> kMergedBits);
      to_.merge_filter_.add(hash);
      size_t slot = hash >> 24 & to_.merge_mask_;
      while (to_.merges_[slot] != kEmptySlot) slot = (slot + 1) & to_.merge_mask_;
      to_.merges_[slot] = merge;
    }
  }

  void fill_pair_table() {
    const size_t slots = power_of_two_from(2 * pairs_.size() + 1);
    to_.pair_mask_ = slots - 1;
    to_.pairs_.assign(slots, kEmptySlot);
    for (const uint64_t pair : pairs_) {
      const uint64_t key = pair >> kMergedBits;
      size_t slot = to_.pair_slot(static_cast<Symbol>(key >> kSymbolBits), key & kNoSymbol);
      while (to_.pairs_[slot] != kEmptySlot) slot = (slot + 1) & to_.pair_mask_;
      to_.pairs_[slot] = pair;
    }
  }

  Vocabulary& to_;
  const std::vector<Piece>& pieces_;
  PieceIndex index_;
  std::vector<bool> is_spelled_;
  std::vector<uint64_t> merges_, pairs_;
  std::vector<Character> characters_;
  std::vector<uint64_t> powers_{1};
};

Vocabulary::Vocabulary(const Model& model) { Builder(*this, model).build(); }

}  // namespace neo
