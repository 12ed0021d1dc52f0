"""From settings and machine to job specs and a memory plan. Nothing is started or created here; the machine is only looked at.

plan         what is executed, with which environment
torchrun     torchrun's command line
replicas     how many copies of the teacher, and which GPUs and lanes each of them has
plane        which plane replies lie in, and why
memory       what the run takes, where, and whether it fits
remedy       what to change where a place is too small
expected     what the teacher will offer, as far as it is known before it has loaded
model_card   what can be known of a model before it is loaded
machine      what this machine has
gpus         which GPUs there are, and what each job sees of them
allocator    options of torch's CUDA allocator
cgroup       the memory controller of this process's cgroup
"""
