// The module megatron.pretrain.data._native: what Python sees.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <numeric>

#include "chunk_encoder.h"

namespace py = pybind11;

namespace neo {
namespace {

std::string_view view_of(const py::bytes& bytes) { return static_cast<std::string_view>(bytes); }
const Byte* bytes_of(std::string_view view) { return reinterpret_cast<const Byte*>(view.data()); }

template <class Number>
py::bytes bytes_of(const std::vector<Number>& numbers) {
  return py::bytes(reinterpret_cast<const char*>(numbers.data()), numbers.size() * sizeof(Number));
}

template <class Id>
std::unique_ptr<ChunkEncoder<Id>> make_encoder(const py::bytes& model, const std::vector<std::string>& keys,
                                               std::optional<Id> end_id) {
  return std::make_unique<ChunkEncoder<Id>>(read_model(view_of(model)), keys, end_id);
}

template <class Id>
size_t encode_lines(ChunkEncoder<Id>& encoder, const py::bytes& data, size_t start) {
  const std::string_view view = view_of(data);
  if (start > view.size()) throw py::index_error("starts past the end");
  const py::gil_scoped_release others_may_run;
  return encoder.encode_lines(bytes_of(view), view.size(), start);
}

template <class Id>
void encode_text(ChunkEncoder<Id>& encoder, size_t key, const py::str& text) {
  const std::string utf8 = text;  // Python refuses a lone surrogate here
  encoder.encode_text(key, bytes_of(utf8), utf8.size());
}

// Without a copy: the view keeps the column.
template <class Id>
py::buffer_info ids_of_all(Column<Id>& column) {
  return py::buffer_info(column.ids.data(), static_cast<py::ssize_t>(column.ids.size()), true);
}

template <class Id>
int32_t length_of(const Column<Id>& column, size_t document) {
  return column.lengths.at(document);
}

template <class Id>
std::vector<Id> ids_of(const Column<Id>& column, size_t document, size_t first) {
  const size_t count = std::min(first, static_cast<size_t>(length_of(column, document)));
  const auto length = column.lengths.begin() + static_cast<ptrdiff_t>(document);
  const Id* start = column.ids.data() + std::accumulate(column.lengths.begin(), length, size_t{0});
  return std::vector<Id>(start, start + count);
}

template <class Id>
py::tuple entries(py::object self, int64_t tokens, int64_t sequences) {
  const auto index = self.cast<const Column<Id>&>().index(tokens, sequences);
  return py::make_tuple(py::memoryview(self), bytes_of(index.lengths), bytes_of(index.offsets),
                        bytes_of(index.documents));
}

template <class Id>
py::str whole_units(ChunkEncoder<Id>& encoder, const py::str& text) {
  const std::string utf8 = text;
  return py::str(utf8.data(), encoder.last_boundary(bytes_of(utf8), utf8.size()));
}

template <class Id>
void bind_column(py::module_& module, const char* name) {
  using Texts = Column<Id>;
  py::class_<Texts, std::shared_ptr<Texts>>(module, name, py::buffer_protocol(), "An EncodedTexts.")
      .def_buffer(&ids_of_all<Id>)
      .def_property_readonly("tokens", [](const Texts& texts) { return texts.ids.size(); })
      .def_property_readonly("sequences", &Texts::sequences)
      .def_property_readonly("documents", [](const Texts& texts) { return texts.lengths.size(); })
      .def_readonly("text_bytes", &Texts::text_bytes)
      .def_property_readonly("longest", &Texts::longest)
      .def("length_of", &length_of<Id>, py::arg("document"))
      .def("ids_of", &ids_of<Id>, py::arg("document"), py::arg("first"))
      .def("entries", &entries<Id>, py::arg("tokens"), py::arg("sequences"));
}

template <class Id>
void bind_encoder(py::module_& module, const char* name) {
  using Encoder = ChunkEncoder<Id>;
  py::class_<Encoder>(module, name,
                      "Encodes JSON lines with a SentencePiece BPE model. One thread at a time may use it.")
      .def(py::init(&make_encoder<Id>), py::arg("model"), py::arg("keys"), py::arg("end_id"),
           "Raises Declined where the model needs the SentencePiece library.")
      .def("clear", &Encoder::clear, "Forget the documents encoded so far.")
      .def("encode_lines", &encode_lines<Id>, py::arg("data"), py::arg("start"),
           "Add the documents of lines; returns the offset of the first line not read here, or the end.")
      .def("encode_text", &encode_text<Id>, py::arg("key"), py::arg("text"), "Add a document to one key.")
      .def("take", &Encoder::take, py::arg("key"), "The documents of one key, which it then forgets.")
      .def("whole_units", &whole_units<Id>, py::arg("text"),
           "The text without its last unit: its ids begin the text's ids, whatever follows.");
}

}  // namespace
}  // namespace neo

PYBIND11_MODULE(_native, module) {
  py::register_exception<neo::Declined>(module, "Declined", PyExc_ValueError);
  py::register_exception<neo::TooLong>(module, "TooLong", PyExc_ValueError);
  neo::bind_column<uint16_t>(module, "Texts16");
  neo::bind_column<int32_t>(module, "Texts32");
  neo::bind_encoder<uint16_t>(module, "Encoder16");
  neo::bind_encoder<int32_t>(module, "Encoder32");
}
