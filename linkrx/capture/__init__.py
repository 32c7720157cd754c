"""Capture files out: what was received, recorded."""
