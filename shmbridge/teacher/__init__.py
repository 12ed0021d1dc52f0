"""The teacher's process: it loads a model, collects requests into batches, runs the forward and answers.

main              the entry point: `python -m shmbridge.teacher.main`
huggingface       the HuggingFace teacher: loads the model with transformers
output_discovery  what a loaded teacher offers
startup           forwards at startup: the parity probe, the packing check, the warm-up
server            the loop over forward(batch) -> named tensors
scheduler         when a round begins, and which requests are in it
grouping          how a round becomes forwards, and how large one may be
batch             requests as batches, and which rows and positions of a forward each wants
payload           from what a forward returned to what the payload asks for
replies           replies on their way: written, published in their order, streamed in chunks
"""
