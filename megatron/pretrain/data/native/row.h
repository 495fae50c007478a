// The characters of a block of text that is not all ASCII, and which of them may be joined.
#pragma once

#include "unit_key.h"
#include "vocabulary.h"
#include "wide.h"

namespace neo {

// Character 0 is the one that begins before the block, if there is one; those that begin in it follow. Where
// there is room for them all, the characters of one or two more blocks are in the same row.
struct Row {
  static constexpr size_t kBytes = 64;
  static constexpr size_t kMostBytes = 3 * kBytes;
  // Characters are read eight at once: so many are written past the last.
  static constexpr size_t kAhead = 8;

  // Whether character k, from 1 on, may be in one unit with the one before it.
  bool joins(size_t k) const { return joined >> (k - 1) & 1; }
  const Byte* start(size_t k) const { return block + starts[k]; }

  const Byte* block;
  size_t size;              // of the blocks
  size_t count;             // of characters that begin in them
  uint64_t joined, pieces;  // bit k - 1: see `joins`; whether character k is a piece
  int16_t starts[1 + kBytes + kAhead];
  Symbol symbols[1 + kBytes + kAhead];
};

// Where the block begins inside a character, that one is character 0: its boundary, if any, was marked in
// the block where it begins.
inline void read_before(const Vocabulary& vocabulary, bool begins_text, Row& row) {
  row.starts[0] = 0;
  row.symbols[0] = kNoSymbol;
  if (begins_text) return;
  do --row.starts[0];
  while ((*row.start(0) & 0xC0) == 0x80);
  row.symbols[0] = vocabulary.symbol_of(decode(row.start(0)));
}

// The row is `size` bytes; character 0 is there already.
inline void read_plain_row(const Vocabulary& vocabulary, size_t size, Row& row) {
  row.count = 0;
  row.joined = row.pieces = 0;
  for (size_t i = 0; i < size; ++i) {
    if ((row.block[i] & 0xC0) == 0x80) continue;
    const Symbol before = row.symbols[row.count];
    const Symbol symbol = vocabulary.symbol_of(decode(row.block + i));
    const bool joins = (before != kNoSymbol) & (symbol != kNoSymbol) & vocabulary.may_join(before, symbol);
    row.joined |= static_cast<uint64_t>(joins) << row.count;
    row.pieces |= static_cast<uint64_t>(vocabulary.is_piece(symbol)) << row.count;
    row.starts[++row.count] = static_cast<int16_t>(i);
    row.symbols[row.count] = symbol;
  }
  std::fill_n(row.symbols + row.count + 1, Row::kAhead, kNoSymbol);
}

#ifdef NEO_HAS_WIDE
// Bit i: a character begins at at[i].
NEO_WIDE inline uint64_t first_bytes(const Byte* at) {
  const __m256i last_tail = _mm256_set1_epi8(static_cast<char>(0xBF));  // as signed, tails are the least
  const auto firsts_of = [&](const Byte* from) NEO_WIDE {
    const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
    return static_cast<uint32_t>(_mm256_movemask_epi8(_mm256_cmpgt_epi8(bytes, last_tail)));
  };
  return firsts_of(at) | static_cast<uint64_t>(firsts_of(at + 32)) << 32;
}

// The characters of up to three bytes that begin at these offsets; of others something below 65,536.
NEO_WIDE inline __m256i decode_eight(const Byte* block, __m256i starts) {
  const __m256i raw = _mm256_i32gather_epi32(reinterpret_cast<const int*>(block), starts, 1);
  const __m256i first_three = _mm256_setr_epi8(2, 1, 0, -1, 6, 5, 4, -1, 10, 9, 8, -1, 14, 13, 12, -1,
                                               2, 1, 0, -1, 6, 5, 4, -1, 10, 9, 8, -1, 14, 13, 12, -1);
  const __m256i bytes = _mm256_shuffle_epi8(raw, first_three);  // the lead on top
  const auto bits = [&](int shift, int mask) NEO_WIDE {
    return _mm256_and_si256(_mm256_srli_epi32(bytes, shift), _mm256_set1_epi32(mask));
  };
  // A lead has four bits of three bytes' characters and five of two bytes'; its bit 4 is 0 in the former.
  const __m256i three = _mm256_or_si256(_mm256_or_si256(bits(4, 0x1F000), bits(2, 0xFC0)), bits(0, 0x3F));
  const __m256i is_short = _mm256_cmpgt_epi32(_mm256_set1_epi32(0xE00000), bytes);
  const __m256i more = _mm256_blendv_epi8(three, _mm256_srli_epi32(three, 6), is_short);
  const __m256i is_ascii = _mm256_cmpgt_epi32(_mm256_set1_epi32(0x800000), bytes);
  return _mm256_and_si256(_mm256_blendv_epi8(more, _mm256_srli_epi32(bytes, 16), is_ascii),
                          _mm256_set1_epi32(0xFFFF));
}

// Of eight neighbours: on top of each word, whether they may be joined.
NEO_WIDE inline __m256i join_eight(const Vocabulary& vocabulary, __m256i left, __m256i right) {
  const auto times = [&](__m256i symbols, uint32_t factor) NEO_WIDE {
    return _mm256_mullo_epi32(symbols, _mm256_set1_epi32(static_cast<int>(factor)));
  };
  const __m256i hash = _mm256_add_epi32(times(left, Vocabulary::kLeftFactor),
                                        times(right, Vocabulary::kRightFactor));
  const int* filter = reinterpret_cast<const int*>(vocabulary.join_filter().words());
  const __m256i words =
      _mm256_i32gather_epi32(filter, _mm256_srli_epi32(hash, JoinFilter::kWordShift), 4);
  const __m256i place =
      _mm256_and_si256(_mm256_srli_epi32(hash, JoinFilter::kBitShift), _mm256_set1_epi32(31));
  const __m256i none = _mm256_set1_epi32(kNoSymbol);
  const __m256i lacks = _mm256_or_si256(_mm256_cmpeq_epi32(left, none), _mm256_cmpeq_epi32(right, none));
  return _mm256_andnot_si256(lacks, _mm256_sllv_epi32(words, place));
}

NEO_WIDE inline uint64_t top_bits(__m256i words) {
  return static_cast<uint64_t>(_mm256_movemask_ps(_mm256_castsi256_ps(words)));
}

// Adds the characters that begin at these bits of `at`, which is one of the row's blocks. Eight are read at
// once; where fewer are left, the others are read from behind the block, and what they give is masked out.
NEO_WIDE inline void add_wide(const Vocabulary& vocabulary, const Byte* at, uint64_t firsts, Row& row) {
  const auto count = static_cast<size_t>(__builtin_popcountll(firsts));
  uint64_t joined = 0, is_piece = 0;
  const __m256i pieces = _mm256_set1_epi32(static_cast<int>(vocabulary.pieces()));
  const __m256i turned = _mm256_setr_epi32(7, 0, 1, 2, 3, 4, 5, 6);
  const __m128i block = _mm_set1_epi16(static_cast<short>(at - row.block));
  __m256i before = _mm256_set1_epi32(static_cast<int>(row.symbols[row.count]));
  for (size_t k = 0; k < count; k += 8) {
    uint64_t places = 0;
    for (int i = 0; i < 64; i += 8, firsts = _blsr_u64(firsts)) places |= _tzcnt_u64(firsts) << i;
    const __m128i eight = _mm_cvtsi64_si128(static_cast<long long>(places));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(row.starts + row.count + 1 + k),
                     _mm_add_epi16(_mm_cvtepu8_epi16(eight), block));
    const __m256i characters = decode_eight(at, _mm256_cvtepu8_epi32(eight));
    const __m256i symbols =
        _mm256_i32gather_epi32(reinterpret_cast<const int*>(vocabulary.symbols()), characters, 4);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(row.symbols + row.count + 1 + k), symbols);
    const __m256i moved = _mm256_permutevar8x32_epi32(symbols, turned);
    joined |= top_bits(join_eight(vocabulary, _mm256_blend_epi32(moved, before, 1), symbols)) << k;
    is_piece |= top_bits(_mm256_cmpgt_epi32(pieces, symbols)) << k;
    before = moved;
  }
  const uint64_t there = count ? ~0ull >> (64 - count) : 0;
  row.joined |= (joined & there) << row.count;
  row.pieces |= (is_piece & there) << row.count;
  row.count += count;
}

