// The module megatron.pretrain.data._native: what Python sees.

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "chunk_encoder.h"

namespace py = pybind11;

namespace neo {
namespace {

std::string_view view_of(const py::bytes& bytes) { return static_cast<std::string_view>(bytes); }
const Byte* bytes_of(std::string_view view) { return reinterpret_cast<const Byte*>(view.data()); }

template <class Number>
py::array_t<Number> copy_of(const Number* numbers, size_t count) {
  return py::array_t<Number>(static_cast<py::ssize_t>(count), numbers);
}

template <class Id>
std::unique_ptr<ChunkEncoder<Id>> make_encoder(const py::bytes& model, const std::vector<std::string>& keys,
                                               std::optional<Id> end_id) {
  return std::make_unique<ChunkEncoder<Id>>(read_model(view_of(model)), keys, end_id);
}

template <class Id>
void check_column(const ChunkEncoder<Id>& encoder, size_t key) {
  if (key >= encoder.columns()) throw py::index_error("no such key");
}

template <class Id>
size_t encode_lines(ChunkEncoder<Id>& encoder, const py::bytes& data, size_t start) {
  const std::string_view view = view_of(data);
  if (start > view.size()) throw py::index_error("starts past the end");
  return encoder.encode_lines(bytes_of(view), view.size(), start);
}

template <class Id>
void encode_text(ChunkEncoder<Id>& encoder, size_t key, const py::str& text) {
  check_column(encoder, key);
  const std::string utf8 = text;  // Python refuses a lone surrogate here
  encoder.encode_text(key, bytes_of(utf8), utf8.size());
}

template <class Id>
py::tuple take(ChunkEncoder<Id>& encoder, size_t key) {
  check_column(encoder, key);
  const Column<Id>& column = encoder.column(key);
  return py::make_tuple(copy_of(column.ids.data(), column.ids.size()),
                        copy_of(column.lengths.data(), column.lengths.size()), column.text_bytes);
}

template <class Id>
py::str whole_units(ChunkEncoder<Id>& encoder, const py::str& text) {
  const std::string utf8 = text;
  return py::str(utf8.data(), encoder.last_boundary(bytes_of(utf8), utf8.size()));
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
      .def("take", &take<Id>, py::arg("key"), "(ids, lengths as int32, bytes of text) of one key.")
      .def("whole_units", &whole_units<Id>, py::arg("text"),
           "The text without its last unit: its ids begin the text's ids, whatever follows.");
}

}  // namespace
}  // namespace neo

PYBIND11_MODULE(_native, module) {
  py::register_exception<neo::Declined>(module, "Declined", PyExc_ValueError);
  neo::bind_encoder<uint16_t>(module, "Encoder16");
  neo::bind_encoder<int32_t>(module, "Encoder32");
}
