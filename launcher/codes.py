"""Exit codes of the launcher's own; a failed child's is passed on."""

REFUSED = 2  # the run was refused, for its settings or for want of memory
INTERRUPTED = 130  # Ctrl-C before anything was created
