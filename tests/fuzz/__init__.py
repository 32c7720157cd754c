"""Fuzzing of the C core: one harness for each of its files, and the inputs that reached everything they reach."""
