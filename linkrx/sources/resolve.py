"""Makes settings of options and capabilities, before anything is opened or changed."""

from __future__ import annotations

from dataclasses import dataclass, replace

from linkrx.memory.framing import Framing
from linkrx.memory.layouts import Layout
from linkrx.sources import filters
from linkrx.sources.capabilities import Capabilities
from linkrx.sources.filters import Program
from linkrx.sources.options import Options


@dataclass(frozen=True)
class Settings:
    """How to receive from a source. `capabilities` are those of the source after it is configured.

    `vnet_header_to_set` is the size in bytes of the virtio-net header to set on a packet socket; 0 changes nothing. `filter` is
    compiled.
    """

    options: Options
    capabilities: Capabilities
    framing: Framing
    layout: Layout
    vnet_header_to_set: int
    filter: Program | None


def resolve(found: Capabilities, options: Options) -> Settings:
    """The settings for a probed source. Changes nothing.

    Raises UnsupportedOption for an option that the source cannot honour, UnsupportedSource for a packet socket with a ring, and
    ValueError for an invalid filter.
    """
    options.check_source(found)
    size = options.vnet_header_to_set(found)
    configured = replace(found, vnet_header_size=size, hardware_gso=True) if size else found
    framing = options.framing(configured)
    program = None
    if options.filter is not None:
        program = filters.compiled(options.filter, configured, ethernet=framing.ethernet)
    return Settings(options, configured, framing, options.layout(configured, framing.prefix), size, program)
