"""The teacher's process: it loads a model, collects requests into batches, runs the forward and answers.

main          the entry point: `python -m shmbridge.teacher.main`
huggingface   the HuggingFace teacher: the only module that imports transformers
discovery     what a loaded teacher offers
startup       forwards at startup: the parity probe, the packing check, the warm-up
server        the loop over forward(batch) -> named tensors
scheduler     when a round begins, and which requests are in it
batch         requests as batches: how they become forwards, what each wants of one, how large one may be
payload       from what a forward returned to what the payload asks for
stream        replies on their way: published in their order, streamed in chunks
"""
