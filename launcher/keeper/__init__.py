"""A teacher that is kept across runs, and the training groups that come to it.

messages    what a keeper and its clients say to each other
transport   JSON lines over a unix socket
agreement   whether the settings of a training group and of a kept teacher fit
server      the keeper's socket: one training group at a time holds the session
client      RemoteSession: a training group's side, and its connection to the keeper
"""
