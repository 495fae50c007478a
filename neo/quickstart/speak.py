"""Let a converted model continue a prompt, greedily and in fp32, with nothing but `transformers`.

With --expect, a JSON file with the `prompt_ids` and `new_ids` that the training model gave for the prompt,
the ids must be the same; ends with code 1 if they are not.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from megatron.pretrain.errors import entry


def continuation(model_folder: Path, prompt: str, new_tokens: int) -> tuple[list[int], list[int], str]:
    """Ids of the prompt, ids of the `new_tokens` most likely tokens after it, and all of it as text."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32).eval()
    prompt_ids = tokenizer(prompt, add_special_tokens=False, return_tensors="pt")
    # Without an end-of-text id it goes on to the last token asked for, as the training model's does.
    output = model.generate(**prompt_ids, max_new_tokens=new_tokens, do_sample=False, eos_token_id=[],
                            pad_token_id=0)[0].tolist()
    length = prompt_ids["input_ids"].shape[1]
    return output[:length], output[length:], tokenizer.decode(output)


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, metavar="FOLDER", help="converted model")
    parser.add_argument("--prompt", required=True, metavar="TEXT")
    parser.add_argument("--max-new-tokens", type=int, default=64, metavar="N")
    parser.add_argument("--expect", type=Path, metavar="JSON", help="what the training model said")
    options = parser.parse_args(arguments)
    prompt_ids, new_ids, text = continuation(options.model, options.prompt, options.max_new_tokens)
    print(text)
    if options.expect is None:
        return 0
    expected = json.loads(options.expect.read_text())
    same = (prompt_ids, new_ids) == (expected["prompt_ids"], expected["new_ids"])
    print(f"\n{len(new_ids)} greedy fp32 tokens " +
          ("equal the training model's own" if same else
           f"differ from the training model's own:\n{prompt_ids} {new_ids}\n"
           f"{expected['prompt_ids']} {expected['new_ids']}"))
    return 0 if same else 1


if __name__ == "__main__":
    entry(main)
