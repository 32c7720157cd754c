"""What is tested under pytest-asyncio is tested where that is."""

from importlib.util import find_spec

collect_ignore = [] if find_spec("pytest_asyncio") else ["test_asynchronous.py"]
