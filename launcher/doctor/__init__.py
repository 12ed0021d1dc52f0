"""`shmbridge-launch doctor`: checks of this machine, as facts with a status and a remedy.

checks    what a check finds, and how checks are run
host      quick checks that start no process; every failure report has them
gpu       checks of the GPUs, which start processes
command   all checks, printed as a table or as JSON
"""
