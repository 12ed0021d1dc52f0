"""The rank's side: connect to a session, submit requests, read replies.

connect     connect(): from SHMBRIDGE_SESSION to this rank's bridge
bridge      wait_ready, submit, exchange, prefetch; or off
lifecycle   between connect and close: who may use the bridge, how it waits, the save hook
request     the arguments of a request, checked against every limit, and the fields of its descriptor
in_flight   the requests of the rank: which wait, which are in the ring, whose replies are wanted
pending     Pending and Lease: what a script holds of one request
stream      a reply in chunks
reply       a reply's named tensors, and how they are read from the plane
prefetch    a loader with the teacher ahead of it
parity      the parity check at the startup barrier
stats       who waits for whom
device      on which device a rank reads its replies, and what a teacher's death does to it
"""
