"""A teacher that is kept across runs, and the training groups that come to it.

messages    what a keeper and its clients say to each other
transport   JSON lines over a unix socket
agreement   whether the settings of a training group and of a kept teacher fit
keeper      owns the session and lends the teachers to one training group at a time
reception   the keeper's socket
attached    a training group's side of the lease
"""
