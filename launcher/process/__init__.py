"""Starting and stopping processes.

job             one job: a shim and everything below it
shim            the small parent of each job, which lets nothing outlive it; run by path
elastic         torchrun's main, called from a process of the launcher; run by path
signals         signals to the launcher
cuda_ipc_trial  short-lived processes that try CUDA IPC between the GPUs of a run
"""
