// UTF-8: one character at a time, and whether bytes are UTF-8 at all.
#pragma once

#include <cstddef>
#include <cstdint>

namespace neo {

using Byte = uint8_t;

// The bytes of the character that begins with `lead`, in valid UTF-8.
inline size_t character_size(Byte lead) {
  if (lead < 0x80) return 1;
  if (lead < 0xE0) return 2;
  return lead < 0xF0 ? 3 : 4;
}

struct Character {
  uint32_t code_point;
  size_t size;
};

// The character at `at`, in valid UTF-8.
inline Character read_character(const Byte* at) {
  const Byte lead = at[0];
  if (lead < 0x80) return {lead, 1};
  if (lead < 0xE0) return {(lead & 0x1Fu) << 6 | (at[1] & 0x3Fu), 2};
  if (lead < 0xF0) return {(lead & 0x0Fu) << 12 | (at[1] & 0x3Fu) << 6 | (at[2] & 0x3Fu), 3};
  return {(lead & 0x07u) << 18 | (at[1] & 0x3Fu) << 12 | (at[2] & 0x3Fu) << 6 | (at[3] & 0x3Fu), 4};
}

inline uint32_t decode(const Byte* at) { return read_character(at).code_point; }

// Writes the UTF-8 of `code_point` (up to 4 bytes) and returns how many bytes it has.
inline size_t encode(uint32_t code_point, Byte* to) {
  const auto tail = [code_point](int shift) {
    return static_cast<Byte>(0x80 | (code_point >> shift & 0x3F));
  };
  if (code_point < 0x80) {
    to[0] = static_cast<Byte>(code_point);
    return 1;
  }
  if (code_point < 0x800) {
    to[0] = static_cast<Byte>(0xC0 | code_point >> 6);
    to[1] = tail(0);
    return 2;
  }
  if (code_point < 0x10000) {
    to[0] = static_cast<Byte>(0xE0 | code_point >> 12);
    to[1] = tail(6);
    to[2] = tail(0);
    return 3;
  }
  to[0] = static_cast<Byte>(0xF0 | code_point >> 18);
  to[1] = tail(12);
  to[2] = tail(6);
  to[3] = tail(0);
  return 4;
}

// Whether [at, end) is UTF-8 as Python's strict decoder takes it: no overlong form (0xC0, 0xC1, and a
// second byte too small after 0xE0 and 0xF0), no surrogate (0xED 0xA0..0xBF), nothing past U+10FFFF.
inline bool is_utf8(const Byte* at, const Byte* end) {
  const auto is_tail = [](Byte byte) { return (byte & 0xC0) == 0x80; };
  while (at < end) {
    const Byte lead = *at;
    if (lead < 0x80) {
      ++at;
      continue;
    }
    if (lead > 0xE0 && lead < 0xED && end - at >= 3) {  // most of Asia's characters
      if (!(is_tail(at[1]) & is_tail(at[2]))) return false;
      at += 3;
      continue;
    }
    if (lead < 0xC2 || lead > 0xF4) return false;
    const size_t size = character_size(lead);
    if (static_cast<size_t>(end - at) < size) return false;
    for (size_t i = 1; i < size; ++i)
      if (!is_tail(at[i])) return false;
    const Byte second = at[1];
    if ((lead == 0xE0 && second < 0xA0) || (lead == 0xED && second > 0x9F) ||
        (lead == 0xF0 && second < 0x90) || (lead == 0xF4 && second > 0x8F))
      return false;
    at += size;
  }
  return true;
}

}  // namespace neo
