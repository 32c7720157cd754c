"""Fuzzing of the C core: one harness for each file, and the inputs that together have its full coverage."""
