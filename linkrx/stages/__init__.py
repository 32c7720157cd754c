"""The steps from received frames to packets: segmentation and classification."""
