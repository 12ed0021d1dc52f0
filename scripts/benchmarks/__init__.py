"""The benchmarks behind scripts/bench.py.

cell        one setting of a run: ranks, reply size, cores; what is asked and what is answered
contestant  what a transport implements to take part
raw, bridge, gloo, queues, zeromq, memcpy
            the transports, one module each
team        the processes of one contestant: pinned, watched, ended
machine     cores, and the facts that stand above every table
roundtrip   the measurement
results     the figures, and what they say about the targets
report      tables and JSON
"""
