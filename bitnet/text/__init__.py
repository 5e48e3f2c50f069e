"""Text to token ids and back: one Tokenizer protocol and three implementations."""
