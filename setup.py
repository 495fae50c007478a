"""The native encoder, which is optional; pyproject.toml says everything else.

Where there is no C++ compiler the install still works and says so, and preprocessing uses the library's
encoder. REQUIRE_NATIVE=1 makes the install fail instead.
"""

from __future__ import annotations

import os
import sys
from glob import glob

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

SOURCES = "megatron/pretrain/data/native"
# No -march: a wheel runs on every processor of its kind, whatever machine built it.
FLAGS = ["-std=c++17", "-O3", "-g0", "-fvisibility=hidden", "-Wall", "-Wextra"]


def without_native(reason: str) -> None:
    sentence = f"the native encoder was not built ({reason}); preprocessing will use the library's"
    if os.environ.get("REQUIRE_NATIVE") == "1":
        sys.exit(f"error: {sentence}, which REQUIRE_NATIVE=1 forbids")
    print(f"warning: {sentence}", file=sys.stderr)


class BuildNative(build_ext):
    def build_extension(self, extension: Extension) -> None:
        # The header-only library is found late, so that metadata can be made without it.
        try:
            import pybind11

            extension.include_dirs.append(pybind11.get_include())
            super().build_extension(extension)
        except Exception as error:  # compilers fail in as many ways as there are compilers
            without_native(str(error).strip().splitlines()[0] if str(error).strip() else repr(error))

    def copy_extensions_to_source(self) -> None:
        """What an editable install does at the end; there is nothing to copy where nothing was built."""
        self.extensions = [each for each in self.extensions
                           if os.path.exists(os.path.join(self.build_lib, self.get_ext_filename(each.name)))]
        super().copy_extensions_to_source()


setup(
    ext_modules=[Extension(
        "megatron.pretrain.data._native", sorted(glob(f"{SOURCES}/*.cpp")), language="c++",
        depends=sorted(glob(f"{SOURCES}/*.h")), extra_compile_args=FLAGS)],
    cmdclass={"build_ext": BuildNative},
)
