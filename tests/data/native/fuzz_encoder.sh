#!/usr/bin/env bash
# Builds and runs the fuzzer of fuzz_encoder.cpp:  bash fuzz_encoder.sh SECONDS MODEL [FOLDER]
# MODEL is a small SentencePiece BPE model (1,000 pieces: the fuzzer starts from it, too); FOLDER keeps
# what was learnt (default: a temporary one). Needs clang++ with compiler-rt (Debian: clang libclang-rt-dev).
set -euo pipefail
[[ $# -ge 2 ]] || { echo "error: fuzz_encoder.sh SECONDS MODEL [FOLDER]" >&2; exit 2; }
seconds="$1" model="$(realpath "$2")" folder="$(realpath -m "${3:-$(mktemp -d)}")"
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
native="$here/../../../megatron/pretrain/data/native"
mkdir -p "$folder/corpus"

"${CXX:-clang++}" -std=c++17 -O1 -g -fno-sanitize-recover=all -fsanitize=fuzzer,address,undefined \
    -I "$native" "$here/fuzz_encoder.cpp" "$native"/{model,vocabulary,merger,json_line}.cpp -o "$folder/fuzz"

# Each seed's first byte says what the rest is: lines, lines for two keys, a text, a model.
printf '0{"a":[1,{"b":-2.5e3}],"text":"x \\"\\u00e9\\ud83d\\ude00\\n"}\n{"text":"\\u2581","text":"b"}\r\n' \
    > "$folder/corpus/lines"
printf '1{"title":"","text":"caf\xc3\xa9 \xe4\xb8\xad\xe6\x96\x87 words words"}\n' > "$folder/corpus/two"
printf '2  the quick brown fox\xe2\x96\x81jumps over\t\nthe lazy dogdogdogdogdogdogdogdogdogdogdogdogdogdog' \
    > "$folder/corpus/text"
{ printf 3; cat "$model"; } > "$folder/corpus/model"

cd "$folder"
FUZZ_MODEL="$model" ./fuzz corpus -max_total_time="$seconds" -max_len=32768 -timeout=20 -print_final_stats=1
