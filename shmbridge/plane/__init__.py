"""Where replies lie: in POSIX shared memory (host), or in the teacher's GPU memory (cuda).

base            what teacher and rank know of a plane, and which plane a session has
arrays          dtypes and tensors over shared memory; the probe that finds a teacher's outputs
slots           how a reply lies in its slot, whatever memory that is
host            replies in POSIX shared memory
cuda            replies in the teacher's GPU memory
cuda_ipc        CUDA IPC: the only module that calls private functions of torch
cuda_exchange   how teacher and rank hand each other CUDA handles
cuda_reads      which replies a rank's GPU still reads
cuda_errors     what an exception says of the GPU
pinned          shared memory that a GPU copies to and from by itself
shared_head     the teacher's output head in shared memory
probe           the trial of CUDA IPC before a session exists: exporter and importer
devices         what torch sees of this machine's GPUs; a short process of its own
"""
