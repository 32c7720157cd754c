"""The meaning of errnos."""

from __future__ import annotations

import errno

# Errors from seccomp filters. Those of containers return EPERM, or ENOSYS for system calls that they do not know, as the kernel
# does. Those of systemd return the errno of their unit.
FORBIDDEN = frozenset({errno.EPERM, errno.ENOSYS, errno.EACCES})
# The kernel, or a seccomp filter, refuses the mechanism itself.
REFUSED = FORBIDDEN | {errno.ENOTSOCK, errno.EOPNOTSUPP}
# Errors of preadv2(2) if a driver, the kernel or a seccomp filter does not support RWF_NOWAIT.
NOWAIT_UNKNOWN = FORBIDDEN | {errno.EOPNOTSUPP}
# The same while the mechanism is set up. Then also: no memory for it, or a kernel that lacks it.
UNAVAILABLE = REFUSED | {errno.ENOMEM, errno.EINVAL, errno.ENOPROTOOPT}
# A TAP or TUN queue whose device was deleted: EFAULT from a read that was waiting, EBADFD from then on.
QUEUE_GONE = frozenset({errno.EBADFD, errno.EFAULT})
INTERFACE_GONE = frozenset({errno.ENODEV, errno.ENXIO})
# Errors after which reception goes on: memory pressure, and errors of packets that the same socket sent (ICMP errors on UDP;
# ECONNRESET on a seqpacket socket whose peer closed with unread data).
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
