"""A checkpoint leaves: one saved iteration becomes a folder that Hugging Face tools read.

    reader                               tensors of a torch_dist checkpoint, one at a time
    shape, names, weights                which tensor becomes which, and how
    tokenizer_files, sentencepiece_json  the tokenizer, with the ids that the model was trained on
    hf                                   config.json and safetensors, streamed
    convert                              one checkpoint to one folder
    batch, batch_config, choose          many, chosen by the tokens they have seen

Nothing here needs a GPU, a process group or the training code.
"""

EXPORT_FILE = "export.json"
"""In each folder that a conversion makes: from which iteration, and from what."""
