"""A seccomp filter that answers chosen system calls with an errno, for programs that tests run."""

from __future__ import annotations

import ctypes
import platform
import struct

# asm/unistd.h
NUMBERS = {
    "x86_64": {
        "recvmmsg": 299,
        "recvfrom": 45,
        "recvmsg": 47,
        "getsockopt": 55,
        "epoll_ctl": 233,
        "timerfd_settime": 286,
        "readv": 19,
        "preadv2": 327,
        "pwritev2": 328,
        "sendmmsg": 307,
        "eventfd2": 290,
        "getsockname": 51,
        "timerfd_create": 283,
        "epoll_create1": 291,
        "epoll_wait": 232,
        "unshare": 272,
        "setns": 308,
        "mount": 165,
        "bpf": 321,
        "perf_event_open": 298,
        "ppoll": 271,
    },
    "aarch64": {
        "recvmmsg": 243,
        "recvfrom": 207,
        "recvmsg": 212,
        "getsockopt": 209,
        "epoll_ctl": 21,
        "timerfd_settime": 86,
        "readv": 65,
        "preadv2": 286,
        "pwritev2": 287,
        "sendmmsg": 269,
        "eventfd2": 19,
        "getsockname": 204,
        "timerfd_create": 85,
        "epoll_create1": 20,
        "unshare": 97,
        "setns": 268,
        "mount": 40,
        "bpf": 280,
        "perf_event_open": 241,
        "epoll_wait": 22,  # epoll_pwait, which the C library calls instead
        "ppoll": 73,
    },
}

# linux/prctl.h, linux/seccomp.h, linux/filter.h
PR_SET_SECCOMP = 22
PR_SET_NO_NEW_PRIVS = 38
SECCOMP_MODE_FILTER = 2
SECCOMP_RET_ERRNO = 0x00050000
SECCOMP_RET_ALLOW = 0x7FFF0000
LOAD_WORD = 0x20  # BPF_LD | BPF_W | BPF_ABS, at 0: the system call's number
JUMP_IF_EQUAL = 0x15  # BPF_JMP | BPF_JEQ | BPF_K
RETURN = 0x06  # BPF_RET | BPF_K


def deny(error: int, *calls: str) -> None:
    """Make these system calls fail with `error`, in this process, from now on."""
    numbers = [NUMBERS[platform.machine()][call] for call in calls]
    code = [(LOAD_WORD, 0, 0, 0)]
    code += [(JUMP_IF_EQUAL, len(numbers) - place, 0, number) for place, number in enumerate(numbers)]
    code += [(RETURN, 0, 0, SECCOMP_RET_ALLOW), (RETURN, 0, 0, SECCOMP_RET_ERRNO | error)]
    program = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *step) for step in code))
    described = ctypes.create_string_buffer(struct.pack("=H6xQ", len(code), ctypes.addressof(program)))
    prctl = ctypes.CDLL(None, use_errno=True).prctl
    assert prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0
    assert prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, described, 0, 0) == 0
