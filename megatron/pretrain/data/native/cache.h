// The ids of units seen before. A full cache forgets: its memory is fixed, and it follows the text.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>

namespace neo {

// Sets of two slots that share a cache line (or, for long units, lie side by side). The newer entry of a
// set comes first and the older makes room. `Slot` has `holds(key)`; an all-zero slot holds nothing.
template <class Slot>
class Cache {
 public:
  explicit Cache(int set_bits)
      : mask_((size_t{1} << set_bits) - 1), memory_(allocate(mask_ + 1)), sets_(aligned(memory_.get())) {}

  template <class Key>
  const Slot* find(const Key& key) {
    Set& set = sets_[key.hash & mask_];
    if (set.slots[0].holds(key)) return &set.slots[0];
    return set.slots[1].holds(key) ? &set.slots[1] : nullptr;
  }

  template <class Key>
  Slot& make_room(const Key& key) {
    Set& set = sets_[key.hash & mask_];
    set.slots[1] = set.slots[0];
    return set.slots[0];
  }

 private:
  struct alignas(64) Set {
    Slot slots[2];
  };
  struct Free {
    void operator()(void* memory) const { std::free(memory); }
  };
  using Memory = std::unique_ptr<void, Free>;

  // Zeroed by the system, page by page as they are used, so that a small run pays little. The memory is
  // a plain calloc's: a slot is trivial, and a set of short slots begins where `aligned` says.
  static Memory allocate(size_t sets) {
    Memory memory(std::calloc(sets + 1, sizeof(Set)));
    if (!memory) throw std::bad_alloc();
    return memory;
  }

  static Set* aligned(void* memory) {
    const auto address = reinterpret_cast<uintptr_t>(memory);
    return reinterpret_cast<Set*>((address + alignof(Set) - 1) & ~(alignof(Set) - 1));
  }

  size_t mask_;
  Memory memory_;
  Set* sets_;
};

}  // namespace neo
