// The documents of one key: ids end to end, and how many each has.
#pragma once

#include <algorithm>
#include <memory>
#include <vector>

#include "buffer.h"

namespace neo {

template <class Id>
struct Column {
  Buffer<Id> ids;
  std::vector<int32_t> lengths;
  uint64_t text_bytes = 0;

  void clear() {
    ids.clear();
    lengths.clear();
    text_bytes = 0;
  }

  // A document is one sequence, or none where it has no ids.
  size_t sequences() const { return lengths.size() - std::count(lengths.begin(), lengths.end(), 0); }

  // The number of the document with the most ids; 0 where there is none.
  size_t longest() const {
    return static_cast<size_t>(std::max_element(lengths.begin(), lengths.end()) - lengths.begin());
  }

  // The index's sections, of a set that has so many tokens and sequences before these.
  struct Index {
    std::vector<int32_t> lengths;
    std::vector<int64_t> offsets, documents;
  };
  Index index(int64_t tokens, int64_t sequences) const {
    Index index;
    index.lengths.reserve(lengths.size());
    index.offsets.reserve(lengths.size());
    index.documents.reserve(lengths.size());
    for (const int32_t length : lengths) {
      if (length) {
        index.lengths.push_back(length);
        index.offsets.push_back(tokens * static_cast<int64_t>(sizeof(Id)));
        tokens += length;
        ++sequences;
      }
      index.documents.push_back(sequences);
    }
    return index;
  }
};

// Columns whose memory serves again: to hand out new memory is work for the system, page by page.
template <class Id>
class ColumnPool {
 public:
  std::shared_ptr<Column<Id>> take() {
    auto column = free_->empty() ? std::make_unique<Column<Id>>() : std::move(free_->back());
    if (!free_->empty()) free_->pop_back();
    return {column.release(), [free = free_](Column<Id>* used) {
              used->clear();
              free->emplace_back(used);
            }};
  }

 private:
  using Free = std::vector<std::unique_ptr<Column<Id>>>;
  std::shared_ptr<Free> free_ = std::make_shared<Free>();
};

}  // namespace neo
