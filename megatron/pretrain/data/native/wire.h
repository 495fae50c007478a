// The wire format of protocol buffers, as far as a SentencePiece model needs it.
#pragma once

#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string_view>

namespace neo {

// One field of a message: `number` of scalar fields, or the bytes of a string, message or fixed-size field.
struct Field {
  uint32_t tag = 0;
  uint64_t number = 0;
  std::string_view bytes;

  float as_float() const {
    if (bytes.size() != sizeof(float)) throw std::runtime_error("a score that is no float");
    float value;
    std::memcpy(&value, bytes.data(), sizeof value);
    return value;
  }
};

// Reads the fields of a message in their order. Throws std::runtime_error where the bytes are no message.
class FieldReader {
 public:
  explicit FieldReader(std::string_view message) : left_(message) {}

  bool next(Field& field) {
    if (left_.empty()) return false;
    const uint64_t key = varint();
    field = Field{};
    field.tag = static_cast<uint32_t>(key >> 3);
    switch (key & 7) {
      case 0: field.number = varint(); break;
      case 1: field.bytes = take(8); break;
      case 2: field.bytes = take(varint()); break;
      case 5: field.bytes = take(4); break;
      default: throw std::runtime_error("a field of unknown wire type");
    }
    return true;
  }

 private:
  uint64_t varint() {
    uint64_t value = 0;
    for (int shift = 0; shift < 64 && !left_.empty(); shift += 7) {
      const auto byte = static_cast<uint8_t>(left_.front());
      left_.remove_prefix(1);
      value |= static_cast<uint64_t>(byte & 0x7F) << shift;
      if (byte < 0x80) return value;
    }
    throw std::runtime_error("a number that does not end");
  }

  std::string_view take(uint64_t size) {
    if (size > left_.size()) throw std::runtime_error("a field longer than the message");
    const std::string_view taken = left_.substr(0, size);
    left_.remove_prefix(size);
    return taken;
  }

  std::string_view left_;
};

}  // namespace neo
