"""The benchmarks behind scripts/bench.py, a module each.

roundtrip    this bridge beside other transports: the measurement; roundtrip_results: its figures and tables
transports   those transports
overlap      a training step beside a teacher of simulated devices
replicas     several such teachers
group        a training group on such devices, for both
trainer      HuggingFace's Trainer on such devices; trainee: its training script
losses       memory and time of the losses
cuda         the CUDA plane

bridge       a session without a launcher
processes    forked processes
tables       the look of all output
"""

import importlib.util
import sys

if importlib.util.find_spec("rich") is None:  # all output needs it: one line in place of a traceback
    print("needs rich: pip install '.[test]'", file=sys.stderr)
    sys.exit(2)
