"""The inner half of the loop: wait, receive, classify, count, and know when it is over. Written once, for all backends."""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Mapping
from contextlib import ExitStack
from time import monotonic
from typing import Any

from linkrx import stats
from linkrx.backend import Backend, Mechanism, Receive
from linkrx.buffers import Layout
from linkrx.choice import Choice
from linkrx.classify import classifier
from linkrx.columns import CLASSIFIED, COUNT, ERROR, ROW_BYTES, Descriptors, align
from linkrx.deadline import deadline_after, seconds_left
from linkrx.dropwatch import DropWatch
from linkrx.errnos import INTERFACE_GONE, PASSING, QUEUE_GONE, REFUSED, UNAVAILABLE
from linkrx.errors import BackendUnavailable
from linkrx.headers import MALFORMED
from linkrx.options import Options
from linkrx.packets import ARENA_BYTES, ARENA_START, Owner, Receiver
from linkrx.segmenting import SEGMENT_ROWS, Segmenting
from linkrx.source import LinkState, Source
from linkrx.stats import BYTES, CUT, EMPTY, PACKETS, RUNTS, UNKNOWN_PROTOCOL, End, Stats, Tally, new_counters
from linkrx.wakeup import Wakeup

logger = logging.getLogger("linkrx")

# A source that gives nothing but errors must not keep the caller from looking at the clock.
_ERRORS_IN_A_ROW = 8

# A source that says it is readable this often in a row and yields nothing, as a datagram socket does that was shut
# down for reading, is from then on asked every _REST seconds only, by waits here and by those who poll.
_IDLE_WAKES = 8
_REST = 0.01


