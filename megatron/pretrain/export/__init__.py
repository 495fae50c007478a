"""A checkpoint leaves, as a folder that Hugging Face tools read, and comes back.

    checkpoints                          a checkpoint of any kind: what it is, and where its tensors lie
    reader, dcp_index, chunks            torch_dist
    legacy, saved_file                   Megatron-LM's former format
    megatron_args                        what Megatron-LM's arguments say, where there is no run.json
    shape, names, weights                which tensor becomes which, and how, in both directions
    tokenizer_files, sentencepiece_json  the tokenizer, with the ids that the model was trained on
    hf, hf_config, hf_reader             safetensors and config.json
    stored, elements, copying            rows from file to file, in little memory
    convert, card                        one checkpoint to one folder
    verify, forward                      whether that folder is what it should be
    to_megatron, padding                 one folder to one checkpoint
    torch_dist_writer, archive, pickles  how that is written
    batch, batch_config, choose, jobs    many, chosen by the tokens they have seen

Nothing here needs a GPU, a process group or the training code. Only `verify` and `forward`, which compute,
load torch: that takes longer than to copy gigabytes.
"""

EXPORT_FILE = "export.json"
"""In each folder that a conversion makes: from which iteration, and from what."""
