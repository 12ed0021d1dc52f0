"""The settings: read, checked, documented and dumped.

settings  the settings as strict structs; load, dump
decode    strict reading into structs, with errors that tell what was found, what was expected and what to write
sources   where settings come from: a YAML file, the command line's flags, `a.b=c` overrides
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
    is_builder,
    load,
    to_json,
)
from shmbridge.config.sources import given

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
