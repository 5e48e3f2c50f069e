"""Weights on disk: checkpoints, our packed file, Hugging Face folders and GGUF files.

    Source (source.py)   a model read tensor by tensor: our runs and packed files, HF folders, GGUF files
    writers              packed files (packed.py, importing.py), HF folders (hf/export.py), GGUF (gguf/export.py)

Every source goes with every writer.
"""
