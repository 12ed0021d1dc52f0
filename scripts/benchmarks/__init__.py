"""The benchmarks behind scripts/bench.py.

roundtrip
cell        one setting of a run: ranks, reply size, cores; what is asked and what is answered
contestant  what a transport implements to take part
raw, bridge, gloo, queues, zeromq, memcpy
            the transports, one module each
team        the processes of one contestant: pinned, and given turns
roundtrip   the measurement
results     the figures, and what they say about the targets
report      tables and JSON

overlap, replicas
device      simulated devices: time passes
group       a training group and its teachers on such devices, and how a loop asks: WAYS
overlap     the measurement, its tables and targets
replicas    the same

losses      memory and time of the losses

processes   where every process is started, watched and ended
machine     cores, and the facts that stand above every table
tables      the look of all output
"""

import importlib.util
import sys

if importlib.util.find_spec("rich") is None:  # all output needs it: one line in place of a traceback
    print("needs rich: pip install '.[test]'", file=sys.stderr)
    sys.exit(2)
