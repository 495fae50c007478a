#include "vocabulary.h"

#include <algorithm>
#include <cstdlib>
#include <functional>
#include <string>
#include <unordered_map>

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

// A rank for each piece: the scores in falling order, equal scores one rank.
std::vector<int32_t> rank_scores(const std::vector<Piece>& pieces) {
  std::vector<float> scores;
  for (const Piece& piece : pieces) scores.push_back(piece.score);
  std::sort(scores.begin(), scores.end(), std::greater<float>());
  scores.erase(std::unique(scores.begin(), scores.end()), scores.end());
  std::vector<int32_t> ranks;
  for (const Piece& piece : pieces) {
    const auto place = std::lower_bound(scores.begin(), scores.end(), piece.score, std::greater<float>());
    ranks.push_back(static_cast<int32_t>(place - scores.begin()));
  }
  return ranks;
}

size_t power_of_two_from(size_t size) {
  size_t power = 1;
  while (power < size) power *= 2;
  return power;
}

}  // namespace

class Vocabulary::Builder {
 public:
  Builder(Vocabulary& to, const Model& model) : to_(to), model_(model) {}

  void build() {
    to_.add_dummy_prefix_ = model_.add_dummy_prefix;
    to_.pieces_ = static_cast<Symbol>(model_.pieces.size());
    to_.join_filter_.assign(kFilterWords, 0);
    to_.merge_filter_.assign(kFilterWords, 0);
    to_.characters_.emplace_back().fill(kNoSymbol);  // the page of all characters that stand in no piece
    index_bytes();
    index_texts();
    const std::vector<int32_t> ranks = rank_scores(model_.pieces);
    for (Symbol id = 0; id < to_.pieces_; ++id)
      if (can_be_spelled(model_.pieces[id])) add_piece(model_.pieces[id].text, Merge{ranks[id], id});
    fill_merge_table();
    slot_of_character(' ') = to_.symbol_of(kSpaceMark);
    fill_ascii_joins();
  }

 private:
  void index_bytes() {
    std::array<bool, 256> found{};
    for (Symbol id = 0; id < to_.pieces_; ++id) {
      if (model_.pieces[id].type != PieceType::kByte) continue;
      const int byte = byte_of(model_.pieces[id].text);
      if (byte < 0) throw Declined("it has a byte piece that names no byte");
      to_.byte_ids_[byte] = id;
      found[byte] = true;
    }
    if (std::count(found.begin(), found.end(), true) != 256) throw Declined("it lacks byte pieces");
  }

  void index_texts() {
    symbol_of_text_.reserve(model_.pieces.size());
    for (Symbol id = 0; id < to_.pieces_; ++id)
      if (can_be_spelled(model_.pieces[id])) symbol_of_text_.emplace(model_.pieces[id].text, id);
  }

  Symbol& slot_of_character(uint32_t code_point) {
    uint16_t& page = to_.page_of_[code_point >> kPageBits];
    if (page == 0) {
      page = static_cast<uint16_t>(to_.characters_.size());
      to_.characters_.emplace_back().fill(kNoSymbol);
    }
    return to_.characters_[page][code_point & kPageMask];
  }

  Symbol character(uint32_t code_point, std::string_view text) {
    Symbol& symbol = slot_of_character(code_point);
    if (symbol != kNoSymbol) return symbol;
    const auto piece = symbol_of_text_.find(text);
    if (piece != symbol_of_text_.end()) return symbol = piece->second;
    to_.extra_characters_.push_back(code_point);
    return symbol = to_.pieces_ + static_cast<Symbol>(to_.extra_characters_.size()) - 1;
  }

  // All that follows from the piece's being there: its characters, which of them may be neighbours, and
  // the pairs that merge to it.
  void add_piece(std::string_view text, Merge merge) {
    characters_.clear();
    starts_.clear();
    for (size_t at = 0; at < text.size();) {
      const auto* bytes = reinterpret_cast<const Byte*>(text.data()) + at;
      const size_t size = character_size(*bytes);
      characters_.push_back(character(decode(bytes), text.substr(at, size)));
      starts_.push_back(at);
      at += size;
    }
    const size_t n = characters_.size();
    for (size_t i = 1; i < n; ++i) {
      add_join(characters_[i - 1], characters_[i]);
      const Symbol left = i == 1 ? characters_[0] : symbol_of(text.substr(0, starts_[i]));
      if (left == kNoSymbol) continue;
      const Symbol right = i == n - 1 ? characters_[n - 1] : symbol_of(text.substr(starts_[i]));
      if (right != kNoSymbol) merges_.push_back({pair_key(left, right), merge});
    }
  }

  Symbol symbol_of(std::string_view text) const {
    const auto found = symbol_of_text_.find(text);
    return found == symbol_of_text_.end() ? kNoSymbol : found->second;
  }

  void add_join(Symbol left, Symbol right) {
    const uint64_t hash = hash_of(pair_key(left, right));
    to_.join_filter_[hash >> 6 & kFilterMask] |= 1ull << (hash & 63);
    exact_joins_.push_back({left, right});
  }

  void fill_merge_table() {
    const size_t slots = power_of_two_from(2 * merges_.size() + 1);
    to_.merge_mask_ = slots - 1;
    to_.merges_.assign(slots, MergeSlot{});
    for (const MergeSlot& merge : merges_) {
      const uint64_t hash = hash_of(merge.key);
      to_.merge_filter_[hash >> 6 & kFilterMask] |= 1ull << (hash & 63);
      size_t slot = hash >> 24 & to_.merge_mask_;
      while (to_.merges_[slot].key != kNoKey) slot = (slot + 1) & to_.merge_mask_;
      to_.merges_[slot] = merge;
    }
  }

  void fill_ascii_joins() {
    std::unordered_map<Symbol, Byte> ascii;
    for (Byte byte = 0; byte < 128; ++byte)
      if (to_.symbol_of(byte) != kNoSymbol) ascii.emplace(to_.symbol_of(byte), byte);
    for (const auto& [left, right] : exact_joins_) {
      const auto l = ascii.find(left), r = ascii.find(right);
      if (l == ascii.end() || r == ascii.end()) continue;
      to_.ascii_joins_[l->second][r->second >> 6] |= 1ull << (r->second & 63);
    }
  }

  Vocabulary& to_;
  const Model& model_;
  std::unordered_map<std::string_view, Symbol> symbol_of_text_;
  std::vector<MergeSlot> merges_;
  std::vector<std::pair<Symbol, Symbol>> exact_joins_;
  std::vector<Symbol> characters_;
  std::vector<size_t> starts_;
};

Vocabulary::Vocabulary(const Model& model) { Builder(*this, model).build(); }

}  // namespace neo
