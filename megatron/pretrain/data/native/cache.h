// The ids of units seen before. A full cache forgets: its memory is fixed, and it follows the text.
#pragma once

#include <sys/mman.h>

#include <cstddef>
#include <functional>
#include <memory>
#include <new>

namespace neo {

// Sets of two slots that share a cache line (or, for long units, lie side by side). The newer entry of a
// set comes first and the older makes room. `Slot` has `holds(key)`; an all-zero slot holds nothing.
template <class Slot>
class Cache {
 public:
  explicit Cache(int set_bits)
      : mask_((size_t{1} << set_bits) - 1), sets_(allocate(mask_ + 1)) {}

  // To be called some units before `find`: the table is larger than a processor's caches, and the wait for
  // its memory would be most of the time of a unit that was seen before.
  template <class Key>
  void prefetch(const Key& key) const {
    __builtin_prefetch(&sets_[key.hash & mask_]);
  }

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
  using Memory = std::unique_ptr<Set[], std::function<void(Set*)>>;

  // Zeroed by the system, page by page as they are used, so that a small run pays little.
  static Memory allocate(size_t sets) {
    const size_t size = sets * sizeof(Set);
    void* memory = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
#ifdef MADV_HUGEPAGE
    // Sets are visited in no order: with small pages each visit also waits for the page's address. Where
    // the system has no large pages to give, nothing else changes.
    (void)madvise(memory, size, MADV_HUGEPAGE);
#endif
    return Memory(static_cast<Set*>(memory), [size](Set* sets) { munmap(sets, size); });
  }

  size_t mask_;
  Memory sets_;
};

}  // namespace neo
