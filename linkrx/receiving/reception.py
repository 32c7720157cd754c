"""The rare parts of receiving: building and replacing mechanisms, the meaning of an errno, ends, links, polling, counters.

Its base class, the receiver (`_core/types/receive.c` or `linkrx.receiving.plain_receiver`), fills, classifies, waits and hands
over. It calls the methods here that receive.c lists.
"""

from __future__ import annotations

import errno
import logging
import os
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from typing import NoReturn

from linkrx.backend import Backend, Mechanism, ReceiveConfig
from linkrx.choice import Choice
from linkrx.errors import Busy, Closed, DamagedCapture, Ended, LinkrxError
from linkrx.kernel.errnos import INTERFACE_GONE, QUEUE_GONE, REFUSED, TRANSIENT, UNAVAILABLE
from linkrx.memory.columns import Descriptors
from linkrx.memory.counters import new_counters
from linkrx.packets import Deliver, Owner
from linkrx.packets.headers import MALFORMED
from linkrx.receiving.drops import DropWatch
from linkrx.receiving.filtering import SourceFilter
from linkrx.receiving.ladder import following, warn_cut
from linkrx.receiving.receiver import Receiver
from linkrx.receiving.sending import refusal, way_to_send
from linkrx.receiving.stats import End, Tally
from linkrx.receiving.wakeup import Wakeup
from linkrx.sources.file_filter import FilePrograms
from linkrx.sources.resolve import Settings
from linkrx.sources.source import LinkState, Source
from linkrx.stages.segmenting import SEGMENT_ROWS, Segmenting

logger = logging.getLogger("linkrx")

# Seconds for which a source that is readable, but has nothing to read, is taken out of the poll set.
_PAUSE = 0.01
# Seconds between two checks whether the receiving thread has taken the filter.
_LOOK_AGAIN = 0.001

# Bytes that a fill may need for the largest packet beside its own: recvmmsg has two places for each packet.
_PLACE = 4096

# The packets of a queue whose length the kernel does not report. And the frames that one queued packet may stand for: a
# super-packet of 64 KiB with 512 bytes of payload in each frame. A queue whose length is in bytes holds fewer super-packets:
# with 64 bytes of payload in each frame, eight times as many frames as shortest packets.
FLUSH_MOST = 1 << 17
FLUSH_FRAMES, FLUSH_FRAMES_BY_BYTES = 128, 8

# The errno of Ended for each end, as a socket would give it.
_ENDED = {End.STOPPED: errno.ESHUTDOWN, End.EOF: errno.ESHUTDOWN, End.LINK_GONE: errno.ENODEV}


