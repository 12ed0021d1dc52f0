"""The settings: read, checked, documented and dumped.

settings    the settings as strict structs; load, dump
schema      strict reading into structs, with errors that tell what was found, what was expected and what to write
overrides   single settings over those of a file: `a.b=c`, and the values of flags
"""

from shmbridge.config.settings import (
    Config,
    HiddenConfig,
    OutputConfig,
    PayloadConfig,
    TeacherConfig,
    TopkConfig,
    TorchDtype,
    dump,
    from_json,
    from_tree,
    given,
    is_builder,
    load,
    to_json,
)

__all__ = [
    "Config",
    "HiddenConfig",
    "OutputConfig",
    "PayloadConfig",
    "TeacherConfig",
    "TopkConfig",
    "TorchDtype",
    "dump",
    "from_json",
    "from_tree",
    "given",
    "is_builder",
    "load",
    "to_json",
]
