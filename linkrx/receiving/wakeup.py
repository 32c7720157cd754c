"""The descriptors that end a wait: the source, an eventfd that this process sets, and a timer while a link is down."""

from __future__ import annotations

import errno
import logging
import os
import select
from collections.abc import Callable
from contextlib import suppress

from linkrx.kernel import libc
from linkrx.kernel.errnos import REFUSED

logger = logging.getLogger("linkrx")

# Seconds until the deletion of an interface is noticed: on AF_PACKET the kernel reports "down", and then nothing more.
RECHECK_SECONDS = 0.02

# epoll_wait(2) takes milliseconds in an int; a longer wait is made of several.
_LONGEST_SLEEP = 3600.0
SHORTEST_CALL = 0.001  # a timer set to 0 never fires
# The longest wait while a link is down, as in receive.c, so that a deletion is noticed even if the kernel refuses to set the timer.
_LONGEST_LOOK = 0.04


class EventFd:
    """An eventfd that is closed with the last reference to it.

    `stop()` may write to it in one thread while another closes the dispatcher. If that closed the descriptor, the write could
    go to another file that got the same number.
    """

    def __init__(self) -> None:
        try:
            self.fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        except OSError as error:
            raise OSError(
                error.errno, f"eventfd(2), with which stop() ends a wait: {error.strerror}"
            ) from error

    def set(self) -> None:
        """Make it readable."""
        os.eventfd_write(self.fd, 1)

    def clear(self, stopping: Callable[[], bool] = bool) -> None:
        """Make it unreadable. If a stop comes meanwhile, it stays readable."""
        with suppress(BlockingIOError):  # it is clear already
            os.eventfd_read(self.fd)
        if stopping():
            self.set()

    def __del__(self) -> None:
        if hasattr(self, "fd"):
            os.close(self.fd)


class Timer:
    """A timerfd, closed with the last reference to it at the latest. One that is closed never fires."""

    def __init__(self) -> None:
        self.fd = libc.timerfd()

    def set(self, interval: float | None) -> None:
        """Make it readable every `interval` seconds, or unreadable."""
        if self.fd >= 0:
            libc.set_timerfd(self.fd, interval or 0)

    def clear(self) -> None:
        """Make it unreadable until it fires again."""
        if self.fd >= 0:
            with suppress(BlockingIOError):  # it had not fired
                os.read(self.fd, 8)

    def close(self) -> None:
        """Idempotent."""
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)

    def __del__(self) -> None:
        if hasattr(self, "fd"):
            self.close()


def _epoll() -> select.epoll:
    try:
        return select.epoll()
    except OSError as error:
        raise OSError(error.errno, f"epoll_create1(2), on which a wait sleeps: {error.strerror}") from error


