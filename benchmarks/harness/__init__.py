"""lm-evaluation-harness on our engines."""
