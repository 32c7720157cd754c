"""Super-packets on their way from a backend into a batch."""

from __future__ import annotations

from errno import EIO

from linkrx.backend import Backend, Mechanism, ReceiveConfig
from linkrx.memory.columns import Descriptors, align
from linkrx.memory.framing import Framing
from linkrx.packets import ARENA_BYTES, Owner
from linkrx.stages.segmentation import segmenter

# What headers, one for every frame, make of a super-packet on a link with an MTU of 1500 is at most a sixteenth more.
HEADERS_SHARE = 16

# What a backend in Python receives at once: four of the largest super-packets. They and the frames made of them are in a
# core's second-level cache together; with eight, what is written first is out of it again before anybody reads it.
STAGED_BYTES = ARENA_BYTES // 2

# What C receives at once, and splits before it receives the next: what the kernel has written is in the cache still.
AT_ONCE = 2

# As many frames as an arena holds of 1514 bytes, and more of small ones: with one super-packet per batch, what a batch
# costs would be paid for every 45 frames.
SEGMENT_ROWS = 1024


class Segmenting(Mechanism):
    """A stage behind any backend, which receives into memory that is used again for every batch: from there frames of
    the network's size, with complete checksums, go into the arena. What finds no room waits for the next `fill`.
    """

    def __init__(
        self, backend: type[Backend], receive: ReceiveConfig, descriptors: Descriptors, framing: Framing
    ) -> None:
        self._taken = Descriptors(receive.options.batch_size or backend.batch_size)
        self._given = descriptors.report
        self._segmenter = segmenter(self._taken, descriptors, framing)
        # A backend wants room for one packet of any size behind all others, and one byte more.
        self._largest = align(receive.layout.capacity + 1)
        self._staging = Owner(backend.room(receive.layout))
        capacity, at_once = receive.layout.capacity, min(AT_ONCE, self._taken.rows)
        spare = min(STAGED_BYTES, at_once * (capacity + capacity // HEADERS_SHARE))
        self._backend = backend(receive, self._taken)
        try:
            native, staged = self._backend.native, self._staging.limit - self._staging.cursor
            self._receives = native != 0 and self._segmenter.receive_by(native, at_once, staged, spare)
        except BaseException:
            self._backend.close()
            raise

    def start(self) -> None:
        """As the backend does."""
        self._backend.start()

    def joining(self) -> None:
        """As the backend does."""
        self._backend.joining()

    def leave_to_parent(self) -> None:
        """As the backend does."""
        self._backend.leave_to_parent()

    def fill(self, arena: Owner, room: int) -> int:
        """Frames of what was received before, or of what is there now."""
        if self._receives:
            return self._segmenter.segment(self._staging, arena, room)  # and receives as well
        try:
            # An errno that was told already comes before what is still to be received.
            if not self._segmenter.waiting and (not self._taken.report.error or self._backend.held):
                # No more than has room as frames: a few that were left over would be a batch of their own.
                wanted = min(room - room // HEADERS_SHARE, STAGED_BYTES)
                # A backend keeps as much free as the largest takes: where that is more, there must be some for others.
                if self._largest > STAGED_BYTES:
                    wanted += self._largest
                self._backend.fill(self._staging, max(wanted, self._largest))
            return self._segmenter.segment(self._staging, arena, room)
        except OSError as error:
            if self._given.count or self._given.classified:
                raise  # a signal handler's: the kernel's comes without packets
            self._given.error = error.errno or EIO
            return 0
        except BaseException:
            # What was received or told goes where it is looked for, unless it is there.
            if not self._given.count and not self._given.classified:
                self._segmenter.segment(self._staging, arena, room)
            raise

    @property
    def held(self) -> int:
        """What the backend holds, and what was received and is not all split yet: super-packets count as one."""
        return self._backend.held + self._segmenter.waiting

    @property
    def readable_within(self) -> float:  # type: ignore[override]
        """The backend's."""
        return self._backend.readable_within

    @property
    def queue_limit(self) -> int:  # type: ignore[override]
        """The backend's."""
        return self._backend.queue_limit

    def interface_name(self, index: int) -> str | None:
        """As the backend does."""
        return self._backend.interface_name(index)

    def explain(self, code: int) -> Exception | None:
        """As the backend does."""
        return self._backend.explain(code)

    def drops(self) -> int:
        """The backend's."""
        return self._backend.drops()

    def freezes(self) -> int | None:
        """The backend's."""
        return self._backend.freezes()

    def close(self) -> None:
        """Close the backend."""
        self._backend.close()

    def abandon(self) -> None:
        """As the backend does."""
        self._backend.abandon()