class Wakeup:
    """One epoll instance with these descriptors. It can itself be polled."""

    def __init__(self, source: int) -> None:
        self.event: EventFd | None = EventFd()
        self.source = source
        self.registered = True
        self._link_down = False
        self._warned: set[str] = set()  # the refused system calls that were reported
        self._epoll = _epoll()
        self._timer = Timer()
        try:
            self._epoll.register(self.event.fd, select.EPOLLIN)
            self._epoll.register(source, select.EPOLLIN)
            self._epoll.register(self._timer.fd, select.EPOLLIN)
        except BaseException:
            self._timer.close()
            self._epoll.close()
            raise

    def fileno(self) -> int:
        """Readable when a wait would return at once."""
        return self._epoll.fileno()

    def wait(self, timeout: float | None) -> bool:
        """Sleep until a descriptor is readable, or `timeout` seconds. True if the source is readable."""
        longest = _LONGEST_LOOK if self._link_down else _LONGEST_SLEEP
        bounded = longest if timeout is None else min(timeout, longest)
        try:
            return any(fd == self.source for fd, _ in self._epoll.poll(bounded))
        except OSError as error:
            if error.errno not in REFUSED:
                raise
            return self.poll(bounded, self.source)

    def sleep(self, timeout: float) -> bool:
        """Sleep on the event only, for a source that is readable already. True if the event is set."""
        return self.event is not None and self.poll(timeout, self.event.fd)

    def poll(self, timeout: float, *sources: int) -> bool:
        """Sleep on the event and on `sources`. True if one of `sources` is ready."""
        poll = select.poll()
        for fd in (*sources, *([self.event.fd] if self.event is not None else [])):
            poll.register(fd, select.POLLIN)
        return any(fd in sources for fd, _ in poll.poll(timeout * 1000))

    def pause_source(self, timeout: float) -> None:
        """Take a source out of the poll set for `timeout` seconds. If the kernel refuses, it stays in."""
        if self.registered:
            self.registered = False  # first: after an exception `resume_source` adds it again
            if not (self._set_timer(timeout) and self._take_out()):
                self._watch()

    def disarm(self) -> None:
        """Make the descriptor unreadable for good."""
        if self.registered:
            self._take_out()
            self.registered = False
        self._set_timer(None)
        if self.event is not None:
            self.event.clear()

    def resume_source(self) -> None:
        """Add the source to the poll set again. If the kernel refuses, the timer goes on making the descriptor readable."""
        if not self.registered:
            try:
                self._epoll.register(self.source, select.EPOLLIN)
            except FileExistsError:  # an exception interrupted this function, or `pause_source`
                pass
            except OSError as error:
                self._warn_refused("epoll_ctl(2)", error, "linkrx reads the source every 10 ms instead")
                self._timer.clear()
                return
            self._watch()

    def _watch(self) -> None:
        self._set_timer(RECHECK_SECONDS if self._link_down else None)
        self.registered = True

    def _take_out(self) -> bool:
        """Remove the source from the poll set. False if the kernel refuses."""
        try:
            self._epoll.unregister(self.source)
        except FileNotFoundError:  # an exception came after the first call
            pass
        except OSError as error:
            self._warn_refused(
                "epoll_ctl(2)",
                error,
                "fileno() stays readable while the source is readable but has nothing to read",
            )
            return False
        return True

    def _set_timer(self, interval: float | None) -> bool:
        """Set the timer. If the kernel refuses, close it and return False: a timer that cannot be stopped would wake pollers for ever."""
        try:
            self._timer.set(interval)
        except OSError as error:
            self._timer.close()
            self._warn_refused(
                "timerfd_settime(2)",
                error,
                "fileno() does not become readable when an interface is deleted while it is down",
            )
        return self._timer.fd >= 0

    def _warn_refused(self, call: str, error: OSError, consequence: str) -> None:
        """Log a refused system call once. Raises the error if it is no refusal."""
        code = error.errno or 0
        if code not in REFUSED:
            raise error
        if call not in self._warned:
            self._warned.add(call)
            logger.warning(
                "%s is refused now, but was allowed when the source was opened: %s (%s), as from a seccomp filter. %s. Change the "
                "filter to allow it",
                call,
                os.strerror(code),
                errno.errorcode[code],
                consequence,
            )

    def watch_link(self, down: bool) -> None:
        """While a link is down, end waits every RECHECK_SECONDS, so that its deletion is noticed."""
        self._link_down = down
        self._set_timer(RECHECK_SECONDS if down else None)

    def call_after(self, seconds: float, stopping: Callable[[], bool]) -> bool:
        """Make the descriptor unreadable for `seconds`, or until the next check of a link that is down. False if the kernel refuses."""
        refused = self._timer.fd < 0 if self._link_down else not self._set_timer(max(seconds, SHORTEST_CALL))
        if self.event is None or refused:
            return False
        self.event.clear(stopping)
        return True

    def clear_timer(self) -> None:
        """Make the timer unreadable until it fires again."""
        self._timer.clear()

    def close(self) -> None:
        """Idempotent. Unregisters nothing: after a fork the parent uses the same epoll instance."""
        self._timer.close()
        self._epoll.close()
        self.event = None
