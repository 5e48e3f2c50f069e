"""The small pretrained model that is included; what it is and how it was made: models/README.md."""

from pathlib import Path

BOOKS = Path(__file__).parent / "models" / "books.safetensors"
