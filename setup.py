"""What pyproject.toml cannot say: the cffi module, and whether one wheel serves every CPython."""

import sysconfig

from setuptools import setup

# A free-threaded build has no stable ABI before CPython 3.15, so only the others get an abi3 wheel.
free_threaded = bool(sysconfig.get_config_var("Py_GIL_DISABLED"))

setup(
    cffi_modules=["linkrx/_core/build.py:ffibuilder"],
    options={} if free_threaded else {"bdist_wheel": {"py_limited_api": "cp310"}},
)
