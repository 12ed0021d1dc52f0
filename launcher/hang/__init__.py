"""Who waits for whom, and for how long.

snapshot   what can be seen of a session at one moment
stacks     Python stacks of other processes
places     where a stack stands: in which call, in which function
rules      from a snapshot to one sentence and what to do next
monitor    who owes something, and for how long
lookout    when the hang report of a running session is due
report     the hang report
"""
