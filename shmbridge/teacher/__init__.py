"""The teacher's process: it loads a model, collects requests into batches, runs the forward and answers.

main          the entry point: `python -m shmbridge.teacher.main`
huggingface   the HuggingFace teacher: the only module that imports transformers
discovery     what a loaded teacher offers
startup       forwards at startup: the parity probe, the packing check, the warm-up
server        the loop over forward(batch) -> named tensors
scheduler     when a round begins, and which requests are in it
batching      how requests become forwards, how large one may be
combine       requests as one batch, and what each of them wants of it
payload       from what a forward returned to what the payload asks for
stream        streamed replies on their way
publish       sealed replies are published in their order
stopwatch     how long the device takes for a forward
"""
