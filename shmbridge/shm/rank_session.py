"""One training rank's side of a session."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

from shmbridge import log
from shmbridge.errors import AttachError, DeadlineExceeded, LauncherDied, RunStopped, TeacherDied
from shmbridge.output_spec import Offer
from shmbridge.shm.doorbell import Doorbell
from shmbridge.shm.participant_record import Phase, Record
from shmbridge.shm.process import Identity
from shmbridge.shm.session import Lane, Participant, Token, lost

_OWNER_SPEAKS_S = 2.0
_STOP_IS_TOLD_S = 0.5


class RankSession(Participant):
    """One training rank's side of a session: its lane, its doorbell, its teacher's."""

    def __init__(self, token: Token, lane: int) -> None:
        """Attach and sign in.

        Raises:
            AttachError: the session is gone, or has no such lane, or another live process holds it.
        """
        super().__init__(token.session_id)
        self.generation = token.generation
        self._ends_with = {0, token.generation}
        self._check_generation()
        lanes = self.control.shape.lanes
        if not 0 <= lane < lanes:
            raise AttachError(
                f"this rank asks for lane {lane}, the session has lanes 0 to {lanes - 1}: "
                "start as many ranks as --train-gpus (or --cpu) says."
            )
        self.lane = Lane.attach(token, self.control.shape, lane)
        self.lanes = [self.lane]  # the others' are none of its business
        self.ring = self.lane.ring
        self.record = self.lane.records[0]
        self._sign_in()
        self.bell = Doorbell(self.names.member_bell(token.generation, lane))
        self._teacher_bells = [Doorbell(self.names.teacher_bell(i)) for i in range(len(self.control.teachers))]
        self._reopened = False
        self.plane: Any = None  # a plane.base.RankPlane: memory and events are opened once in the life of a process
        self.plane_device: object = None
        self._outlives_teacher = self.settings.teacher.restarts > 0 or self.settings.on_teacher_lost != "stop"
        self._missed: Identity | None = None  # the teacher whose end was told
        self._stopped_since: float | None = None  # the teacher has ended in a run that stops
        self.stop: Callable[[], bool] = lambda: False  # whether this rank's waits are to end, because it has to save

    def _check_generation(self) -> None:
        current = self.control.generation
        if self.generation != current:
            raise AttachError(
                f"this process belongs to generation {self.generation} of the session, which is at generation {current}: "
                "it was left behind by a restart and must end."
            )

    def _sign_in(self) -> None:
        with self.lane.segment.lock() as locked:
            holder = self.record.identity
            if holder or not locked:
                who = f"pid {holder.pid}" if holder else "another process at this moment"
                raise AttachError(
                    f"lane {self.lane.index} was taken by {who}, this process is pid {os.getpid()}: two processes have the same "
                    "LOCAL_RANK. A lane belongs to one process, also after that has closed its bridge or has ended: connect in one "
                    "process of each rank, or give connect(lane=...)."
                )
            self.record.sign_in()
        self.record.ready = self.generation

    def reopen(self) -> None:
        """Begin anew on the lane that this process has, closed or not. `Requests` cancels what it had submitted.

        Raises:
            AttachError: the session has ended, or the teacher has, because every rank had closed.
            PeerLost: see `check`.
        """
        self._check_generation()
        self._reopened = True
        self.stop = lambda: False
        self.check()
        self.record.reset()
        self.ring.closed = False

    @property
    def teacher_index(self) -> int:
        """The teacher that serves this lane now. Raises AttachError."""
        index = self.lane.teacher
        if index >= len(self.control.teachers):
            raise AttachError(f"segment {self.lane.segment.name} names teacher {index}: garbled.")
        return index

    @property
    def teacher(self) -> Record:
        return self.control.teachers[self.teacher_index]

    def ring_teacher(self) -> None:
        self._teacher_bells[self.teacher_index].ring()

    def is_told_to_stop(self) -> bool:
        """Whether the run was stopped, which this rank's own signal may be ahead of by a moment."""
        told = self.bell.wait(lambda: self.control.stopping or None, lambda: None, time.monotonic() + _STOP_IS_TOLD_S)
        return told is not None

    def check(self) -> None:
        """Raise a PeerLost if the session has failed, or its owner or this lane's teacher is gone.

        Where a teacher may be started again, its end is told and waited out: whether one comes is the owner's word."""
        if self.stop():
            raise RunStopped("the run is to stop.")
        teacher = self.teacher
        name, failure = self.teacher_name(teacher), teacher.failure
        if failure and not failure.consequence and not self._outlives_teacher:
            raise lost(failure, self.settings.run_dir)
        try:
            super().check()
        except LauncherDied as error:
            if self.control.stopping and self._owner.alive():
                raise RunStopped(str(error)) from None
            raise
        over = teacher.ready == self.generation and teacher.phase in (Phase.CLOSED, Phase.IDLE)
        if self._reopened and over and not self.control.stopping:
            raise AttachError(
                f"{name} has ended, because every rank had closed its bridge; this one connects "
                "again. Set teacher.serve_until=exited: the teacher then stays until the ranks' processes have ended."
            )
        who = teacher.identity
        if teacher.lost and teacher is self.teacher:  # the lane may have gone to another before
            raise TeacherDied(f"{name} is lost, and no new one comes.")
        if who is None or teacher.is_alive():
            return
        if self.control.stopping:  # teachers end; for a moment the owner's word on it is waited for
            now = time.monotonic()
            self._stopped_since = self._stopped_since or now
            if now - self._stopped_since < _OWNER_SPEAKS_S:
                return
        gone = f"{name}, pid {who.pid}, is gone; it was in phase {teacher.phase}."
        if not self._outlives_teacher:
            raise TeacherDied(gone)
        if self._missed != who:
            self._missed = who
            log.logger.warning("rank %d: %s Waiting for a new one.", self.lane.index, gone)

    def wait_ready(self, timeout_s: float) -> Offer:
        """Sleep until the teacher's model is loaded; what it offers.

        Raises:
            DeadlineExceeded: it is still loading; says how far it is.
            RunStopped: the run was stopped while it loaded.
            TeacherDied, LauncherDied, TrainerDied: see `check`.
        """
        self.record.enter(Phase.BARRIER)
        teachers = self.control.teachers  # all of them: teacher 0 writes what is shared, such as the output head

        def ready_or_stopped() -> bool | None:
            if all(teacher.ready == self.generation or teacher.lost for teacher in teachers):
                return True
            return False if self.control.stopping else None

        try:
            ready = self.wait(ready_or_stopped, time.monotonic() + timeout_s)
        finally:
            self.record.enter(Phase.TRAINING)
        if ready is None:
            raise DeadlineExceeded(self._late_teacher(timeout_s)).within(str(Phase.BARRIER))
        if not ready:
            raise RunStopped("the run was stopped while the teacher was loading.")
        text = self.teacher.offer
        if text is None:
            raise AttachError(f"{self.teacher_name(self.teacher)} is ready but made no offer: garbled.")
        return Offer.decode(text)

    def _late_teacher(self, timeout_s: float) -> str:
        teacher = next((t for t in self.control.teachers if t.ready != self.generation), self.teacher)
        if teacher.identity is None:
            where = "has not attached to the session"
        else:
            done, total = teacher.progressed
            share = f" ({done} of {total})" if total else ""
            where = (
                f"(pid {teacher.identity.pid}) is in phase {teacher.phase}{share} for {teacher.seconds_in_phase:.0f} s"
            )
        return f"at the startup barrier {self.teacher_name(teacher)} {where} after {timeout_s:g} s; see its log, or raise timeouts.startup_s."

    def close(self) -> None:
        """Tell that no request follows. Memory stays mapped while tensors of the caller look into it."""
        self.ring.closed = True
        self.record.enter(Phase.CLOSED)
        self.ring_teacher()
