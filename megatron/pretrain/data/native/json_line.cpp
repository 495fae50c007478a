#include "json_line.h"

#include <cstring>
#include <string_view>
#include <utility>

#include "wide_utf8.h"

#ifdef __SSE2__  // which every x86-64 has
#include <emmintrin.h>
#endif

namespace neo {
namespace {

constexpr int kMostDepth = 64;
constexpr ptrdiff_t kMostDigits = 100;
constexpr uint64_t kOnes = 0x0101010101010101ull, kHighs = 0x8080808080808080ull;

int hex_digit(Byte byte) {
  if (byte >= '0' && byte <= '9') return byte - '0';
  const Byte lower = byte | 0x20;
  return lower >= 'a' && lower <= 'f' ? lower - 'a' + 10 : -1;
}

bool is_digit(Byte byte) { return byte >= '0' && byte <= '9'; }
// What ends a run of plain characters in a string. JSON allows no raw control character in one.
bool is_special(Byte byte) { return byte == '"' || byte == '\\' || byte < 0x20; }

// A high bit wherever a byte of the word is special, and perhaps in bytes above (in value) such a one:
// subtracting borrows only upwards, so that no bit at all means no special byte, and the lowest is right.
uint64_t special_bits(uint64_t word) {
  const uint64_t quote = word ^ kOnes * '"', backslash = word ^ kOnes * '\\';
  return ((quote - kOnes) & ~quote) | ((backslash - kOnes) & ~backslash) | ((word - kOnes * 0x20) & ~word);
}

#ifdef __SSE2__
// All ones wherever a byte is special.
__m128i special_bytes(__m128i bytes) {
  const __m128i quotes = _mm_cmpeq_epi8(bytes, _mm_set1_epi8('"'));
  const __m128i backslashes = _mm_cmpeq_epi8(bytes, _mm_set1_epi8('\\'));
  const __m128i controls = _mm_cmpeq_epi8(_mm_min_epu8(bytes, _mm_set1_epi8(0x1F)), bytes);
  return _mm_or_si128(_mm_or_si128(quotes, backslashes), controls);
}
#endif

// How many bytes of the word stand before its first special one; `found` are its special bits.
size_t plain_bytes(uint64_t found) { return static_cast<size_t>(__builtin_ctzll(found)) / 8; }

}  // namespace

JsonLine::JsonLine(std::vector<std::string> keys, std::string prefix)
    : keys_(std::move(keys)), prefix_(std::move(prefix)), texts_(keys_.size()), found_(keys_.size()) {}

size_t JsonLine::text_size(size_t key) const {
  const size_t size = texts_[key].size();
  return size ? size - prefix_.size() : 0;
}

bool JsonLine::read(const Byte* at, const Byte* end, const Byte*& next) {
  at_ = at;
  end_ = end;
  string_bits_ = 0;
  std::fill(found_.begin(), found_.end(), false);
  if (!read_object()) return false;
  skip_space();
  if (at_ < end_ && *at_ != '\n') return false;
  if (std::find(found_.begin(), found_.end(), false) != found_.end()) return false;
  // Outside of strings JSON is ASCII, so that the line is to be checked only if its strings are not.
  if ((string_bits_ & kHighs) && !is_utf8_fast(at, at_)) return false;
  next = at_ < end_ ? at_ + 1 : end_;
  return true;
}

bool JsonLine::read_object() {
  skip_space();
  if (!take('{')) return false;
  do {
    if (!read_member()) return false;
    skip_space();
  } while (take(','));
  return take('}');
}

bool JsonLine::read_member() {
  skip_space();
  const Byte* name = at_ + 1;
  if (!skip_string()) return false;
  const std::string_view key(reinterpret_cast<const char*>(name), static_cast<size_t>(at_ - 1 - name));
  if (key.find('\\') != key.npos) return false;
  skip_space();
  if (!take(':')) return false;
  skip_space();
  const auto wanted = std::find(keys_.begin(), keys_.end(), key);
  if (wanted == keys_.end()) return skip_value(kMostDepth);
  const auto number = static_cast<size_t>(wanted - keys_.begin());
  found_[number] = true;
  return read_text(texts_[number]);
}

bool JsonLine::read_text(Text& text) {
  if (!take('"')) return false;
  Byte* const start = text.start(prefix_.size() + static_cast<size_t>(end_ - at_));
  Byte* const begin = std::copy(prefix_.begin(), prefix_.end(), start);
  Byte* to = begin;
  for (;;) {
    to = copy_plain(to);
    if (at_ == end_) return false;
    if (take('"')) break;
    if (!take('\\') || !read_escape(to)) return false;
  }
  text.finish(to == begin ? start : to);  // an empty text has no prefix either
  return true;
}

// Whole words are copied: what is not yet to be copied will be overwritten.
Byte* JsonLine::copy_plain(Byte* to) {
#ifdef __SSE2__
  for (; end_ - at_ >= 16; at_ += 16, to += 16) {
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(at_));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), bytes);
    if (_mm_movemask_epi8(bytes)) string_bits_ |= kHighs;
    if (const auto found = static_cast<unsigned>(_mm_movemask_epi8(special_bytes(bytes)))) {
      const int count = __builtin_ctz(found);
      at_ += count;
      return to + count;
    }
  }