class Reception(Receiver):
    """One source, and the mechanism that reads it now."""

    def __init__(
        self,
        source: Source,
        settings: Settings,
        choice: Choice,
        backends: Mapping[str, type[Backend]],
        deliver: Deliver | None,
    ) -> None:
        self.source = source
        self.choice = choice
        self._backends = backends
        found, options, layout = settings.capabilities, settings.options, settings.layout
        self._framing = framing = settings.framing
        self._config = ReceiveConfig(source.fd, found, layout, framing, options, source.file)
        usual = SEGMENT_ROWS if options.segment else backends[choice.backend].batch_size
        rows = options.batch_size or usual
        self._descriptors = Descriptors(rows)
        self._report = self._descriptors.report
        self._room = max(backends[name].room(layout) for name in choice.ladder)
        self._counters = new_counters()
        self._drop_watch = DropWatch()
        self._end: End | None = None
        self._end_behind: End | None = None  # the end that follows what was received
        self._tally = Tally()
        self._rungs = len(choice.ladder)  # each demotion takes one of them
        self._forked = self._released = False
        self._source_filter = SourceFilter(source, settings)
        self._process = os.getpid()
        with ExitStack() as undo:
            self._wakeup = Wakeup(source.fd)
            undo.callback(self._wakeup.close)
            self._mechanism, self.choice = self._build(choice)
            undo.callback(self._mechanism.close)
            # Seconds for which packets are held back. A ring does that itself.
            self._coalescing = 0.0 if self._mechanism.coalesces else options.coalescing
            assert self._wakeup.event is not None
            self._prepare(
                deliver,
                self._descriptors.memory,
                rows,
                self._counters,
                self._room,
                framing.prefix,
                framing.packet_info_size,
                framing.link_header,
                framing.link_type,
                framing.per_packet,
                framing.vnet_header_size,
                not framing.vnet_little_endian,
                max(found.ifindex or 0, 0) if found.kind in ("packet", "packet_cooked") else 0,
                found.kind in ("unix_seqpacket", "pipe"),
                source.fd,
                self._wakeup.event.fd,
                self._wakeup.fileno(),
                self._coalescing,
                max(0, min(self._room // 2, self._room - layout.capacity - _PLACE)),
            )
            self._prepare_sending(way_to_send(source.fd, found))
            self._use(self._mechanism.native)
            chosen = backends[self.choice.backend]
            self._source_filter.open(self._run_filter, chosen, self._mechanism.readable_within)
            self._explain_filter()
            source.start(self._mechanism.joining)
            self._mechanism.start()
            if (state := source.link_state()) is LinkState.GONE:
                self._finish(End.LINK_GONE)
            elif state is LinkState.DOWN:
                self._watch_link(down=True)
            undo.pop_all()

    # Mechanisms in Python.

    def _fill(self, arena: Owner, room: int) -> int:
        """Let the mechanism fill. Its errno goes into the report, and is handled after the packets before it."""
        report, mechanism = self._report, self._mechanism
        report.held = 1  # until it is known, because an exception may come at any point
        try:
            count = mechanism.fill(arena, room)
        except OSError as error:
            if report.count or report.classified:  # nothing is called between the packets and the errno
                raise  # of a signal handler: errors of the kernel come without packets
            if error.errno is None:
                raise  # of a file object
            report.error = error.errno
            count = 0
        report.held = mechanism.held or mechanism.goes_on
        return report.count or count

    def _without_hangup(self, count: int) -> int:
        """Remove the zero lengths at the end of a receive if the peer has hung up. Returns how many packets are left.

        A record may be empty, so a zero length is the end only if the peer is gone and nothing is queued. At the end every read
        returns zero.
        """
        columns = self._descriptors.columns

        def is_empty(index: int) -> bool:
            return columns.lengths[index] == 0 and not columns.flags[index] & MALFORMED

        if is_empty(count - 1) and not self._mechanism.held and self.source.hung_up():
            while count and is_empty(count - 1):
                count -= 1
            self._report.count = count
            self._end_behind = End.EOF
            self._end_follows = True
        return count

    # Errors of the kernel.

    def _handle_error(self) -> None:
        """Handle the errno in the report: an end, a link down, a refused mechanism, nothing, or an exception.

        The errno stays in the report until it is handled, whatever exceptions come in between.
        """
        report, kind = self._report, self.source.capabilities.kind
        code = report.error
        gone = QUEUE_GONE if kind in ("tap", "tun") else INTERFACE_GONE
        failure = self._mechanism.explain(code)
        if failure is not None:
            try:
                raise failure
            finally:  # an exception of a signal handler here has the failure as its context
                report.error = 0
                if isinstance(failure, DamagedCapture):
                    self._finish(End.EOF)  # records behind the damage are not read
        if code in gone:
            self._finish(End.LINK_GONE)
        elif code == errno.ENODATA:
            self._finish(End.EOF)
        elif code == errno.ENETDOWN:
            self._watch_link(down=True)
            self._tally.link_downs += 1
        elif code == errno.EFBIG:
            self._outgrow()
        elif code in REFUSED:
            self._demote(OSError(code, os.strerror(code)))
        elif code == errno.EINVAL and self._framing.vnet_header_size:
            # A virtio-net header cannot describe super-packets of SCTP and of tunnels. The kernel dropped it.
            self._tally.indescribable += 1
        elif code == errno.EOWNERDEAD:
            report.error = 0
            raise RuntimeError(
                f"receiving from the {self.source.present.title}: the ring belongs to the parent process, and this child "
                "was forked without os.fork(). Open the source again here"
            )
        elif code not in TRANSIENT:
            report.error = 0
            raise self._failed(code)
        report.error = 0

    def _failed(self, code: int) -> OSError:
        which = f"{self.source.present.title} with {self.choice.backend}"
        return OSError(code, f"receiving from the {which}: {os.strerror(code)}")

    def _build(self, choice: Choice) -> tuple[Mechanism, Choice]:
        """The chosen backend, or the next one that the kernel does not refuse."""
        while True:
            chosen = self._backends[choice.backend]
            try:
                if not chosen.has_queue:
                    self.source.enlarge_queue()
                if self._config.options.segment:
                    return Segmenting(chosen, self._config, self._descriptors, self._framing), choice
                return chosen(self._config, self._descriptors), choice
            except OSError as error:
                if error.errno not in UNAVAILABLE:
                    raise
                choice = following(choice, error, self.source.present.title)

    def _outgrow(self) -> None:
        """Handle a frame that was cut because it is longer than a block of the ring: take the next backend, or warn once."""
        if len(self.choice.ladder) > 1:
            self._demote(OSError(errno.EFBIG, os.strerror(errno.EFBIG)))
        elif not self._tally.cut_warned:
            self._tally.cut_warned = True
            warn_cut(self.choice, self.source.present.title)

    def _demote(self, error: OSError) -> None:
        """Go on with the next backend. Packets that come while a ring is removed are lost. A refused call loses none."""
        refused = self._mechanism
        self._copy_held()  # may raise MemoryError, which changes nothing
        mechanism, choice = self._build(following(self.choice, error, self.source.present.title))
        native = mechanism.native
        self._descriptors.clear()  # the errno too, and columns that the next backend does not write
        self._tally.ring_drops += refused.drops()
        # Nothing may raise between these assignments: the receiver would keep a closed mechanism.
        self._mechanism, self.choice = mechanism, choice
        self._use(native)
        refused.close()
        chosen = self._backends[choice.backend]
        self._source_filter.backend_changed(self._run_filter, chosen, mechanism.readable_within)
        self._explain_filter()

    def _run_filter(self, program: bytes | FilePrograms, tags: bool, seconds: float) -> None:
        done = self._set_filter(program, tags, seconds)
        while not done:  # another thread is receiving, and was woken
            time.sleep(_LOOK_AGAIN)
            done = self._exchange_filter()

    def _explain_filter(self) -> None:
        self.choice = replace(self.choice, filter=self._source_filter.explanation)

    def _watch_link(self, *, down: bool) -> None:
        self._wakeup.watch_link(down)
        self._link_down = down

    def _look_at_link(self) -> None:
        """Look at a link that is down: the kernel reports a deletion on a packet socket like any link that goes down."""
        self._wakeup.clear_timer()
        state = self.source.link_state()
        if state is LinkState.GONE:
            self._finish(End.LINK_GONE)
        elif state is LinkState.UP:
            self._watch_link(down=False)

    def _look_at_owner(self) -> None:
        """Raise OSError if the owner of a borrowed descriptor has closed it. Called while nothing comes."""
        if self.source.is_closed_by_owner():
            raise self._failed(errno.EBADF)

    def _look_at_drops(self) -> float:
        watch = self._drop_watch
        if time.monotonic() >= watch.due:
            watch.look(self._drops, self.source.present)
        return max(0.0, watch.due - time.monotonic())

    # Ends.

    def _over(self) -> bool:
        """Whether reception is over. A stop drops pending packets; any other end comes after them."""
        if self._end is None:
            if self._stopping:
                self._finish(End.STOPPED)
            elif self._end_behind is not None and not self._left and not self._is_cut_short():
                self._finish(self._end_behind)
        return self._end is not None

    def _is_cut_short(self) -> bool:
        """Whether an exception came between receiving packets and making a batch of them."""
        report = self._report
        return report.count > 0 or report.held_back > 0 or report.classified > 0

    def _flush_limits(self) -> tuple[int, float]:
        """The limits of a flush: the packets that the queue may hold, and the seconds until the last of them can be read."""
        mechanism = self._mechanism
        queue = mechanism.queue_limit or self.source.queue_limit() or FLUSH_MOST
        if self._config.options.segment:
            queue *= FLUSH_FRAMES_BY_BYTES if self.source.capabilities.socket else FLUSH_FRAMES
        return queue + self._descriptors.rows, mechanism.readable_within

    def _finish(self, end: End) -> None:
        # Frames that the backend received and that were not classified count as undelivered.
        undelivered = self._mechanism.held + self._report.count + self._report.held_back
        event = self._wakeup.event
        if event is not None:
            event.set()  # wakes pollers
        self._drop()
        self._tally.undelivered = undelivered
        self._end = end
        self._ended = True

    def _raise_ended(self) -> NoReturn:
        end = self._end or End.STOPPED
        raise Ended(_ENDED[end], f"reception is over: {end.value}")

    def _without_deliver(self) -> NoReturn:
        raise LinkrxError(
            "nothing to deliver to: pass deliver= to linkrx.open, or iterate over the dispatcher"
        )

    def _refuse(self, same_thread: bool) -> NoReturn:
        self._check_open()
        if not same_thread:
            raise Busy(
                "another thread is receiving, and a dispatcher belongs to one thread at a time: only stop(), close(), send(), "
                "send_batch(), set_filter() and stats() are for all"
            )
        where = (
            "inside deliver"
            if self._delivering
            else "a signal handler or finalizer while the same thread is receiving"
        )
        raise Busy(
            f"receiving from {where}: there, only stop(), close(), send(), send_batch(), set_filter() and stats() may be called"
        )

    def _refuse_send(self, code: int, length: int) -> NoReturn:
        self._check_open()
        raise refusal(code, length, self.source.present) from None

    def _notice_fork(self) -> None:
        """Notice a fork that os.register_at_fork() missed, because C code called fork()."""
        if not self._forked and os.getpid() != self._process:
            self._disown()

    def _check_open(self) -> None:
        self._notice_fork()
        if self._closed:
            raise self._why_closed()

    def _why_closed(self) -> Closed:
        if self._forked:
            return Closed(
                "this dispatcher belongs to the parent process: after fork() a child may only close() it"
            )
        return Closed("this dispatcher was closed: linkrx.open makes a new one")

    def _disown(self) -> None:
        """Release everything that a forked child shares with its parent."""
        self._forked = self._closed = self._stopping = True
        self._wakeup.event = None
        self._mechanism.leave_to_parent()
        self.source.leave_to_parent()

    def _release_all(self) -> None:
        """Release everything. In a forked child nothing is restored, because the parent still uses it.

        If an exception interrupts it, the next call goes on.
        """
        if not self._forked:
            self._over()  # finishes a pending stop, which counts the packets of the backend
        all_copied = self._release()
        try:
            if self._forked:
                self._mechanism.abandon()
            else:
                self._mechanism.held_by_others = not all_copied
                self._mechanism.close()
        finally:
            self._wakeup.close()
            if self._forked:
                self.source.abandon()
            else:
                self.source.close()
        self._released = True  # last, so that close() can be called again after an exception

    # Polling.

    def _resume_source(self) -> None:
        if not self._quiet:
            self._wakeup.resume_source()
        self._source_paused = not (self._quiet or self._wakeup.registered)

    def _pause_source(self) -> None:
        """Take a source out of the poll set for a while that is readable, but has nothing to read."""
        if self._wakeup.wait(0):
            self._source_paused = True
            self._wakeup.pause_source(_PAUSE)

    def _sleep_until_flushed(self, seconds: float) -> bool:
        """Make the polled descriptor unreadable until then, but for packets, other ends, and a stop()."""
        return self._wakeup.call_after(seconds, lambda: self._stopping)

    def _disarm(self) -> None:
        """The caller that polls has seen the end: make the descriptor unreadable for good."""
        self._quiet = True  # first: stop() reads it after it sets the event
        self._wakeup.disarm()

    def _set_readable(self) -> None:
        """Make fileno() readable while packets wait inside linkrx."""
        event = self._wakeup.event
        if event is None:
            return
        waiting = self._has_something
        if waiting:
            event.set()
        else:
            event.clear(lambda: self._stopping)
        self._readable = waiting

    def _drops(self) -> int | None:
        drops = self.source.kernel_drops()
        return None if drops is None else drops + self._mechanism.drops() + self._tally.ring_drops
