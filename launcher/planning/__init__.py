"""From settings and machine to job specs and a memory plan. Nothing is started or created here; the machine is only looked at.

jobs          the plan of a run: command lines, environments, memory
summary       what a user is shown of a plan: the header of a run, and the whole plan
torchrun      torchrun's command line
placement     which GPUs and lanes each process has; how many replicas of the teacher there are
plane_choice  which plane a run uses, and why
memory        what a run needs, where, whether it fits, and what to change where it does not
model_card    what is known of a model before it is loaded: sizes, weights, what it will offer
machine       the facts of this machine that a plan depends on; the memory limit and oom_kill counter of the cgroup
gpus          which GPUs there are
"""
