"""What a wait waits on: the source, a stop or a wake from this process, and a timer while a link is down."""

from __future__ import annotations

import os
import select
from contextlib import suppress

from linkrx.kernel import libc

# How soon a deleted interface is noticed: the kernel says "down" first and then, on AF_PACKET, nothing more.
RECHECK_SECONDS = 0.02

# epoll_wait(2) takes milliseconds in an int; a longer wait is made of several.
_LONGEST_SLEEP = 3600.0


class EventFd:
    """An eventfd that is closed when nobody can write to it any more, never earlier.

    `stop()` may run in any thread while another closes the dispatcher. Were the descriptor closed under it, the
    write could land in a file that got the same number.
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

    def clear(self) -> None:
        """Make it unreadable."""
        with suppress(BlockingIOError):  # it was clear already
            os.eventfd_read(self.fd)

    def __del__(self) -> None:
        if hasattr(self, "fd"):
            os.close(self.fd)


class Timer:
    """A timerfd, closed with the last reference to it at the latest."""

    def __init__(self) -> None:
        self.fd = libc.timerfd()

    def set(self, interval: float | None) -> None:
        """Make it readable every `interval` seconds, or unreadable."""
        libc.set_timerfd(self.fd, interval or 0)

    def clear(self) -> None:
        """Make it unreadable until it fires again."""
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
    """One epoll instance over all that may end a wait. Its descriptor can itself be polled."""

    def __init__(self, source: int) -> None:
        self.event: EventFd | None = EventFd()
        self.source = source
        self.registered = True
        self._link_down = False
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
        """Sleep until something happens or the time is up. True if the source says it is readable."""
        bounded = None if timeout is None else min(timeout, _LONGEST_SLEEP)
        return any(fd == self.source for fd, _ in self._epoll.poll(bounded))

    def sleep(self, timeout: float) -> None:
        """Wait for the event alone, for example where a source is readable and a read finds nothing."""
        if self.event is not None:
            poll = select.poll()
            poll.register(self.event.fd, select.POLLIN)
            poll.poll(timeout * 1000)

    def pause_source(self, timeout: float) -> None:
        """Take such a source out of the epoll instance for `timeout` seconds."""
        if self.registered:
            self.registered = (
                False  # first: `resume_source` registers it again, also if it is still registered
            )
            self._epoll.unregister(self.source)
        self._timer.set(timeout)

    def disarm(self) -> None:
        """Make the descriptor unreadable for good."""
        if self.registered:
            with suppress(FileNotFoundError):  # an exception came in between
                self._epoll.unregister(self.source)
            self.registered = False
        self._timer.set(None)
        if self.event is not None:
            self.event.clear()

    def resume_source(self) -> None:
        """Register the source again after `pause_source`."""
        if not self.registered:
            with suppress(FileExistsError):  # an exception came in between, there or here
                self._epoll.register(self.source, select.EPOLLIN)
            self._timer.set(RECHECK_SECONDS if self._link_down else None)
            self.registered = True

    def watch_link(self, down: bool) -> None:
        """While a link is down, wake up regularly to see whether it still exists."""
        self._link_down = down
        self._timer.set(RECHECK_SECONDS if down else None)

    def clear_timer(self) -> None:
        """Make the timer unreadable until it fires again."""
        self._timer.clear()

    def close(self) -> None:
        """Idempotent. Takes nothing out of the epoll instance: after a fork the parent still uses it."""
        self._timer.close()
        self._epoll.close()
        self.event = None
