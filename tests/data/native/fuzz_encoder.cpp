// A coverage-guided fuzzer for the native encoder, under AddressSanitizer and UBSan.
//
//   cd tests/data/native && CXX=clang++ bash fuzz_encoder.sh SECONDS MODEL    (clang, with compiler-rt)
//
// The input is a chunk of lines, or, with another first byte, a model, or one text. What is found must not
// crash, and one text must have the same ids whether the encoder is new, has seen it before, or merges it
// whole with a plain reimplementation of SentencePiece's algorithm, without units, caches and tables.

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <iterator>
#include <map>
#include <string>

#include "chunk_encoder.h"

namespace {

using neo::Byte;

std::string read_file(const char* path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) {
    std::fprintf(stderr, "cannot read %s: set FUZZ_MODEL to a SentencePiece BPE model\n", path);
    std::exit(2);
  }
  return std::string(std::istreambuf_iterator<char>(file), {});
}

// SentencePiece's own steps, on strings: the best pair of all, the leftmost of equals, until there is none.
class PlainReference {
 public:
  explicit PlainReference(const neo::Model& model) : dummy_prefix_(model.add_dummy_prefix) {
    for (size_t id = 0; id < model.pieces.size(); ++id) {
      const neo::Piece& piece = model.pieces[id];
      if (piece.type == neo::PieceType::kNormal) pieces_[std::string(piece.text)] = {id, piece.score};
      if (piece.type == neo::PieceType::kByte)
        bytes_[std::strtoul(std::string(piece.text.substr(3, 2)).c_str(), nullptr, 16)] = id;
    }
  }

  std::vector<uint32_t> encode(const std::string& text) const {
    std::vector<std::string> symbols;
    if (!text.empty() && dummy_prefix_) symbols.push_back(kMark);
    for (size_t at = 0; at < text.size();) {
      const size_t size = neo::character_size(static_cast<Byte>(text[at]));
      symbols.push_back(text[at] == ' ' ? kMark : text.substr(at, size));
      at += size;
    }
    while (merge_best(symbols)) {
    }
    std::vector<uint32_t> ids;
    for (const std::string& symbol : symbols) {
      const auto piece = pieces_.find(symbol);
      if (piece != pieces_.end())
        ids.push_back(piece->second.id);
      else
        for (const char byte : symbol) ids.push_back(bytes_[static_cast<Byte>(byte)]);
    }
    return ids;
  }

 private:
  struct Known {
    size_t id;
    float score;
  };

  bool merge_best(std::vector<std::string>& symbols) const {
    const Known* best = nullptr;
    size_t place = 0;
    for (size_t i = 0; i + 1 < symbols.size(); ++i) {
      const auto piece = pieces_.find(symbols[i] + symbols[i + 1]);
      if (piece == pieces_.end() || (best && piece->second.score <= best->score)) continue;
      best = &piece->second;
      place = i;
    }
    if (!best) return false;
    symbols[place] += symbols[place + 1];
    symbols.erase(symbols.begin() + static_cast<ptrdiff_t>(place) + 1);
    return true;
  }

  static constexpr const char* kMark = "\xE2\x96\x81";
  bool dummy_prefix_;
  std::map<std::string, Known> pieces_;
  size_t bytes_[256] = {};
};

struct Fixture {
  const std::string bytes = read_file(std::getenv("FUZZ_MODEL") ? std::getenv("FUZZ_MODEL") : "");
  const neo::Model model = neo::read_model(bytes);
  const neo::Vocabulary vocabulary{model};
  const PlainReference reference{model};
  neo::ChunkEncoder<uint16_t> narrow{model, {"text"}, std::nullopt};
  neo::ChunkEncoder<int32_t> wide{model, {"text", "title"}, 2};
};

