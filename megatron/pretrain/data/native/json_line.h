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
  // A place for a new text of up to `size` bytes; `finish` says where it ended.
  Byte* start(size_t size) {
    bytes_.clear();
    return bytes_.room_for(size + kReadAhead);
  }
  void finish(const Byte* end) { bytes_.finish(end); }
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
  Byte* copy_plain(Byte* to);
  bool read_escape(Byte*& to);
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
  // All bytes of the line's strings, and some after them, or-ed: is one of them not ASCII?
  uint64_t string_bits_ = 0;
};

}  // namespace neo
