// A growing array of plain things.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>

namespace neo {

// Unlike std::vector it does not clear memory that is about to be written, and large ones grow in place.
template <class T>
class Buffer {
 public:
  void clear() { size_ = 0; }
  size_t size() const { return size_; }
  const T* data() const { return items_.get(); }

  // A place to write up to `count` items to; `finish` says where they ended.
  T* room_for(size_t count) {
    if (capacity_ - size_ < count) grow(size_ + count);
    return items_.get() + size_;
  }
  void finish(const T* end) { size_ = static_cast<size_t>(end - items_.get()); }

 private:
  struct Free {
    void operator()(T* items) const { std::free(items); }
  };

  void grow(size_t least) {
    const size_t capacity = least + least / 2;
    void* grown = std::realloc(items_.get(), capacity * sizeof(T));
    if (!grown) throw std::bad_alloc();
    items_.release();
    items_.reset(static_cast<T*>(grown));
    capacity_ = capacity;
  }

  std::unique_ptr<T, Free> items_;
  size_t size_ = 0, capacity_ = 0;
};

}  // namespace neo
