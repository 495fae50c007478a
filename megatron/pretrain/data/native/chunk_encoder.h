// Lines to columns: for each key the ids of all documents end to end, and how many each has.
#pragma once

#include <optional>
#include <utility>

#include "column.h"
#include "json_line.h"
#include "text_encoder.h"

namespace neo {

template <class Id>
class ChunkEncoder {
 public:
  // end_id: what ends each document that is not empty, if anything does.
  ChunkEncoder(const Model& model, const std::vector<std::string>& keys, std::optional<Id> end_id)
      : vocabulary_(model),
        encoder_(vocabulary_),
        line_(keys, vocabulary_.add_dummy_prefix() ? " " : ""),
        end_id_(end_id) {
    for (size_t key = 0; key < keys.size(); ++key) columns_.push_back(pool_.take());
  }

  // Forgets the columns; what was learnt of units stays.
  void clear() {
    for (const auto& column : columns_) column->clear();
  }

  // Appends the documents of the lines from `start` on. Returns where it stopped: the size of the data, or
  // the beginning of the first line that it leaves to others.
  size_t encode_lines(const Byte* data, size_t size, size_t start) {
    const Byte* at = data + start;
    const Byte* end = data + size;
    while (at < end && line_.read(at, end, at)) {
      for (size_t key = 0; key < columns_.size(); ++key)
        append(*columns_[key], line_.text(key), line_.text_size(key));
    }
    return static_cast<size_t>(at - data);
  }

  // Appends a document to one column: `text` is valid UTF-8, read by others.
  void encode_text(size_t key, const Byte* text, size_t size) {
    set_text(text, size);
    append(*columns_.at(key), text_, size);
  }

  // Where a unit near the text's end begins, as an offset in it: up to there its ids do not depend on what
  // follows, in the text or after it. 0 for a text of one unit.
  size_t last_boundary(const Byte* text, size_t size) {
    set_text(text, size);
    const Byte* const start = text_.data() + (text_.size() - size);  // after the prefix, if there is one
    const Byte* const end = text_.data() + text_.size();
    const Byte* last = start;
    Splitter(vocabulary_).split(text_.data(), text_.size(), [&](const Byte* unit, size_t) {
      // Of ASCII, whether a boundary stands before the last character depends on the one that follows it.
      if (unit > start && end - unit > 1) last = unit;
    });
    return static_cast<size_t>(last - start);
  }

  const Column<Id>& column(size_t key) const { return *columns_.at(key); }
  // Hands a column over, and goes on with an empty one.
  std::shared_ptr<Column<Id>> take(size_t key) { return std::exchange(columns_.at(key), pool_.take()); }
  size_t columns() const { return columns_.size(); }

 private:
  void set_text(const Byte* text, size_t size) {
    Byte* to = text_.start(size + 1);
    if (size && vocabulary_.add_dummy_prefix()) *to++ = ' ';
    text_.finish(std::copy(text, text + size, to));
  }

  void append(Column<Id>& column, const Text& text, size_t text_size) {
    const size_t before = column.ids.size();
    encoder_.encode(text.data(), text.size(), column.ids);
    if (end_id_ && column.ids.size() > before) {
      Id* end = column.ids.room_for(1);
      *end = *end_id_;
      column.ids.finish(end + 1);
    }
    const size_t length = column.ids.size() - before;
    if (length > std::numeric_limits<int32_t>::max()) throw TooLong("2^31 tokens or more");
    column.lengths.push_back(static_cast<int32_t>(length));
    column.text_bytes += text_size;
  }

  Vocabulary vocabulary_;
  TextEncoder<Id> encoder_;
  JsonLine line_;
  ColumnPool<Id> pool_;
  std::vector<std::shared_ptr<Column<Id>>> columns_;
  std::optional<Id> end_id_;
  Text text_;
};

}  // namespace neo
