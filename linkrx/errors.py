"""The errors of linkrx. Each message says what was tried, what the kernel answered, and what to type next."""

from __future__ import annotations

import errno


class LinkrxError(Exception):
    """The base class of all errors of linkrx. They can be pickled, as pools of processes do."""

    def __reduce__(self) -> tuple[object, ...]:
        return _restored, (type(self), self.args, vars(self))


def _restored(
    kind: type[LinkrxError], args: tuple[object, ...], attributes: dict[str, object]
) -> LinkrxError:
    """An error from its pickle. The arguments are those of its class in Python, not of its own __init__."""
    error = kind.__new__(kind, *args)
    super(LinkrxError, error).__init__(*args)
    vars(error).update(attributes)
    return error


class UnsupportedSource(LinkrxError, ValueError):
    """linkrx, or the named backend, cannot receive from such a source, or cannot send through it."""


class UnsupportedOption(LinkrxError, ValueError):
    """The source or the backend cannot honour an option, or the option contradicts the result of probing."""


class BackendUnavailable(LinkrxError, RuntimeError):
    """The backend does not exist, or this host cannot run it."""


class MissingPrivilege(LinkrxError, PermissionError):
    """The kernel refused a call because the process lacks a capability.

    `capability` is its name as in capabilities(7); `remedy` is what to type.
    """

    def __init__(self, tried: str, capability: str, remedy: str, code: int | None = None) -> None:
        super().__init__(code or errno.EPERM, f"{tried} needs {capability}; {remedy}")
        self.capability = capability
        self.remedy = remedy


class Closed(LinkrxError, ValueError):
    """The dispatcher was closed, or belongs to the process that forked this one.

    Also a ValueError, which `selectors` expects of an object without a descriptor.
    """


class Ended(LinkrxError, OSError, EOFError):
    """recv() after the end of reception. `Dispatcher.end` says why it ended.

    Also an OSError, with the errno that a socket would give (ENODEV for a deleted device, else ESHUTDOWN), and an EOFError, so
    that loops written for sockets or files stop.
    """


class Busy(LinkrxError, RuntimeError):
    """Another thread is receiving, or the call comes from inside `deliver`."""


class DamagedCapture(LinkrxError, OSError):
    """A capture file is truncated or damaged. The records before the damage were delivered; later ones are not.

    `offset` is the byte at which the damaged record begins. In a compressed file it counts decompressed bytes. Also an OSError,
    with the errno EBADMSG.
    """

    def __init__(self, name: str, offset: int, what: str) -> None:
        super().__init__(errno.EBADMSG, f"{name} is damaged at byte {offset}: {what}")
        self.offset = offset


class RecordingFailed(LinkrxError, OSError):
    """Writing to a capture file failed, with the kernel's errno.

    The file has `packets` whole packets. A regular file ends after them. A pipe may have got `torn` bytes of one more record.
    """

    def __init__(self, name: str, error: OSError, packets: int, torn: int) -> None:
        cut = f", and {torn} bytes of the next record" if torn else ""
        why = error.strerror or str(error)
        super().__init__(
            error.errno or errno.EIO, f"recording to {name}: {why}; {packets} packets are whole there{cut}"
        )
        self.packets = packets
        self.torn = torn
