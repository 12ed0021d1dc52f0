"""The command line: flags to settings, and the sub-commands.

main        chooses the command
run         shmbridge-launch -- train.py: flags to settings, a plan, its run
parsers     every flag and command; shell completion is generated from it
attach      shmbridge-launch --attach: plans a training group beside a kept teacher and runs it
config      shmbridge-launch config
teacher     shmbridge-launch teacher start, status, stop
commands    shmbridge-launch report, status, ls, clean, doctor
completion  shmbridge-launch completion
"""
