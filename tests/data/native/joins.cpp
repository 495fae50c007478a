// Whether what is found out about 64 characters at once is what is found out one by one:  joins MODEL
// Ends with 1 where it is not, and with 3 where this processor cannot do the first.

#include <cstdio>
#include <fstream>
#include <iterator>
#include <random>
#include <string>

#include "ascii_joins.h"

int main(int, char** arguments) {
#ifdef NEO_HAS_WIDE_JOINS
  if (!neo::kHasAvx2) return 3;
  std::ifstream file(arguments[1], std::ios::binary);
  const std::string bytes(std::istreambuf_iterator<char>(file), {});
  const neo::Model model = neo::read_model(bytes);
  const neo::Vocabulary vocabulary(model);
  std::mt19937 draw(1);
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
