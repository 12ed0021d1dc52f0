"""A run: start, readiness, restarts, the first failure, teardown, report.

supervise   the loop over session, teachers and training
steering    what it needs of session and teachers, whoever owns them
teachers    the teachers of a run, until they are ready and while they serve
ranks       the ranks of the training group, watched from outside
revival     a new teacher under running training
rerun       training again under a loaded teacher
teardown    how jobs are ended
cause       which failure came first
report      how that failure is told
"""
