"""Ignore the tests of pytest-asyncio if it is not installed."""

from importlib.util import find_spec

collect_ignore = [] if find_spec("pytest_asyncio") else ["test_asynchronous.py"]
