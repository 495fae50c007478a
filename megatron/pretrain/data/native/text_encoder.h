// Text to ids: cut into units, look each up, merge those not seen before.
#pragma once

#include "buffer.h"
#include "cache.h"
#include "merger.h"
#include "row_units.h"
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
    n_pending_ = 0;  // an exception may have left some
    out_ = ids.room_for(most_ids(size) + kCopyAhead);
    splitter_.split(
        text, size, [this](const Byte* unit, size_t unit_size) { append(unit, unit_size); },
        [this](const Row& row, const Byte* unit) { return append_row(row, unit); });
    flush();
    ids.finish(out_);
  }

 private:
  // 8 MiB of short units and 6 MiB of long ones: what a worker holds beside the vocabulary. More would be
  // slower in runs of less than some hundred MB, where clearing the memory costs what it saves.
  static constexpr int kShortSetBits = 17;
  static constexpr int kLongSetBits = 14;
  // Ids of a short slot are copied all at once, whatever their number, and a row's may be written one too far.
  static constexpr size_t kCopyAhead = ShortSlot<Id>::kMostIds;

  // A character has at most as many ids as it has bytes: one if it is a piece or part of one, else one for
  // each byte. A space that is no piece has the three bytes of its mark.
  size_t most_ids(size_t size) const { return vocabulary_.has_space() ? size : 3 * size; }

  void append(const Byte* unit, size_t size) {
    pending_[n_pending_] = {ShortKey(unit, size & 15), unit, size};
    short_units_.prefetch(pending_[n_pending_].key);
    if (++n_pending_ == kMostPending) flush();
  }

  // Takes the units that begin and end in the row, and the one before them that ends in it. Most units of
  // text that is not ASCII are one character or two: their ids are at hand, and no cache is asked.
  const Byte* append_row(const Row& row, const Byte* unit) {
    if (row.count == Row::kBytes) return unit;
    const RowUnits units(row, unit);
    if (!units.has_some()) return unit;
    const Byte* const first = row.start(units.first());
    if (first > unit) append(unit, static_cast<size_t>(first - unit));
    flush();
    const uint64_t longs = units.longs();
    for (uint64_t left = longs; left; left &= left - 1) {
      const auto k = static_cast<size_t>(__builtin_ctzll(left));
      if (units.size(k) > 3) short_units_.prefetch(ShortKey(row.start(k), units.bytes(k) & 15));
    }
    const ShortUnits<Id> short_units(vocabulary_, row, units);
    size_t k = units.first();
    for (uint64_t others = units.characters() & (longs | ~short_units.pieces); others;) {
      const auto other = static_cast<size_t>(__builtin_ctzll(others));
      out_ = short_units.write(k, other, out_);
      const size_t size = longs >> other & 1 ? units.size(other) : 1;
      k = other + size;
      append_other(row, other, size, static_cast<size_t>(row.start(k) - row.start(other)));
      others &= ~0ull << k;  // k is at most where the last unit begins, which is below 64
    }
    out_ = short_units.write(k, units.last(), out_);
    return row.start(units.last());
  }

  // A unit of three or more characters, or one that is no piece.
  __attribute__((always_inline)) void append_other(const Row& row, size_t k, size_t size, size_t bytes) {
    if (size > 3) {
      write_unit({ShortKey(row.start(k), bytes & 15), row.start(k), bytes});
      return;
    }
    if (size == 1) return write_bytes(row.start(k));
    Symbol merged[3];
    const size_t count = merge_three(vocabulary_, row.symbols + k, merged);
    for (size_t i = 0; i < count; ++i) {
      // What is no piece is a character that nothing was merged with: of two symbols the first or third.
      if (vocabulary_.is_piece(merged[i]))
        *out_++ = static_cast<Id>(merged[i]);
      else
        write_bytes(row.start(k + (count == 3 ? i : 2 * i)));
    }
  }

  // Byte fallback, as Merger's.
  void write_bytes(const Byte* character) {
    static constexpr Byte kMark[] = {0xE2, 0x96, 0x81};  // kSpaceMark
    if (*character == ' ') character = kMark;
    for (size_t left = character_size(*character); left; --left)
      *out_++ = static_cast<Id>(vocabulary_.byte_id(*character++));
  }

  void flush() {
    for (size_t i = 0; i < n_pending_; ++i) write_unit(pending_[i]);
    n_pending_ = 0;
  }

  // Units wait until some have come together, while the cache's memory is fetched for them.
  struct Pending {
    ShortKey key;  // of no meaning for a unit that is longer
    const Byte* start;
    size_t size;
  };
  static constexpr size_t kMostPending = 32;

  // Part of two loops that are most of the time of some texts.
  __attribute__((always_inline)) void write_unit(const Pending& unit) {
    if (unit.size == 1 && vocabulary_.ascii_id(*unit.start) != kNoSymbol)
      *out_++ = static_cast<Id>(vocabulary_.ascii_id(*unit.start));
    else if (unit.size <= ShortKey::kMostBytes)
      append_cached(short_units_, unit.key, unit.start, unit.size);
    else if (unit.size <= LongKey::kMostBytes)
      append_cached(long_units_, LongKey(unit.start, unit.size), unit.start, unit.size);
    else
      write(merger_.merge(unit.start, unit.size));
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
