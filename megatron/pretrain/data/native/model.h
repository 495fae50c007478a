// A SentencePiece model file: its pieces and the settings that change ids.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

namespace neo {

// Why this encoder leaves a model to the SentencePiece library, in words for the user.
class Declined : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

enum class PieceType { kNormal = 1, kUnknown = 2, kControl = 3, kUserDefined = 4, kUnused = 5, kByte = 6 };

struct Piece {
  std::string_view text;
  float score = 0;
  PieceType type = PieceType::kNormal;
};

// A model that qualifies. The views in `pieces` look into the bytes that it was read from.
struct Model {
  std::vector<Piece> pieces;
  bool add_dummy_prefix = true;
};

// Reads a serialized ModelProto. Throws Declined where the model is none or uses what is not covered here.
Model read_model(std::string_view bytes);

}  // namespace neo
