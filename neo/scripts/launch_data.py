"""For launch.sh: what a mixture.env or a DATA_PATH holds, as KEY=value lines.

DATA_PATH is printed decoded, or BLEND_FILE where it is longer than a command line should be; a MISSING
line names each dataset that is not here.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

try:
    from megatron.pretrain.data.blend import parse_blend, plain_words
    from megatron.pretrain.data.mixture_env import blend_file, read_mixture_env
    from megatron.pretrain.errors import UserError, entry
except ModuleNotFoundError as missing:
    sys.exit(f"error: {missing.name} is not installed; run `pip install -e .` in the repository's root")

LONGEST_DATA_PATH_CHARACTERS = 32_000


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    given = parser.add_mutually_exclusive_group(required=True)
    given.add_argument("--env-file", help="a mixture.env")
    given.add_argument("--data-path", help="DATA_PATH as the user gave it")
    arguments = parser.parse_args(argv)
    if arguments.env_file:
        lines = _of_mixture(arguments.env_file)
    else:
        words = plain_words([arguments.data_path])
        lines = [f"DATA_PATH={' '.join(words)}", *_missing(words)]
    print("\n".join(lines))


def _of_mixture(env_file: str) -> list[str]:
    values = read_mixture_env(env_file)
    words = values["DATA_PATH"].split()
    blend = blend_file(env_file)
    if len(values["DATA_PATH"]) <= LONGEST_DATA_PATH_CHARACTERS:
        data = f"DATA_PATH={' '.join(words)}"
    elif blend.is_file() and blend.read_text(encoding="utf-8").split() == words:
        data = f"BLEND_FILE={blend}"
    else:
        raise UserError(f"{blend}: not the blend of {env_file}; run neo/scripts/gen_mixture_str.sh again")
    return [data, *(f"{key}={values[key]}" for key in ("TRAIN_ITERS", "GLOBAL_BATCH_SIZE", "SEQ_LEN")),
            *_missing(words)]


def _missing(words: list[str]) -> list[str]:
    prefixes = dict.fromkeys(dataset.prefix for dataset in parse_blend(words))
    return [f"MISSING={prefix}" for prefix in prefixes
            if not all(os.path.isfile(prefix + suffix) for suffix in (".idx", ".bin"))]


if __name__ == "__main__":
    entry(main)
