// Text to ids: cut into units, look each up, merge those not seen before.
#pragma once

#include "buffer.h"
#include "cache.h"
#include "merger.h"
#include "splitter.h"
#include "unit_key.h"

namespace neo {

template <class Id>
class TextEncoder {
 public:
  explicit TextEncoder(const Vocabulary& vocabulary)
      : vocabulary_(vocabulary), splitter_(vocabulary), merger_(vocabulary) {}

  // Appends the ids of `size` bytes of valid UTF-8, which have the dummy prefix, if the model adds one, as
  // a space before them. `kReadAhead` bytes after the text must be readable.
  void encode(const Byte* text, size_t size, Buffer<Id>& ids) {
    out_ = ids.room_for(most_ids(size) + kCopyAhead);
    splitter_.split(text, size, [this](const Byte* unit, size_t unit_size) { append(unit, unit_size); });
    flush();
    ids.finish(out_);
  }

 private:
  // 8 MiB of short units and 6 MiB of long ones: what a worker holds beside the vocabulary. More would be
  // slower in runs of less than some hundred MB, where clearing the memory costs what it saves.
  static constexpr int kShortSetBits = 17;
  static constexpr int kLongSetBits = 14;
  // Ids of a short slot are copied all at once, whatever their number.
  static constexpr size_t kCopyAhead = ShortSlot<Id>::kMostIds;

  // A character has at most as many ids as it has bytes: one if it is a piece or part of one, else one for
  // each byte. A space that is no piece has the three bytes of its mark.
  size_t most_ids(size_t size) const { return vocabulary_.has_space() ? size : 3 * size; }

  void append(const Byte* unit, size_t size) {
    pending_[n_pending_] = {ShortKey(unit, size & 15), unit, size};
    short_units_.prefetch(pending_[n_pending_].key);
    if (++n_pending_ == kMostPending) flush();
  }

  void flush() {
    for (size_t i = 0; i < n_pending_; ++i) {
      const Pending& unit = pending_[i];
      if (unit.size == 1 && vocabulary_.ascii_id(*unit.start) != kNoSymbol)
        *out_++ = static_cast<Id>(vocabulary_.ascii_id(*unit.start));
      else if (unit.size <= ShortKey::kMostBytes)
        append_cached(short_units_, unit.key, unit.start, unit.size);
      else if (unit.size <= LongKey::kMostBytes)
        append_cached(long_units_, LongKey(unit.start, unit.size), unit.start, unit.size);
      else
        write(merger_.merge(unit.start, unit.size));
    }
    n_pending_ = 0;
  }

  template <class Slot, class Key>
  void append_cached(Cache<Slot>& cache, const Key& key, const Byte* unit, size_t size) {
    if (const Slot* slot = cache.find(key)) return copy(*slot);
    const std::vector<uint32_t>& ids = merger_.merge(unit, size);
    if (ids.size() <= Slot::kMostIds) cache.make_room(key).fill(key, ids.data(), ids.size());
    write(ids);
  }

  void copy(const ShortSlot<Id>& slot) {
    std::memcpy(out_, slot.ids, sizeof slot.ids);
    out_ += slot.count;
  }
  void copy(const LongSlot<Id>& slot) { out_ = std::copy(slot.ids, slot.ids + slot.count, out_); }
  void write(const std::vector<uint32_t>& ids) { out_ = std::copy(ids.begin(), ids.end(), out_); }

  // Units wait until some have come together, while the cache's memory is fetched for them.
  struct Pending {
    ShortKey key;  // of no meaning for a unit that is longer
    const Byte* start;
    size_t size;
  };
  static constexpr size_t kMostPending = 32;

  const Vocabulary& vocabulary_;
  Splitter splitter_;
  Merger merger_;
  Cache<ShortSlot<Id>> short_units_{kShortSetBits};
  Cache<LongSlot<Id>> long_units_{kLongSetBits};
  std::array<Pending, kMostPending> pending_;
  size_t n_pending_ = 0;
  Id* out_ = nullptr;
};

}  // namespace neo
