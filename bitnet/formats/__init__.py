"""Doors to other tools: Hugging Face folders and GGUF files, in and out.

    Source (source.py)   a model read tensor by tensor: our runs and packed files, HF folders, GGUF files
    writers              our packed file (packing.py), HF folders (hf_export.py), GGUF files (gguf_export.py)

Every source goes with every writer. Nothing outside this folder imports it but the command line.
"""
