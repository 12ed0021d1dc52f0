"""Who waits for whom, and for how long.

snapshot   what can be seen of a session at one moment
stacks     Python stacks of other processes, and the call that each is in
rules      the table of rules: from a snapshot to findings
monitor    how long a finding has stood, and when it is reported
report     the hang report
status     a snapshot as tables
"""
