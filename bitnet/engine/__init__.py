"""Token ids in, token ids out: the base class of engines and its implementations."""
