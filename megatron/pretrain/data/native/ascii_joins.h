// Which neighbours in a block of ASCII text stand side by side in pieces.
#pragma once

#include "vocabulary.h"
#include "wide.h"

namespace neo {

// Bit i is about the i-th character of a block. pairs: with the one before it is a piece. triples: with the
// two before it stands in some piece.
struct AsciiJoins {
  uint64_t pairs = 0, triples = 0;
};

// `at[-2]` to `at[size - 1]` are ASCII. Without a branch on the data: what text comes next is what a
// processor guesses worst.
inline AsciiJoins plain_ascii_joins(const Vocabulary& vocabulary, const Byte* at, size_t size) {
  AsciiJoins joins;
  uint32_t last = at[-2] << 7 | at[-1];
  for (size_t i = 0; i < size; ++i) {
    last = (last << 7 | at[i]) & 0x1FFFFF;
    const uint64_t found = vocabulary.ascii_joins(last);
    joins.pairs |= (found >> 1) << i;
    joins.triples |= (found & 1) << i;
  }
  return joins;
}

#ifdef NEO_HAS_WIDE
NEO_WIDE inline __m256i eight_bytes(const Byte* at) {
  return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(at)));
}

// The same of 64 characters, eight at once.
NEO_WIDE inline AsciiJoins wide_ascii_joins(const Vocabulary& vocabulary, const Byte* at) {
  const int* table = reinterpret_cast<const int*>(vocabulary.ascii_joins_table());
  AsciiJoins joins;
  for (int i = 0; i < 64; i += 8) {
    const __m256i two = _mm256_or_si256(_mm256_slli_epi32(eight_bytes(at + i - 2), 14),
                                        _mm256_slli_epi32(eight_bytes(at + i - 1), 7));
    const __m256i three = _mm256_or_si256(two, eight_bytes(at + i));
    // A word holds sixteen entries of two bits; the one that is asked for is brought to the word's top.
    const __m256i words = _mm256_i32gather_epi32(table, _mm256_srli_epi32(three, 4), 4);
    const __m256i place = _mm256_and_si256(_mm256_slli_epi32(three, 1), _mm256_set1_epi32(30));
    const __m256i pairs = _mm256_sllv_epi32(words, _mm256_sub_epi32(_mm256_set1_epi32(30), place));
    const __m256i triples = _mm256_slli_epi32(pairs, 1);
    joins.pairs |= static_cast<uint64_t>(_mm256_movemask_ps(_mm256_castsi256_ps(pairs))) << i;
    joins.triples |= static_cast<uint64_t>(_mm256_movemask_ps(_mm256_castsi256_ps(triples))) << i;
  }
  return joins;
}
#endif

// `at[-2]` to `at[63]` are ASCII and may be read; bits from `size` on have no meaning.
inline AsciiJoins ascii_joins(const Vocabulary& vocabulary, const Byte* at, size_t size) {
#ifdef NEO_HAS_WIDE
  if (kHasWide) return wide_ascii_joins(vocabulary, at);
#endif
  return plain_ascii_joins(vocabulary, at, size);
}

}  // namespace neo
