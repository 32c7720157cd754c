"""Every error that linkrx raises on purpose. Each message says what was tried, what the kernel said, what to type next."""

from __future__ import annotations

import errno


class LinkrxError(Exception):
    """What all errors of linkrx have in common."""


class UnsupportedSource(LinkrxError, ValueError):
    """The source is of a kind that linkrx, or the named backend, does not receive from; or nothing can be sent out of it."""


class UnsupportedOption(LinkrxError, ValueError):
    """The source or the backend cannot honour an option, or the option contradicts what the probe found."""


class BackendUnavailable(LinkrxError, RuntimeError):
    """The backend does not exist, or this host cannot run it."""


class MissingPrivilege(LinkrxError, PermissionError):
    """The kernel refused a call for want of a capability.

    `capability` is its name as in capabilities(7); `remedy` is what to type.
    """

    def __init__(self, tried: str, capability: str, remedy: str, code: int | None = None) -> None:
        super().__init__(code or errno.EPERM, f"{tried} needs {capability}; {remedy}")
        self.capability = capability
        self.remedy = remedy


class Closed(LinkrxError, ValueError):
    """The dispatcher was closed, or belongs to the process that forked this one.

    A ValueError as well, as `selectors` expects of what has no descriptor any more.
    """


class Ended(LinkrxError, OSError, EOFError):
    """recv() behind the end: `end` of the dispatcher says why.

    An OSError as well, with the errno that a socket would give (ENODEV for a deleted device, else ESHUTDOWN), and an
    EOFError: loops that were written for either stop.
    """


class Busy(LinkrxError, RuntimeError):
    """Another thread, or the caller's own `deliver`, is inside the dispatcher already."""


class DamagedCapture(LinkrxError, OSError):
    """A capture file is cut or damaged. What was whole in front of that place was delivered; nothing behind it is.

    `offset` is the byte in the file at which the record begins that is not whole; of a compressed file, the byte in what it
    holds. As an OSError it has the errno EBADMSG.
    """

    def __init__(self, name: str, offset: int, what: str) -> None:
        super().__init__(errno.EBADMSG, f"{name} is damaged at byte {offset}: {what}")
        self.offset = offset


class RecordingFailed(LinkrxError, OSError):
    """A capture file could not take what was to be recorded: the errno is the kernel's.

    `packets` is how many are whole in the file. Of a regular file nothing follows them; in a pipe there may be the beginning of a
    record, `torn` bytes of it.
    """

    def __init__(self, name: str, error: OSError, packets: int, torn: int) -> None:
        cut = f", and {torn} bytes of the next record" if torn else ""
        why = error.strerror or str(error)
        super().__init__(
            error.errno or errno.EIO, f"recording to {name}: {why}; {packets} packets are whole there{cut}"
        )
        self.packets = packets
        self.torn = torn
