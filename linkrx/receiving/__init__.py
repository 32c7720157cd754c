"""The dispatcher: waiting, handing over, ends, statistics and asyncio."""
