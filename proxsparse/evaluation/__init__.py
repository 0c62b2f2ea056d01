"""Perplexity, zero-shot tasks, and the report of a run."""
