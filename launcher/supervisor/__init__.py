"""Two state machines on one loop: a session with its teachers, and the training job beside it.

loop        sleeps until something happens, and steps both
session     what a training job needs of a session, whoever owns it
hosted      the session that this launcher owns
teachers    its teachers: started again, and their lanes handed over, where one has died
training    the training job, and how the run ends
restart     whether training that has crashed is started again
ranks       the ranks of the training group, watched from outside
teardown    how jobs are ended
cause       which failure came first
report      how that failure is told
"""
