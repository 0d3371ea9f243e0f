"""The PEP 517 build backend: setuptools, plus a torch to compile against.

``pip install .`` builds in an environment of its own, where a package that asks for torch gets whichever version the
index likes best, and is then compiled against another torch than it runs with. This backend asks for torch only if the
target environment has none; otherwise `environment.find_torch` finds that one from inside the isolated build.
"""

from __future__ import annotations

from collections.abc import Mapping

from .environment import TORCH_REQUIREMENT, BuildError, find_compiler, find_torch, require_torch

try:
    # Hooks of setuptools that need no torch of their own.
    from setuptools.build_meta import (  # noqa: F401
        build_editable,
        build_sdist,
        build_wheel,
        prepare_metadata_for_build_editable,
        prepare_metadata_for_build_wheel,
    )
except ImportError:
    raise BuildError("setuptools is missing or too old: run `pip install 'setuptools>=77'`.") from None


_Settings = Mapping[str, str | list[str] | None]


def _wheel_requirements(config_settings: _Settings | None = None) -> list[str]:
    # A build that cannot work ends here, before gigabytes are downloaded for it.
    find_compiler()
    torch = find_torch()
    if torch is None:
        return [TORCH_REQUIREMENT]
    require_torch(torch)
    return []


get_requires_for_build_wheel = _wheel_requirements
get_requires_for_build_editable = _wheel_requirements


def get_requires_for_build_sdist(config_settings: _Settings | None = None) -> list[str]:
    return []
