"""What happens to received frames before they are packets: classification and segmentation."""
