"""A checkpoint leaves, as a folder that Hugging Face tools read, and comes back.

    checkpoints                          a checkpoint of any kind: what it is, and its tensors, one at a time
    reader, chunks                       torch_dist
    legacy, saved_file                   Megatron-LM's former format
    megatron_args                        what Megatron-LM's arguments say, where there is no run.json
    shape, names, weights                which tensor becomes which, and how, in both directions
    tokenizer_files, sentencepiece_json  the tokenizer, with the ids that the model was trained on
    hf, hf_config, hf_reader             safetensors and config.json, streamed
    convert, ahead, card                 one checkpoint to one folder
    verify, forward                      whether that folder is what it should be
    to_megatron, torch_dist_writer       one folder to one checkpoint
    batch, batch_config, choose, jobs    many, chosen by the tokens they have seen

Nothing here needs a GPU, a process group or the training code.
"""

EXPORT_FILE = "export.json"
"""In each folder that a conversion makes: from which iteration, and from what."""
