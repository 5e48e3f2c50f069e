"""Token ids in, token ids out: the protocol of an engine and its implementations."""
