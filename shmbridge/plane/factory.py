"""Which plane a session has: the setting `plane` decides."""

from __future__ import annotations

import torch

from shmbridge.output_spec import Offer
from shmbridge.plane.base import LaneSpec, RankPlane, TeacherPlane
from shmbridge.plane.cuda import RankCudaPlane, TeacherCudaPlane
from shmbridge.plane.cuda_slab import Slabs
from shmbridge.plane.host import RankHostPlane, TeacherHostPlane
from shmbridge.shm.rank_session import RankSession
from shmbridge.shm.session import Lane
from shmbridge.shm.teacher_session import TeacherSession


def of_teacher(session: TeacherSession, lane: Lane, agreed: Offer, device: torch.device, slabs: Slabs) -> TeacherPlane:
    """The plane of a lane that the teacher serves. Raises AttachError; PlanError where its GPU is too small."""
    spec = LaneSpec(session.token, session.control.shape, lane, agreed, device)
    return TeacherCudaPlane(spec, slabs) if session.settings.plane == "cuda_ipc" else TeacherHostPlane(spec)


def of_rank(session: RankSession, agreed: Offer, device: torch.device) -> RankPlane:
    """The plane of the rank's lane; replies are wanted on `device`. Raises AttachError."""
    spec = LaneSpec(session.token, session.control.shape, session.lane, agreed, device)
    if session.settings.plane == "cuda_ipc":
        return RankCudaPlane(spec, in_place=session.settings.cuda.read == "in_place")
    return RankHostPlane(spec)
