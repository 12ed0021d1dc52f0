"""The rank's side: connect to a session, submit requests, read replies.

connect     connect(): from SHMBRIDGE_SESSION to this rank's bridge
bridge      Bridge: wait_ready, submit, exchange, prefetch; without a teacher its replies are missing
lifecycle   whether a call may go on: the bridge is open, and the run is not to stop; the save hook
request     the arguments of a request, checked against every limit, and the fields of its descriptor
in_flight   the requests in the ring: sent, waited for, given back
pending     Pending and Lease: what a script holds of one request
reply       a reply's named tensors, and how they are read: whole or in chunks
prefetch    a loader with the teacher ahead of it, and the queue of requests that wait for room
parity      the parity check at the startup barrier
stats       who waits for whom
device      on which device a rank reads its replies, and how the death of a teacher is noticed there
"""
