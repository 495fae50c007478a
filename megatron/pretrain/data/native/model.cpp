#include "model.h"

#include <cmath>

#include "utf8.h"
#include "wire.h"

namespace neo {
namespace {

// Numbers of fields and values in sentencepiece_model.proto.
namespace proto {
constexpr uint32_t kPieces = 1, kTrainerSpec = 2, kNormalizerSpec = 3;
constexpr uint32_t kPieceText = 1, kPieceScore = 2, kPieceType = 3;
constexpr uint32_t kModelType = 3, kWhitespaceAsSuffix = 24, kByteFallback = 35;
constexpr uint32_t kNormalizerName = 1, kCharacterMap = 2, kDummyPrefix = 3, kRemoveExtraSpaces = 4,
                   kEscapeSpaces = 5, kNormalizationRules = 6;
constexpr uint64_t kBpe = 2;
}  // namespace proto

struct TrainerSpec {
  uint64_t model_type = 1;  // UNIGRAM is the format's default
  bool whitespace_as_suffix = false;
  bool byte_fallback = false;
};

struct NormalizerSpec {
  std::string_view name;
  bool maps_characters = false;
  bool add_dummy_prefix = true;
  bool remove_extra_spaces = true;
  bool escape_spaces = true;
};

Piece read_piece(std::string_view message) {
  Piece piece;
  FieldReader reader(message);
  for (Field field; reader.next(field);) {
    if (field.tag == proto::kPieceText) piece.text = field.bytes;
    if (field.tag == proto::kPieceScore) piece.score = field.as_float();
    if (field.tag == proto::kPieceType) {
      if (field.number < 1 || field.number > 6) throw Declined("it has pieces of a type unknown here");
      piece.type = static_cast<PieceType>(field.number);
    }
  }
  return piece;
}

void read_trainer(std::string_view message, TrainerSpec& spec) {
  FieldReader reader(message);
  for (Field field; reader.next(field);) {
    if (field.tag == proto::kModelType) spec.model_type = field.number;
    if (field.tag == proto::kWhitespaceAsSuffix) spec.whitespace_as_suffix = field.number != 0;
    if (field.tag == proto::kByteFallback) spec.byte_fallback = field.number != 0;
  }
}

void read_normalizer(std::string_view message, NormalizerSpec& spec) {
  FieldReader reader(message);
  for (Field field; reader.next(field);) {
    switch (field.tag) {
      case proto::kNormalizerName: spec.name = field.bytes; break;
      case proto::kCharacterMap: spec.maps_characters = !field.bytes.empty(); break;
      case proto::kDummyPrefix: spec.add_dummy_prefix = field.number != 0; break;
      case proto::kRemoveExtraSpaces: spec.remove_extra_spaces = field.number != 0; break;
      case proto::kEscapeSpaces: spec.escape_spaces = field.number != 0; break;
      case proto::kNormalizationRules: break;  // the source of the character map, not read when encoding
      default: throw Declined("its normalizer has a setting unknown here");
    }
  }
}

void check_settings(const TrainerSpec& trainer, const NormalizerSpec& normalizer) {
  if (trainer.model_type != proto::kBpe) throw Declined("it is no BPE model");
  if (!trainer.byte_fallback) throw Declined("it has no byte fallback");
  if (trainer.whitespace_as_suffix) throw Declined("it treats spaces as suffixes");
  if (normalizer.maps_characters)
    throw Declined("its normalizer (" + std::string(normalizer.name) + ") changes characters");
  if (normalizer.remove_extra_spaces) throw Declined("it removes extra spaces");
  if (!normalizer.escape_spaces) throw Declined("it leaves spaces as they are");
}

bool is_one_character(std::string_view text) {
  const auto* at = reinterpret_cast<const Byte*>(text.data());
  return is_utf8(at, at + text.size()) && text.size() == character_size(*at);
}

void check_piece(const Piece& piece) {
  if (piece.text.empty()) throw Declined("it has an empty piece");
  if (piece.text.find('\0') != std::string_view::npos) throw Declined("it has a piece with a NUL character");
  if (piece.type == PieceType::kUserDefined) throw Declined("it has user-defined symbols");
  if (piece.type == PieceType::kUnused) throw Declined("it has unused pieces");
  if (std::isnan(piece.score)) throw Declined("it has a score that is no number");
  // Older versions of the library give such a piece's id to the character, newer ones its bytes.
  if (piece.type != PieceType::kNormal && is_one_character(piece.text))
    throw Declined("it has a reserved piece of one character");
}

// Trained models have a zero that is negative: the score of their first merge. Versions of the library that
// compare the bits of scores put it below a positive zero, others beside it; so there must not be both.
void check_zeros(const std::vector<Piece>& pieces) {
  bool positive = false, negative = false;
  for (const Piece& piece : pieces) {
    if (piece.type != PieceType::kNormal || piece.score != 0) continue;
    (std::signbit(piece.score) ? negative : positive) = true;
  }
  if (positive && negative) throw Declined("it has scores of both zeros, 0 and -0");
}

void check_pieces(const std::vector<Piece>& pieces) {
  for (const Piece& piece : pieces) check_piece(piece);
  check_zeros(pieces);
}

}  // namespace

Model read_model(std::string_view bytes) {
  Model model;
  TrainerSpec trainer;
  NormalizerSpec normalizer;
  try {
    FieldReader reader(bytes);
    for (Field field; reader.next(field);) {
      if (field.tag == proto::kPieces) model.pieces.push_back(read_piece(field.bytes));
      if (field.tag == proto::kTrainerSpec) read_trainer(field.bytes, trainer);
      if (field.tag == proto::kNormalizerSpec) read_normalizer(field.bytes, normalizer);
    }
  } catch (const Declined&) {
    throw;
  } catch (const std::runtime_error& error) {
    throw Declined(std::string("its file holds ") + error.what());
  }
  check_settings(trainer, normalizer);
  check_pieces(model.pieces);
  model.add_dummy_prefix = normalizer.add_dummy_prefix;
  return model;
}

}  // namespace neo
