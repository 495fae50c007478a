// The texts of one JSON line, read where the bytes lie.
#pragma once

#include <algorithm>
#include <string>
#include <vector>

#include "buffer.h"
#include "unit_key.h"
#include "utf8.h"

namespace neo {

// A text as `TextEncoder` wants it: perhaps a space before it, and bytes that may be read after it.
class Text {
 public:
  void clear() { bytes_.clear(); }
  void push_back(Byte byte) { append(&byte, &byte + 1); }
  void append(const Byte* begin, const Byte* end) {
    Byte* to = bytes_.room_for(static_cast<size_t>(end - begin) + kReadAhead);
    bytes_.finish(std::copy(begin, end, to));
  }
  void append_character(uint32_t code_point) {
    Byte* to = bytes_.room_for(4 + kReadAhead);
    bytes_.finish(to + encode(code_point, to));
  }
  const Byte* data() const { return bytes_.data(); }
  size_t size() const { return bytes_.size(); }

 private:
  Buffer<Byte> bytes_;
};

// Reads lines that are JSON objects with a string under each key, in strict JSON and valid UTF-8. It says
// no to all that is not so, and to what is so rare that it is not worth the code: keys with escapes, long
// numbers, deep nesting, lone surrogates. Whether such a line is a document is not decided here.
class JsonLine {
 public:
  // `prefix` stands before each text that is not empty.
  JsonLine(std::vector<std::string> keys, std::string prefix);

  // Reads the line that begins at `at`; `end` ends the data. On true, `next` is where the next line
  // begins, or `end`, and `text` gives the value of each key; of equal keys the last counts.
  bool read(const Byte* at, const Byte* end, const Byte*& next);

  const Text& text(size_t key) const { return texts_[key]; }
  // The text's own bytes, without the prefix.
  size_t text_size(size_t key) const;

 private:
  bool read_object();
  bool read_member();
  bool read_text(Text& text);
  bool append_escape(Text& text);
  bool read_unit(uint32_t& unit);
  bool skip_string();
  bool skip_value(int depth);
  bool skip_container(Byte close, int depth);
  bool skip_number();
  bool skip_digits();
  bool skip_word(const char* word);
  const Byte* find_special();
  void skip_space();
  bool take(Byte byte);

  std::vector<std::string> keys_;
  std::string prefix_;
  std::vector<Text> texts_;
  std::vector<bool> found_;
  const Byte* at_ = nullptr;
  const Byte* end_ = nullptr;
  uint64_t string_bits_ = 0;  // all bytes of the line's strings, or-ed: is one of them not ASCII?
};

}  // namespace neo
