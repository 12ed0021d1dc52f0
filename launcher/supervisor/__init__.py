"""Two state machines on one loop: a session with its teachers, and the training job beside it.

loop            sleeps until a process, a socket or a signal is ready, then steps session and job; ends the jobs
session_handle  the interface through which a training job uses a session
hosted_session  HostedSession: owns the shared memory and the teachers
teachers        the teachers of a session: restarts, and the lanes of a dead one
ranks           the ranks of the training group, watched from outside
training        TrainingJob: the training group, its restarts, and how the run ends
cause           which failure came first
report          the report of that failure
"""
