// Ids one after another, in the type of the file that they go to.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>

namespace neo {

// A growing array that, unlike std::vector, does not clear memory that is about to be written.
template <class Id>
class TokenBuffer {
 public:
  void clear() { size_ = 0; }
  size_t size() const { return size_; }
  const Id* data() const { return ids_.get(); }

  // A place to write up to `count` ids to; `finish` says where they ended.
  Id* room_for(size_t count) {
    if (capacity_ - size_ < count) grow(size_ + count);
    return ids_.get() + size_;
  }
  void finish(const Id* end) { size_ = static_cast<size_t>(end - ids_.get()); }

 private:
  struct Free {
    void operator()(Id* ids) const { std::free(ids); }
  };

  void grow(size_t least) {
    const size_t capacity = least + least / 2;
    void* grown = std::realloc(ids_.get(), capacity * sizeof(Id));
    if (!grown) throw std::bad_alloc();
    ids_.release();
    ids_.reset(static_cast<Id*>(grown));
    capacity_ = capacity;
  }

  std::unique_ptr<Id, Free> ids_;
  size_t size_ = 0, capacity_ = 0;
};

}  // namespace neo
