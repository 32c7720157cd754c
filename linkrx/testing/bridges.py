"""Bridges in a test's network."""

from __future__ import annotations

import os
import time

from linkrx.testing.ends import PATIENCE, End


class Bridge(End):
    """A bridge. It forwards at once, without spanning tree and IGMP snooping."""

    def attach(self, end: End) -> None:
        """Make an end a port of the bridge. If it is up and has a carrier, wait until the port forwards frames."""
        self._network.configure(lambda route: route.link("set", index=end.index, master=self.index))
        deadline = time.monotonic() + PATIENCE
        while end._has_carrier() and not end.link.forwards:
            assert time.monotonic() < deadline, f"{end.name} never became a forwarding port of {self.name}"
            os.sched_yield()

    def port(self) -> End:
        """Add a port: one end of a new veth pair. Returns the other end."""
        near, far = self._network.veth()
        self.attach(far)
        return near

    def _no_carrier(self) -> str:
        return "none of its ports has one"
