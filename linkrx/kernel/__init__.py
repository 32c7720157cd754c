"""What the kernel says and is told: its numbers, errnos, netlink, ioctls and namespaces."""
