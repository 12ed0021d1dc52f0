"""The command `shmbridge-launch`: starts a teacher beside a training group, watches both, and reports. Only process.elastic imports torch.

cli         flags and sub-commands
planning    from settings and the machine to the specs of the jobs and a memory plan
supervisor  a run: session, training job, and the failure that came first
process     starting and stopping processes
keeper      a teacher that is kept across runs
hang        who waits for whom, and the hang report
console     what is printed, and the log files that are followed
doctor      checks of this machine
exit_codes  exit codes
registry    names of live sessions
sessions    the sessions of this user on this machine, and the removal of dead ones
"""
