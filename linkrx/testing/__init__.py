"""Conformance checks: what every backend must do on every source that it accepts. Authors of backends call them. Needs no pytest.

    from linkrx import testing
    from linkrx.kernel import namespace

    namespace.enter_private_network()
    for cell in testing.cells("mine"):
        print(cell.name, cell.run())

A cell is one check of one backend on one kind of source. `run()` says whether the check held, the backend refused the source, or
the check does not apply to it. It raises AssertionError if the check fails. Call it in the main thread, because some checks
install signal handlers.

Some kinds of source need network devices. Those need CAP_NET_ADMIN, which `enter_private_network` gives, and access to
/dev/net/tun. `cells("mine", linkrx.testing.rigs.PLAIN_RIGS)` has the others only.
"""

from __future__ import annotations

from linkrx.testing import (
    exceptions,
    filters,
    lifetimes,
    limits,
    links,
    packets,
    recorded,
    resources,
    sending,
    stops,
)
from linkrx.testing.capture_rigs import CAPTURE_RIGS
from linkrx.testing.cells import Cell, Check, Inapplicable, named, row_of
from linkrx.testing.rigs import DEVICE_RIGS, PLAIN_RIGS, MakeRig

__all__ = ["CHECKS", "Cell", "Check", "Inapplicable", "cells", "row_of"]

CHECKS: tuple[Check, ...] = (
    packets.check_delivery,
    packets.check_columns,
    packets.check_runts,
    packets.check_empty,
    packets.check_unknown_versions,
    packets.check_odd_packets,
    packets.check_odd_vnet_headers,
    packets.check_lengths,
    packets.check_ladder,
    packets.check_truncation,
    links.check_mtu_raised,
    stops.check_hang_up,
    links.check_link_flaps,
    links.check_link_flaps_under_traffic,
    links.check_renamed,
    links.check_moved,
    *links.DELETIONS,
    links.check_made_again,
    stops.check_stop_at_rest,
    stops.check_stop_in_a_wait,
    stops.check_stop_under_load,
    stops.check_stop_from_deliver,
    stops.check_closing,
    limits.check_limits,
    limits.check_flush,
    limits.check_flush_in_a_wait,
    limits.check_flush_under_load,
    limits.check_latency,
    sending.check_sending,
    sending.check_sending_packets,
    sending.check_sending_anywhere,
    sending.check_sending_both_ways,
    sending.check_sending_odd_lengths,
    sending.check_sending_to_nobody,
    sending.check_sending_over_flaps,
    sending.check_sending_at_the_end,
    sending.check_sending_refused,
    filters.check_filter,
    filters.check_set_filter,
    filters.check_set_filter_under_load,
    exceptions.check_raising,
    exceptions.check_interrupted_wait,
    exceptions.check_interrupted_flood,
    exceptions.check_signals,
    exceptions.check_second_thread,
    exceptions.check_fork,
    exceptions.check_collected,
    lifetimes.check_keeping,
    lifetimes.check_keeping_batches,
    lifetimes.check_long_beside_short,
    resources.check_restoring,
    resources.check_polling,
    resources.check_overrun,
    recorded.check_recorded,
    recorded.check_recorded_stops,
    recorded.check_recorded_filters,
    recorded.check_recorded_keeping,
    recorded.check_recorded_restoring,
)


def cells(backend: str, rigs: tuple[MakeRig, ...] = PLAIN_RIGS + DEVICE_RIGS + CAPTURE_RIGS) -> list[Cell]:
    """All cells of a backend. Raises BackendUnavailable if there is no backend of that name."""
    named(backend)
    return [Cell(backend, make_rig, check) for make_rig in rigs for check in CHECKS]
