"""Which plane a session has: the setting `plane` decides."""

from __future__ import annotations

import torch

from shmbridge.config import Config
from shmbridge.output_spec import Offer
from shmbridge.plane.base import RankPlane, TeacherPlane
from shmbridge.plane.cuda import RankCudaPlane, TeacherCudaPlane
from shmbridge.plane.cuda_slab import Slabs
from shmbridge.plane.host import RankHostPlane, TeacherHostPlane
from shmbridge.shm.rank_session import RankSession
from shmbridge.shm.session import Lane
from shmbridge.shm.teacher_session import TeacherSession


def of_teacher(session: TeacherSession, lane: Lane, agreed: Offer, device: torch.device, slabs: Slabs) -> TeacherPlane:
    """Of a lane that the teacher serves. Raises AttachError; PlanError where its GPU is too small."""
    place = session.token, session.control.shape, lane, agreed, device
    return TeacherCudaPlane(*place, slabs) if _on_gpu(session.settings) else TeacherHostPlane(*place)


def of_rank(session: RankSession, agreed: Offer, device: torch.device) -> RankPlane:
    """Of the rank's lane; replies are wanted on `device`. Raises AttachError."""
    place = session.token, session.control.shape, session.lane, agreed, device
    if _on_gpu(session.settings):
        return RankCudaPlane(*place, in_place=session.settings.cuda.read == "in_place")
    return RankHostPlane(*place)


def _on_gpu(settings: Config) -> bool:
    return settings.plane == "cuda_ipc"
