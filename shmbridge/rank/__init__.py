"""The rank's side: connect to a session, submit requests, read replies.

connect     connect(): from SHMBRIDGE_SESSION to this rank's bridge
bridge      wait_ready, submit, exchange, prefetch
disabled    the same calls in a run without a teacher
validate    what a rank may submit; every limit is checked here
requests    the requests that are in flight
pending     Pending and Lease: what a rank holds of one request
reply       named tensors, as a rank reads them
prefetch    a loader with the teacher ahead of it
parity      the parity check at the startup barrier
stats       who waits for whom
on_stop     the save hook
device      on which device a rank reads its replies
stuck       what a teacher's death does to a rank's GPU
"""
