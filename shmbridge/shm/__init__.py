"""The protocol in shared memory between launcher, teacher and ranks. Without torch.

layout              every byte offset; the states of a slot
segment             one shared-memory object: create, reserve, attach with every check
doorbell            the one blocking wait
ring                cursors and slots over plain memory
process             which process is alive: pid and start time; its Python stacks on demand
participant_record  one record per participant: where it is, and why it failed
heartbeat           a thread that shows that its process lives
session             token, names, control segment, lanes: what every process of a session reads
teacher_session     a teacher's side of a session, and of each generation; the startup barrier
rank_session        a training rank's side
owner               what only the owner of a session does: create, begin a generation, remove
"""
