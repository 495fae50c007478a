// Whether bytes are UTF-8, 32 at once.
#pragma once

#include <algorithm>
#include <cstring>

#include "utf8.h"
#include "wide.h"

namespace neo {

#ifdef NEO_HAS_WIDE
// What is wrong with UTF-8 shows in two neighbours, or in a third or fourth byte that is missing or one too
// many. Each error that two neighbours show has a bit, and is there if the upper half of the first byte, its
// lower half and the upper half of the second all allow it: three look-ups, and-ed (Keiser and Lemire,
// "Validating UTF-8 in less than one instruction per byte", 2021).
struct Utf8Errors {
  enum : Byte {
    kShort = 1,       // a lead, and no tail after it
    kLong = 2,        // ASCII, and a tail after it
    kOverlong3 = 4,   // 0xE0 and 0x80..0x9F
    kLarge = 8,       // 0xF4 and 0x90..0xBF, or more than 0xF4 and those
    kSurrogate = 16,  // 0xED and 0xA0..0xBF
    kOverlong2 = 32,  // 0xC0 or 0xC1
    kOverlong4 = 64,  // 0xF0 and 0x80..0x8F,
    kLarge8 = 64,     // or more than 0xF4 and those
    kTwoTails = 128,  // no error where a lead of three or four bytes stands before them
    kAnyLow = kShort | kLong | kTwoTails,
    kAnyTail = kLong | kOverlong2 | kTwoTails,
    kLarges = kAnyLow | kLarge | kLarge8,
  };
  alignas(16) static constexpr Byte kFirstHigh[16] = {
      kLong, kLong, kLong, kLong, kLong, kLong, kLong, kLong, kTwoTails, kTwoTails, kTwoTails, kTwoTails,
      kShort | kOverlong2, kShort, kShort | kOverlong3 | kSurrogate, kShort | kLarge | kLarge8 | kOverlong4};
  alignas(16) static constexpr Byte kFirstLow[16] = {
      kAnyLow | kOverlong3 | kOverlong2 | kOverlong4, kAnyLow | kOverlong2, kAnyLow, kAnyLow,
      kAnyLow | kLarge, kLarges, kLarges, kLarges, kLarges, kLarges, kLarges, kLarges, kLarges,
      kLarges | kSurrogate, kLarges, kLarges};
  alignas(16) static constexpr Byte kSecondHigh[16] = {
      kShort, kShort, kShort, kShort, kShort, kShort, kShort, kShort,
      kAnyTail | kOverlong3 | kLarge8 | kOverlong4, kAnyTail | kOverlong3 | kLarge,
      kAnyTail | kSurrogate | kLarge, kAnyTail | kSurrogate | kLarge, kShort, kShort, kShort, kShort};
};

NEO_WIDE inline __m256i load_wide(const Byte* at) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(at));
}

NEO_WIDE inline __m256i look_up(const Byte* table, __m256i halves) {
  const __m128i sixteen = _mm_load_si128(reinterpret_cast<const __m128i*>(table));
  return _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(sixteen), halves);
}

// Not zero where one of at[0] to at[31] is wrong after those before it; at[-3] and on are read.
NEO_WIDE inline __m256i utf8_errors(const Byte* at) {
  const __m256i half = _mm256_set1_epi8(0x0F);
  const __m256i bytes = load_wide(at), before = load_wide(at - 1);
  const __m256i shown = _mm256_and_si256(
      _mm256_and_si256(
          look_up(Utf8Errors::kFirstHigh, _mm256_and_si256(_mm256_srli_epi16(before, 4), half)),
          look_up(Utf8Errors::kFirstLow, _mm256_and_si256(before, half))),
      look_up(Utf8Errors::kSecondHigh, _mm256_and_si256(_mm256_srli_epi16(bytes, 4), half)));
  // The upper bit: a third byte of three or four, or the fourth of four, must be the second of two tails.
  const __m256i third = _mm256_subs_epu8(load_wide(at - 2), _mm256_set1_epi8(0xE0 - 0x80));
  const __m256i fourth = _mm256_subs_epu8(load_wide(at - 3), _mm256_set1_epi8(0xF0 - 0x80));
  const __m256i upper = _mm256_set1_epi8(static_cast<char>(0x80));
  return _mm256_xor_si256(_mm256_and_si256(_mm256_or_si256(third, fourth), upper), shown);
}

NEO_WIDE inline bool is_wide_utf8(const Byte* at, const Byte* end) {
  // The first bytes have zeros before them, and the last, which may be none, zeros after them: those show a
  // character that is cut off.
  Byte first[3 + 32] = {}, last[3 + 32] = {};
  const auto size = static_cast<size_t>(end - at);
  std::memcpy(first + 3, at, std::min<size_t>(size, 32));
  __m256i errors = utf8_errors(first + 3);
  if (size >= 32) {
    const Byte* from = at + 32;
    for (; end - from >= 32; from += 32) errors = _mm256_or_si256(errors, utf8_errors(from));
    std::memcpy(last, from - 3, static_cast<size_t>(end - from) + 3);
    errors = _mm256_or_si256(errors, utf8_errors(last + 3));
  }
  return _mm256_testz_si256(errors, errors);
}
#endif

inline bool is_utf8_fast(const Byte* at, const Byte* end) {
#ifdef NEO_HAS_WIDE
  // Shorter ones are not worth it.
  if (kHasWide && end - at >= 32) return is_wide_utf8(at, end);
#endif
  return is_utf8(at, end);
}

}  // namespace neo