class Reception:
    """One source, the backend that reads it now, and the packets that wait to be handed over, in `receiver`.

    An exception between any two steps, Ctrl-C included, neither loses a packet nor hands one over twice: how far a receive
    came is told by the descriptors' header, and each step of the receiver is one call that is done or not done.
    """

    def __init__(
        self,
        source: Source,
        options: Options,
        choice: Choice,
        backends: Mapping[str, type[Backend]],
        claims: dict[str, Any],
    ) -> None:
        """While there is anything in `claims`, somebody receives."""
        self.source = source
        self.choice = choice
        self._backends = backends
        self.framing = framing = options.framing(source.capabilities)
        layout = Layout.of(source.capabilities.largest_frame, framing.prefix, options.buffer_sizes)
        self._facts = Receive(source.fd, source.capabilities, layout, options)
        usual = SEGMENT_ROWS if options.segment else backends[choice.backend].batch_size
        rows = options.batch_size or usual
        self._descriptors = Descriptors(rows)
        self._header = self._descriptors.header
        # A backend reads one byte more than it keeps, to see whether a packet was cut.
        self._room = ARENA_BYTES + align(layout.capacity + 1)
        self.receiver = Receiver(
            self._descriptors.memory,
            ARENA_START + self._room + align(ROW_BYTES * rows),
            claims,
            framing.link_header,
            framing.vnet_header_size,
            not framing.vnet_little_endian,
        )
        self._counters = new_counters()
        self._may_hang_up = source.capabilities.kind in ("unix_seqpacket", "pipe")
        found = source.capabilities
        self._classify = classifier(
            self._descriptors,
            framing,
            self._counters,
            interface=(found.ifindex or 0) if found.kind in ("packet", "packet_cooked") else 0,
            at_once=not self._may_hang_up,
        )
        self._drop_watch = DropWatch(source.capabilities)

        self.end: End | None = None
        self._end_behind: End | None = None  # the end that follows the pending batch
        # Apart: an instance with more than thirty attributes looks each of them up in a dictionary of its own.
        self._tally = Tally()
        self._rungs = len(choice.ladder)  # of which each demotion takes one
        self._link_down = False
        self.polled = False
        self._shown: bool | None = False  # whether `show_pending` made the polled descriptor readable
        self._vain = 0  # drains in a row that an event loop made for nothing

        with ExitStack() as undo:
            self._wakeup = Wakeup(source.fd)
            undo.callback(self._wakeup.close)
            self._mechanism, self.choice = self._build(choice)
            undo.callback(self._mechanism.close)
            source.start()
            self._mechanism.start()
            if source.link_state() is not LinkState.UP:
                self._watch_link(down=True)
            undo.pop_all()

    # The next batch.

    def await_batch(self, timeout: float | None) -> bool:
        """See that packets wait in the receiver, for `timeout` seconds at most. False when the time is up or it is over.

        False also after a receive that held no packet, only runts and their like: a flood of those must not keep
        the caller from looking at the clock.
        """
        if self.receiver.left:
            return not self.over()
        idle = 0
        # What need not be called is not: whoever receives has the kernel's work in its caches, and not this.
        deadline = None if timeout is None else deadline_after(timeout)
        if not self._wakeup.listening:
            self._wakeup.listen()
        # As `over()` sees it, which is only called where there is something to see.
        while (
            self.end is None and not self.receiver.stopping and self._end_behind is None
        ) or not self.over():
            known_down = self._link_down and not self._header[ERROR]
            if self._receive():
                self._vain = 0
                if monotonic() >= self._drop_watch.due:
                    self._drop_watch.look(self._drops)
                return self.receiver.left > 0
            if known_down:  # not when it is told only now: that comes before what was queued
                self._look_at_link()
            if timeout == 0 and self.polled:
                self._vain += 1
                if self._vain > _IDLE_WAKES and self._wakeup.wait(0):
                    self._wakeup.look_away(_REST)
            if timeout == 0 or self.over():
                break
            left = seconds_left(deadline)
            if left == 0:
                break
            self.show_pending()  # nothing waits here now: the event must not end this wait at once
            self._tally.waits += 1
            if idle < _IDLE_WAKES:
                idle += self._wakeup.wait(left)
            else:
                self._wakeup.rest(_REST if left is None else min(_REST, left))
        return False

    def over(self) -> bool:
        """Whether nothing more will be handed over. A stop wins over packets that wait, any other end follows them."""
        if self.end is None:
            if self.receiver.stopping:
                self._finish(End.STOPPED)
            elif self._end_behind is not None and not self.receiver.left and not self._is_cut_short():
                self._finish(self._end_behind)
        return self.end is not None

    def _is_cut_short(self) -> bool:
        """Whether an exception came between receiving packets and making a batch of them."""
        return self._header[COUNT] > 0 or self._header[CLASSIFIED] > 0

    def _receive(self) -> bool:
        """Fill and classify once. True if anything was received, packet or not.

        The header tells how far a round came that an exception cut short. The receiver gives the same arena until what is in
        it was taken in.
        """
        header, arena = self._header, self.receiver.arena()
        count = header[COUNT] or (0 if header[CLASSIFIED] else self._fill(arena))
        if not header[CLASSIFIED]:
            if self._may_hang_up:
                count = self._without_hangup(count)
            if not count:
                return False
            self._classify(arena, count)
        self.receiver.take_in(self._mechanism.owner or arena)
        return True

    def _fill(self, arena: Owner) -> int:
        """Ask the backend, and once more behind each error that is no end: packets may wait behind it."""
        header = self._header
        for _ in range(_ERRORS_IN_A_ROW):
            count, told = 0, None
            if not header[ERROR] or self._mechanism.held:
                try:
                    count = self._mechanism.fill(arena, self._room)
                except OSError as error:
                    if header[COUNT] or header[CLASSIFIED]:
                        raise  # a signal handler's: the kernel's comes without packets
                    header[ERROR] = error.errno or errno.EIO
                    told = error
            if count or not header[ERROR]:
                return count
            self._weigh(told)
            if self.end is not None:
                break
        return 0

    def _without_hangup(self, count: int) -> int:
        """Take from the end of a receive the zero lengths that say the peer has hung up.

        A record may be empty, so a zero is the end only if the peer is gone and nothing is queued behind it. At the
        end every read returns zero, for ever.
        """
        columns = self._descriptors.columns

        def is_empty(index: int) -> bool:
            return columns.lengths[index] == 0 and not columns.flags[index] & MALFORMED

        if count and is_empty(count - 1) and not self._mechanism.held and self.source.hung_up():
            while count and is_empty(count - 1):
                count -= 1
            self._header[COUNT] = count
            self._end_behind = End.EOF
        return count

    # What the kernel says instead of packets.

    def _weigh(self, told: OSError | None) -> None:
        """Decide what an error means: an end, a link down, a refused mechanism, nothing, or a failure to raise.

        It stays in the header until that is done, however often an exception comes in between.
        """
        header, kind = self._header, self.source.capabilities.kind
        code = header[ERROR]
        error = told or OSError(code, os.strerror(code))
        gone = QUEUE_GONE if kind in ("tap", "tun") else INTERFACE_GONE
        if code in gone:
            self._finish(End.LINK_GONE)
        elif code == errno.ENETDOWN:
            self._watch_link(down=True)
            self._tally.link_downs += 1
        elif code in REFUSED:
            self._demote(error)
        elif code == errno.EINVAL and self.framing.vnet_header_size:
            # A virtio-net header has no word for it: super-packets of SCTP and of tunnels. The kernel let go of it.
            self._tally.indescribable += 1
        elif code not in PASSING:
            failure = OSError(
                code,
                f"receiving from the {self.source.capabilities.title} with {self.choice.backend}: {error.strerror}",
            )
            header[ERROR] = 0
            raise failure from told
        header[ERROR] = 0

    def _build(self, choice: Choice) -> tuple[Mechanism, Choice]:
        """The chosen backend, or the first behind it on the ladder that the kernel does not refuse."""
        while True:
            chosen = self._backends[choice.backend]
            try:
                if not chosen.has_queue:
                    self.source.enlarge_queue()
                if self._facts.options.segment:
                    return Segmenting(chosen, self._facts, self._descriptors, self.framing), choice
                return chosen(self._facts, self._descriptors), choice
            except OSError as error:
                if error.errno not in UNAVAILABLE:
                    raise
                choice = self._next_choice(choice, error)

    def _demote(self, error: OSError) -> None:
        """Go on with the next backend. No packet is lost: a refused call has taken none."""
        refused = self._mechanism
        mechanism, choice = self._build(self._next_choice(self.choice, error))
        self._descriptors.clear()  # backends rely on columns that they never write
        # Both at once: an exception in between would have the next backend refused for what this one was.
        self._mechanism, self.choice = mechanism, choice
        refused.close()

    def _next_choice(self, choice: Choice, error: OSError) -> Choice:
        if len(choice.ladder) == 1:
            raise BackendUnavailable(
                f"{choice.backend} on the {self.source.capabilities.title}: the kernel answers {error.strerror} "
                f"({errno.errorcode.get(error.errno or 0, error.errno)}), and there is no other backend to take over"
            ) from error
        following = choice.demoted(f"refused at run time: {error.strerror}")
        logger.warning(
            "%s on the %s: the kernel answers %s; going on with %s",
            choice.backend,
            self.source.capabilities.title,
            error.strerror,
            following.backend,
        )
        return following

    def _watch_link(self, *, down: bool) -> None:
        self._wakeup.watch_link(down)
        self._link_down = down

    def _look_at_link(self) -> None:
        """While a link is down: the kernel announces its end on a packet socket like any other down."""
        self._wakeup.clear_timer()
        state = self.source.link_state()
        if state is LinkState.GONE:
            self._finish(End.LINK_GONE)
        elif state is LinkState.UP:
            self._watch_link(down=False)

    # Ends.

    def stop(self) -> None:
        """End reception. Safe in any thread and in signal handlers."""
        self.receiver.stop()
        event = self._wakeup.event
        if event is not None:
            event.set()

    def _finish(self, end: End) -> None:
        if self._header[CLASSIFIED] and not self.receiver.left:
            self.receiver.take_in(
                self._mechanism.owner or self.receiver.arena()
            )  # it was cut short before that
        # What the backend received and nobody classified: packets or not, they were not delivered.
        held_back = self._mechanism.held + self._header[COUNT]
        event = self._wakeup.event
        if event is not None:
            event.set()  # whoever polls must come and see
        self.receiver.drop()
        self._tally.held_back = held_back
        self.end = end

    def copy_held(self) -> None:
        """Before a fork."""
        self._mechanism.copy_held()

    def disown(self) -> None:
        """In a forked child: everything that is open is shared with the parent, so touch nothing of it."""
        self.receiver.stop()
        self._wakeup.event = None

    def close(self, *, forked: bool) -> None:
        """Release everything. In a forked child nothing is restored: the parent still uses it.

        Where an exception cuts it short, the next call goes on.
        """
        self.over()  # a stop that nobody has looked at yet is counted while the backend is there to ask
        self.receiver.release()
        try:
            if forked:
                self._mechanism.abandon()
            else:
                self._mechanism.close()
        finally:
            self._wakeup.close()
            if forked:
                self.source.abandon()
            else:
                self.source.close()

    # For those who poll.

    def fileno(self) -> int:
        """What to poll. From the first call on, it is kept readable while packets wait here."""
        self.polled = True
        self.show_pending()
        self._wakeup.listen()
        return self._wakeup.fileno()

    def show_pending(self) -> None:
        """Make the polled descriptor readable while there is something that does not need the source."""
        event = self._wakeup.event
        if not self.polled or event is None:
            return
        waiting = (
            self.receiver.left > 0
            or self.end is not None
            or self._end_behind is not None
            or self._is_cut_short()
            or self._header[ERROR] > 0
            or self._mechanism.held > 0
        )
        if waiting == self._shown:
            return
        self._shown = None  # should an exception come in between, the next time does it again
        if waiting:
            event.set()
        else:
            event.clear()
            if self.receiver.stopping:
                event.set()  # stop() came while it was cleared
        self._shown = waiting

    def _drops(self) -> int | None:
        drops = self.source.kernel_drops()
        return None if drops is None else drops + self._mechanism.drops()

    def stats(self) -> Stats:
        """Counters since `open`."""
        counters, tally, receiver = self._counters, self._tally, self.receiver
        return Stats(
            packets=counters[PACKETS] - receiver.undelivered,
            bytes=counters[BYTES] - receiver.undelivered_bytes,
            batches=receiver.batches,
            receives=receiver.receives,
            waits=tally.waits,
            runts=counters[RUNTS],
            empty=counters[EMPTY],
            unknown_protocol=counters[UNKNOWN_PROTOCOL],
            malformed=counters[stats.MALFORMED] + tally.indescribable,
            truncated=counters[CUT],
            kernel_drops=self._drops(),
            ring_freezes=self._mechanism.freezes(),
            link_downs=tally.link_downs if self.source.watched else None,
            demotions=self._rungs - len(self.choice.ladder),
            undelivered=receiver.undelivered + tally.held_back,
        )