template <class Id>
void fuzz_lines(neo::ChunkEncoder<Id>& encoder, const Byte* data, size_t size) {
  encoder.clear();
  for (size_t at = 0; at < size;) {
    at = encoder.encode_lines(data, size, at);
    while (at < size && data[at++] != '\n') {
    }
  }
  for (size_t key = 0; key < encoder.columns(); ++key) {
    size_t sum = 0;
    for (const int32_t length : encoder.column(key).lengths) sum += static_cast<size_t>(length);
    if (sum != encoder.column(key).ids.size()) std::abort();
  }
}

template <class Id>
std::vector<uint32_t> ids_of(neo::ChunkEncoder<Id>& encoder, const Byte* text, size_t size) {
  encoder.clear();
  encoder.encode_text(0, text, size);
  const neo::Column<Id>& column = encoder.column(0);
  return std::vector<uint32_t>(column.ids.data(), column.ids.data() + column.ids.size());
}

// Up to the last boundary of what a text begins with, its ids are those of the whole text.
void check_boundary(Fixture& fixture, const Byte* text, size_t size, const std::vector<uint32_t>& right) {
  size_t begun = size / 2;
  while (begun && (text[begun] & 0xC0) == 0x80) --begun;
  const size_t boundary = fixture.narrow.last_boundary(text, begun);
  if (boundary > begun) std::abort();
  const std::vector<uint32_t> ids = ids_of(fixture.narrow, text, boundary);
  if (ids.size() > right.size() || !std::equal(ids.begin(), ids.end(), right.begin())) std::abort();
}

// What a processor with wide registers finds out about 64 characters, others find out one by one.
void check_joins(Fixture& fixture, const Byte* text, size_t size) {
#ifdef NEO_HAS_WIDE_JOINS
  if (!neo::kHasAvx2) return;
  for (size_t start = 0; start + 66 <= size; start += 64) {
    Byte ascii[66];
    std::transform(text + start, text + start + 66, ascii, [](Byte byte) { return byte & 0x7F; });
    const neo::AsciiJoins wide = neo::wide_ascii_joins(fixture.vocabulary, ascii + 2);
    const neo::AsciiJoins plain = neo::plain_ascii_joins(fixture.vocabulary, ascii + 2, 64);
    if (wide.pairs != plain.pairs || wide.triples != plain.triples) std::abort();
  }
#endif
}

void fuzz_text(Fixture& fixture, const Byte* text, size_t size) {
  check_joins(fixture, text, size);
  if (size > 3000 || !neo::is_utf8(text, text + size)) return;  // the reference takes quadratic time
  const std::vector<uint32_t> right =
      fixture.reference.encode(std::string(reinterpret_cast<const char*>(text), size));
  for (int again = 0; again < 2; ++again)
    if (ids_of(fixture.narrow, text, size) != right) std::abort();
  std::vector<uint32_t> wide = ids_of(fixture.wide, text, size);
  if (!wide.empty()) wide.pop_back();  // the id that ends a document
  if (wide != right) std::abort();
  check_boundary(fixture, text, size, right);
}

void fuzz_model(const Byte* data, size_t size) {
  try {
    const neo::Model model = neo::read_model(std::string_view(reinterpret_cast<const char*>(data), size));
    const neo::Vocabulary vocabulary(model);
    neo::Merger merger(vocabulary);
    for (const neo::Piece& piece : model.pieces)
      if (neo::is_utf8(reinterpret_cast<const Byte*>(piece.text.data()),
                       reinterpret_cast<const Byte*>(piece.text.data()) + piece.text.size()))
        merger.merge(reinterpret_cast<const Byte*>(piece.text.data()), piece.text.size());
  } catch (const neo::Declined&) {
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  static Fixture& fixture = *new Fixture;
  if (size == 0) return 0;
  switch (data[0] % 4) {
    case 0: fuzz_lines(fixture.narrow, data + 1, size - 1); break;
    case 1: fuzz_lines(fixture.wide, data + 1, size - 1); break;
    case 2: fuzz_text(fixture, data + 1, size - 1); break;
    case 3: fuzz_model(data + 1, size - 1); break;
  }
  return 0;
}
