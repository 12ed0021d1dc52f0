"""Exit codes that the launcher sets itself; it passes on the exit code of a child that failed."""

REFUSED = 2  # the run was refused, for its settings or for want of memory
