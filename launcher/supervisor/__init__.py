"""Two state machines on one loop: a session with its teachers, and the training job beside it.

loop        sleeps until a process, a socket or a signal is ready, then steps session and job
session     the verbs of a session, and what a training job reads of it
hosted      HostedSession: owns the shared memory and the teachers
teachers    the teachers of a session: restarts, and the lanes of a dead one
training    TrainingJob: the training group, its restarts, and how the run ends
restart     whether crashed training is started again
ranks       the ranks of the training group, watched from outside
teardown    how jobs are ended
cause       which failure came first
report      the report of that failure
"""