NEO_WIDE inline bool has_long_characters(const Byte* block) {
  const auto is_long = [&](const Byte* from) NEO_WIDE {
    const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
    return _mm256_cmpeq_epi8(_mm256_max_epu8(bytes, _mm256_set1_epi8(static_cast<char>(0xF0))), bytes);
  };
  return _mm256_movemask_epi8(_mm256_or_si256(is_long(block), is_long(block + 32)));
}

// As read_plain_row, of up to three blocks without characters of four bytes.
NEO_WIDE inline void read_wide_row(const Vocabulary& vocabulary, size_t size, Row& row) {
  row.size = 0;
  row.count = 0;
  row.joined = row.pieces = 0;
  do {
    const Byte* const at = row.block + row.size;
    const size_t block_size = std::min(size - row.size, Row::kBytes);
    const uint64_t firsts = first_bytes(at) & ~0ull >> (Row::kBytes - block_size);
    // A row of less than 64 has a bit for each in RowUnits.
    if (row.size && (row.count + static_cast<size_t>(__builtin_popcountll(firsts)) >= Row::kBytes ||
                     has_long_characters(at)))
      return;
    add_wide(vocabulary, at, firsts, row);
    row.size += block_size;
  } while (row.size < std::min(size, Row::kMostBytes));
}
#endif

// The row's first block begins at `at`, where `size` bytes of the text are left; `kReadAhead` bytes after
// these must be readable.
inline void read_row(const Vocabulary& vocabulary, const Byte* at, size_t size, bool begins_text, Row& row) {
  row.block = at;
  read_before(vocabulary, begins_text, row);
#ifdef NEO_HAS_WIDE
  if (kHasWide && !has_long_characters(at)) return read_wide_row(vocabulary, size, row);
#endif
  row.size = std::min(size, Row::kBytes);
  read_plain_row(vocabulary, row.size, row);
}

}  // namespace neo
