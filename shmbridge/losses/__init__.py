"""Memory-bounded distillation losses: forward and reverse KL, generalised JSD, KL over the teacher's top k, and reverse
KL on the student's candidates; cross entropy alone, or beside one of the first four.

    loss = forward_kl(student_logits, reply.logits, temperature=2.0, mask=mask, num_items=num_items)
    loss = forward_kl(LazyLogits(hidden, Head(lm_head.weight)), reply.logits, mask=mask, num_items=num_items)

Either side is a tensor of logits, or `LazyLogits`: hidden states and a head, whose logits are computed a few rows at a
time. A loss computes its gradient together with its value, a few rows at a time.

Rows are aligned with input_ids: row i is the distribution after token i. docs/losses.md draws that, the normaliser
under data parallelism, and a streamed teacher.

    divergence   the formulas, for one chunk of rows
    sources      what a loss reads, a few rows at a time: logits, hidden states and a head, tables
    student      the student's logits, a few rows at a time, and the gradients of its inputs
    chunked      the loop over chunks, as an autograd function
    checks       shapes, dtypes and settings, checked before anything is computed
    functional   the losses
    candidates   the loss on the student's candidates, and their choice
    labels       masks and targets from labels; the normaliser
"""

from shmbridge.head import Head
from shmbridge.losses.candidates import candidate_reverse_kl, top_candidates
from shmbridge.losses.divergence import LOG_FLOOR, TopK
from shmbridge.losses.functional import (
    DistillationLoss,
    cross_entropy,
    distillation_loss,
    forward_kl,
    generalized_jsd,
    reverse_kl,
    topk_kl,
)
from shmbridge.losses.labels import count_items, mask_from_labels, targets_from_labels
from shmbridge.losses.sources import LazyLogits

__all__ = [
    "LOG_FLOOR",
    "DistillationLoss",
    "Head",
    "LazyLogits",
    "TopK",
    "candidate_reverse_kl",
    "count_items",
    "cross_entropy",
    "distillation_loss",
    "forward_kl",
    "generalized_jsd",
    "mask_from_labels",
    "reverse_kl",
    "targets_from_labels",
    "top_candidates",
    "topk_kl",
]
