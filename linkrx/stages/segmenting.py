"""The stage that splits super-packets, between a backend and classification."""

from __future__ import annotations

from errno import EIO

from linkrx.backend import Backend, Mechanism, ReceiveConfig
from linkrx.memory.columns import Descriptors, align
from linkrx.memory.framing import Framing
from linkrx.packets import ARENA_BYTES, Owner
from linkrx.stages.segmentation import segmenter

# With a header in front of each frame, a super-packet on a link with an MTU of 1500 grows by a sixteenth at most.
HEADERS_SHARE = 16

# A backend in Python receives four of the largest super-packets at once. They and their frames fit into a core's second-level
# cache together. With eight, the first frames have left the cache before they are read.
STAGED_BYTES = ARENA_BYTES // 2

# The super-packets that C receives at once. They are still in the cache when they are split.
AT_ONCE = 2

# The rows of a batch. An arena holds fewer frames of 1514 bytes. With one super-packet per batch, there would be a batch for every
# 45 frames.
SEGMENT_ROWS = 1024


class Segmenting(Mechanism):
    """Splits the super-packets of any backend. The backend receives into memory that is used again for every batch.

    Frames of the network's size, with complete checksums, go from there into the arena. Packets without room there wait for the
    next `fill`.
    """

    def __init__(
        self, backend: type[Backend], receive: ReceiveConfig, descriptors: Descriptors, framing: Framing
    ) -> None:
        self._taken = Descriptors(receive.options.batch_size or backend.batch_size)
        self._given = descriptors.report
        self._segmenter = segmenter(self._taken, descriptors, framing)
        # A backend needs room for one packet of any size, and one byte more.
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
        """Call the backend's."""
        self._backend.start()

    def joining(self) -> None:
        """Call the backend's."""
        self._backend.joining()

    def leave_to_parent(self) -> None:
        """Call the backend's."""
        self._backend.leave_to_parent()

    def fill(self, arena: Owner, room: int) -> int:
        """Write frames of packets that were received before, or receive new ones."""
        if self._receives:
            return self._segmenter.segment(self._staging, arena, room)  # and receives as well
        try:
            # An errno in the report comes before packets that are not received yet.
            if not self._segmenter.waiting and (not self._taken.report.error or self._backend.held):
                # Receive no more than fits as frames: the rest would make a small batch of its own.
                wanted = min(room - room // HEADERS_SHARE, STAGED_BYTES)
                # A backend keeps room for the largest packet free. There must be some more for others.
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
            # Packets and an errno go to the report that the receiver reads, unless they are there already.
            if not self._given.count and not self._given.classified:
                self._segmenter.segment(self._staging, arena, room)
            raise

    @property
    def held(self) -> int:
        """The packets that the backend holds or that are not split completely. A super-packet counts as one."""
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
        """Call the backend's."""
        return self._backend.interface_name(index)

    def explain(self, code: int) -> Exception | None:
        """Call the backend's."""
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
        """Call the backend's."""
        self._backend.abandon()
