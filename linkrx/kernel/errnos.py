"""The meaning of an errno in place of packets."""

from __future__ import annotations

import errno

# The kernel, or a seccomp filter, refuses the mechanism itself.
REFUSED = frozenset({errno.ENOSYS, errno.EPERM, errno.ENOTSOCK, errno.EOPNOTSUPP})
# Also while it is set up: no memory for it, or a kernel that does not have it.
UNAVAILABLE = REFUSED | {errno.ENOMEM, errno.EINVAL, errno.ENOPROTOOPT}
# A TAP or TUN queue whose device was deleted: EFAULT from a read that was waiting, EBADFD from then on.
QUEUE_GONE = frozenset({errno.EBADFD, errno.EFAULT})
INTERFACE_GONE = frozenset({errno.ENODEV, errno.ENXIO})
# Reported once, then reception goes on: memory pressure, and what came back for packets that the same socket sent
# (ICMP errors on UDP; ECONNRESET on a seqpacket socket whose peer closed with our data unread).
TRANSIENT = frozenset(
    {
        errno.ENOBUFS,
        errno.ENOMEM,
        errno.ECONNREFUSED,
        errno.ECONNRESET,
        errno.EHOSTUNREACH,
        errno.ENETUNREACH,
        errno.EHOSTDOWN,
        errno.ENOPROTOOPT,
        errno.EPROTO,
        errno.EMSGSIZE,
    }
)
