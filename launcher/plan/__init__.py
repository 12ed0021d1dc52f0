"""From settings and machine to job specs and a memory plan. Nothing is started or created here; the machine is only looked at.

plan         the plan of a run: command lines, environments, memory
header       the header of a run: which job runs where
torchrun     torchrun's command line
replicas     how many copies of the teacher, and which GPUs and lanes each of them has
plane        which plane a run uses, and why
memory       what a run needs, where, and whether it fits
remedy       what to change where memory is too small
model_card   what is known of a model before it is loaded: sizes, weights, what it will offer
machine      the facts of this machine that a plan depends on; the memory limit and oom_kill counter of the cgroup
gpus         which GPUs there are, and which of them each job sees
allocator    options of torch's CUDA allocator that CUDA IPC excludes
"""
