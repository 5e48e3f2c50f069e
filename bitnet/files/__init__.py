"""Weights on disk: checkpoints, our packed file, Hugging Face folders and GGUF files.

    source.py                      the Source protocol: a model that is read tensor by tensor
    tensors.py                     names, shapes and sizes of a model's tensors
    packed_layout.py, packed.py    our packed file: its content, reading and writing it
    checkpoint.py                  saves of a run
    hf/, gguf/                     other tools' formats, each read as a Source and written from one
    opening.py                     from a path or hub name to a Source
    importing.py, exporting.py     from any Source to a packed file, or to another tool's format

json_file.py, safetensors_file.py, sentencepiece_model.py and ternary.py hold the containers and byte layouts below.
"""
