"""Where replies lie: in POSIX shared memory (host), or in the teacher's GPU memory (cuda).

base            the interface of a plane, for teacher and rank
factory         which plane a session has
tensors         dtypes; tensors in shared memory; how a reply lies in its slot
host            replies in POSIX shared memory
cuda            replies in the teacher's GPU memory
cuda_ipc        CUDA IPC: the only module that calls private functions of torch
cuda_slab       the reply slots of a lane in GPU memory, and the handles that open them
cuda_runtime    pinned host memory; what an exception of CUDA means
shared_head     the teacher's output head in shared memory
cuda_ipc_probe  the trial of CUDA IPC before a session exists: exporter and importer
devices         what torch sees of this machine's GPUs; a short process of its own
"""
