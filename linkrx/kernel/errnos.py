"""The meaning of an errno in place of packets."""

from __future__ import annotations

import errno

# What seccomp filters answer: those of containers the first, for system calls that they do not know, or that the kernel lacks,
# the second, and systemd's whatever their unit says.
FORBIDDEN = frozenset({errno.EPERM, errno.ENOSYS, errno.EACCES})
# The kernel, or a seccomp filter, refuses the mechanism itself.
REFUSED = FORBIDDEN | {errno.ENOTSOCK, errno.EOPNOTSUPP}
# What preadv2(2) answers where a driver, the kernel, or a seccomp filter does not have RWF_NOWAIT.
NOWAIT_UNKNOWN = FORBIDDEN | {errno.EOPNOTSUPP}
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