#endif
  for (; end_ - at_ >= 8; at_ += 8, to += 8) {
    const uint64_t word = load(at_);
    std::memcpy(to, &word, sizeof word);
    string_bits_ |= word;
    if (const uint64_t found = special_bits(word) & kHighs) {
      const size_t count = plain_bytes(found);
      at_ += count;
      return to + count;
    }
  }
  for (; at_ < end_ && !is_special(*at_); ++at_) {
    string_bits_ |= *at_ * kOnes;
    *to++ = *at_;
  }
  return to;
}

// Writes the character, up to 4 bytes, and moves `to` behind it.
bool JsonLine::read_escape(Byte*& to) {
  if (at_ == end_) return false;
  switch (*at_++) {
    case '"': *to++ = '"'; return true;
    case '\\': *to++ = '\\'; return true;
    case '/': *to++ = '/'; return true;
    case 'b': *to++ = '\b'; return true;
    case 'f': *to++ = '\f'; return true;
    case 'n': *to++ = '\n'; return true;
    case 'r': *to++ = '\r'; return true;
    case 't': *to++ = '\t'; return true;
    case 'u': break;
    default: return false;
  }
  uint32_t unit, low;
  if (!read_unit(unit)) return false;
  if (unit >= 0xD800 && unit < 0xE000) {
    if (unit >= 0xDC00 || !take('\\') || !take('u') || !read_unit(low)) return false;
    if (low < 0xDC00 || low >= 0xE000) return false;
    unit = 0x10000 + ((unit - 0xD800) << 10) + (low - 0xDC00);
  }
  to += encode(unit, to);
  return true;
}

bool JsonLine::read_unit(uint32_t& unit) {
  if (end_ - at_ < 4) return false;
  unit = 0;
  for (int i = 0; i < 4; ++i) {
    const int digit = hex_digit(*at_++);
    if (digit < 0) return false;
    unit = unit << 4 | static_cast<uint32_t>(digit);
  }
  return true;
}

// Escapes of a string that is not read are checked all the same: a bad one makes the line no JSON.
bool JsonLine::skip_string() {
  if (!take('"')) return false;
  for (;;) {
    Byte ignored[4], *to = ignored;
    at_ = find_special();
    if (at_ == end_) return false;
    if (take('"')) return true;
    if (!take('\\') || !read_escape(to)) return false;
  }
}

bool JsonLine::skip_value(int depth) {
  if (at_ == end_ || depth == 0) return false;
  switch (*at_) {
    case '"': return skip_string();
    case '{': return skip_container('}', depth - 1);
    case '[': return skip_container(']', depth - 1);
    case 't': return skip_word("true");
    case 'f': return skip_word("false");
    case 'n': return skip_word("null");
    default: return skip_number();
  }
}

bool JsonLine::skip_container(Byte close, int depth) {
  ++at_;
  skip_space();
  if (take(close)) return true;
  do {
    skip_space();
    if (close == '}') {
      if (!skip_string()) return false;
      skip_space();
      if (!take(':')) return false;
      skip_space();
    }
    if (!skip_value(depth)) return false;
    skip_space();
  } while (take(','));
  return take(close);
}

bool JsonLine::skip_number() {
  const Byte* start = at_;
  take('-');
  if (!take('0') && !skip_digits()) return false;
  if (take('.') && !skip_digits()) return false;
  if (at_ < end_ && (*at_ == 'e' || *at_ == 'E')) {
    ++at_;
    if (!take('+')) take('-');
    if (!skip_digits()) return false;
  }
  return at_ - start <= kMostDigits;
}

bool JsonLine::skip_digits() {
  const Byte* start = at_;
  while (at_ < end_ && is_digit(*at_)) ++at_;
  return at_ > start;
}

bool JsonLine::skip_word(const char* word) {
  const size_t size = std::strlen(word);
  if (static_cast<size_t>(end_ - at_) < size || std::memcmp(at_, word, size) != 0) return false;
  at_ += size;
  return true;
}

const Byte* JsonLine::find_special() {
  const Byte* at = at_;
  for (; end_ - at >= 8; at += 8) {
    const uint64_t word = load(at);
    string_bits_ |= word;
    if (const uint64_t found = special_bits(word) & kHighs) return at + plain_bytes(found);
  }
  for (; at < end_ && !is_special(*at); ++at) string_bits_ |= *at * kOnes;
  return at;
}

void JsonLine::skip_space() {
  while (at_ < end_ && (*at_ == ' ' || *at_ == '\t' || *at_ == '\r')) ++at_;
}

bool JsonLine::take(Byte byte) {
  if (at_ == end_ || *at_ != byte) return false;
  ++at_;
  return true;
}

}  // namespace neo
