"""The interface of the kernel: numbers, errnos, netlink, ioctls and namespaces."""
