// Whether what wide registers find out at once is what is found out one by one:  joins MODEL
// Ends with 1 where it is not, and with 3 where this processor cannot do the first.

#include <algorithm>
#include <cstdio>
#include <fstream>
#include <iterator>
#include <random>
#include <string>

#include "ascii_joins.h"
#include "row.h"
#include "wide_utf8.h"

#ifdef NEO_HAS_WIDE
namespace {

// Characters of one length, so that rows are of one block and of three, or of all lengths.
std::string draw_text(std::mt19937& draw, size_t size, bool is_mixed) {
  static constexpr uint32_t kLimits[] = {0x80, 0x800, 0x10000, 0x110000};
  std::string text;
  const uint32_t limit = kLimits[draw() % 4];
  while (text.size() < size) {
    uint32_t character = draw() % (is_mixed ? kLimits[draw() % 4] : limit);
    if (draw() % 4) character = 0x4E00 + draw() % 0x100;  // often seen side by side
    if (character >= 0xD800 && character < 0xE000) continue;
    neo::Byte bytes[4];
    text.append(reinterpret_cast<const char*>(bytes), neo::encode(character, bytes));
  }
  return text;
}

bool has_same_rows(const neo::Vocabulary& vocabulary, std::mt19937& draw) {
  std::string text = draw_text(draw, 1 + draw() % 300, draw() % 2);
  const size_t size = text.size();
  text.append(neo::kReadAhead, '\xFF');
  const auto* at = reinterpret_cast<const neo::Byte*>(text.data());
  for (size_t block = 0; block < size;) {
    neo::Row wide, plain;
    neo::read_row(vocabulary, at + block, size - block, block == 0, wide);
    plain.block = wide.block;
    neo::read_before(vocabulary, block == 0, plain);
    neo::read_plain_row(vocabulary, wide.size, plain);
    if (wide.count != plain.count || wide.joined != plain.joined || wide.pieces != plain.pieces) return false;
    if (!std::equal(plain.starts, plain.starts + plain.count + 1, wide.starts)) return false;
    if (!std::equal(plain.symbols, plain.symbols + plain.count + 1, wide.symbols)) return false;
    block += wide.size;
  }
  return true;
}

// Good text, and the same with a byte changed or its end cut off.
bool is_same_utf8(std::mt19937& draw) {
  std::string text = draw_text(draw, 32 + draw() % 100, draw() % 2);
  if (draw() % 2) text[draw() % text.size()] = static_cast<char>(draw());
  if (draw() % 2) text.resize(std::max<size_t>(32, text.size() - draw() % 4));
  const auto* at = reinterpret_cast<const neo::Byte*>(text.data());
  return neo::is_wide_utf8(at, at + text.size()) == neo::is_utf8(at, at + text.size());
}

}  // namespace
#endif

int main(int, char** arguments) {
#ifdef NEO_HAS_WIDE
  if (!neo::kHasWide) return 3;
  std::ifstream file(arguments[1], std::ios::binary);
  const std::string bytes(std::istreambuf_iterator<char>(file), {});
  const neo::Model model = neo::read_model(bytes);
  const neo::Vocabulary vocabulary(model);
  std::mt19937 draw(1);
  for (int round = 0; round < 100000; ++round)
    if (!has_same_rows(vocabulary, draw) || !is_same_utf8(draw)) return 1;
  uint64_t found = 0;
  for (int round = 0; round < 100000; ++round) {
    neo::Byte text[66];
    // Letters alone, where pieces are, and everything.
    for (neo::Byte& byte : text) byte = static_cast<neo::Byte>(round % 2 ? 'a' + draw() % 26 : draw() % 128);
    const neo::AsciiJoins wide = neo::wide_ascii_joins(vocabulary, text + 2);
    const neo::AsciiJoins plain = neo::plain_ascii_joins(vocabulary, text + 2, 64);
    if (wide.pairs != plain.pairs || wide.triples != plain.triples) return 1;
    found |= plain.pairs & plain.triples;
  }
  return found ? 0 : 1;
#else
  return 3;
#endif
}
