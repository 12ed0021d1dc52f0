"""Every exception that shmbridge raises.

    ShmbridgeError
    ├── ConfigError           (ValueError)    a setting is unknown, missing or out of range
    ├── PlanError                             the run does not fit /dev/shm, RAM or the GPU
    ├── NotLaunched                           no session: the script was not started by shmbridge-launch
    ├── AttachError                           a segment is missing, garbled, foreign or of another version
    ├── TornReply                             a reply in GPU memory is not whole: its teacher died while it wrote
    ├── ParityError                           a reply over the bridge does not equal what the model gives in its own process
    ├── SessionInUse                          the session's name is held by a live launcher
    ├── RequestRefused        (ValueError)    a request is not valid; nothing reached the teacher
    ├── RingFull                              every slot of the ring is taken
    ├── Closed                                this process closed the bridge or released the lease
    ├── TeacherError                          the teacher's forward raised for this request; the teacher lives
    ├── DeadlineExceeded      (TimeoutError)  a wait reached its deadline with every party alive
    └── PeerLost                              another participant ended or failed
        ├── TeacherDied
        ├── TrainerDied
        ├── LauncherDied
        └── RunStopped                        the user or the scheduler has stopped the run; no process died

`Closed` is caused by the caller, `PeerLost` by another participant. A `PeerLost` is always the consequence of a failure
elsewhere, so a report never names it as the cause.
"""

from __future__ import annotations


class ShmbridgeError(Exception):
    """The root of the tree."""


class ConfigError(ShmbridgeError, ValueError):
    """A setting is unknown, missing or out of range."""


class PlanError(ShmbridgeError):
    """The run does not fit the machine; nothing was loaded."""


class NotLaunched(ShmbridgeError):
    """The script runs outside a session."""


class AttachError(ShmbridgeError):
    """Shared memory is not what this process expects."""


class TornReply(ShmbridgeError):
    """A reply that was handed out is not whole. Its positions hold NaN, so a loss that used it is NaN."""


class ParityError(ShmbridgeError):
    """A check at the startup barrier failed: replies do not equal the model's outputs, or teacher and student do not
    match."""


class SessionInUse(ShmbridgeError):
    """A live launcher holds the name."""


class RequestRefused(ShmbridgeError, ValueError):
    """A request was refused in the rank that made it; nothing reached the teacher."""


class RingFull(ShmbridgeError):
    """The ring has no free slot; only the caller can free one, by waiting for a reply and releasing its lease."""


class Closed(ShmbridgeError):
    """The bridge was closed, or the lease released, by this process."""


class TeacherError(ShmbridgeError):
    """The teacher's forward raised for this request. `remote_traceback` is the teacher's own traceback."""

    def __init__(self, message: str, remote_traceback: str) -> None:
        super().__init__(f"{message}\n\nThe teacher's traceback:\n{remote_traceback}")
        self.remote_traceback = remote_traceback


class DeadlineExceeded(ShmbridgeError, TimeoutError):
    """A wait reached its deadline although every party was alive. `phase` is the one in which this process waited."""

    phase = ""

    def within(self, phase: str) -> DeadlineExceeded:
        """This error with its phase set."""
        self.phase = phase
        return self


class PeerLost(ShmbridgeError):
    """Another participant ended or failed."""


class TeacherDied(PeerLost):
    """The teacher ended before it had answered."""


class TrainerDied(PeerLost):
    """A training rank ended before it had closed its bridge."""


class LauncherDied(PeerLost):
    """The owner of the session is gone, or has ended the session."""


class RunStopped(PeerLost):
    """The run was stopped with Ctrl-C or a signal. The rank saves, if it has anything to save, and ends."""
