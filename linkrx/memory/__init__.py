"""The layout of frames and of their metadata in memory."""
