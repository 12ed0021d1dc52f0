"""The parity check at the startup barrier: what comes over the bridge is what the model gives in its own process.

A server teacher that is not the local teacher (a shift by one, a temperature applied twice, another tokenizer) costs days,
because the loss still falls. So before step 1 each rank sends a probe batch and compares; which check failed is named.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch

from shmbridge import fingerprint
from shmbridge.errors import ParityError
from shmbridge.head import Head
from shmbridge.output_spec import Extent, Offer, Probe, by_head
from shmbridge.rank.reply import Reply
from shmbridge.rank.request import IntArray

Loss = Callable[[torch.Tensor, Reply], torch.Tensor]
Ask = Callable[[IntArray, Extent, dict[str, memoryview]], tuple[Reply, int]]
"""Token IDs and what travels beside them to the reply and the CRC-32 of the IDs that the teacher read."""

_ZERO = 1e-3  # nats; KL(teacher, teacher) to rounding


class Student(NamedTuple):
    """What the training script tells of its student."""

    vocab_size: int | None = None
    tokenizer: Any = None
    loss: Loss | None = None


def check(agreed: Offer, student: Student, ask: Ask, head: Callable[[], Head]) -> str:
    """Compare; what was compared, in one line, empty where nothing was.

    Raises:
        ParityError: names the check that failed, what was found and what was expected.
    """
    vocabulary = _vocabulary(agreed, student)
    if not agreed.probe:
        return ", ".join(vocabulary)
    ids: IntArray = np.array(agreed.probe.input_ids, np.int64)
    arrays: dict[str, memoryview] = {}
    for spec in agreed.outputs:
        if spec.name == "candidate_logprobs":
            arrays["candidates"] = np.zeros((*ids.shape, int(spec.shape[-1])), np.int32).data.cast("B")
    reply, echo = ask(ids, Extent(ids.shape[0], ids.shape[1]), arrays)
    sent = zlib.crc32(ids.tobytes())
    if echo != sent:
        raise ParityError(f"parity check, token IDs: the teacher read IDs with CRC {echo:#x}, {sent:#x} were sent.")
    passed = ["token IDs", *_payload(agreed, agreed.probe, reply, head)]
    if student.loss:
        passed.append(_loss(agreed, student.loss, reply, head))
    return ", ".join(passed + vocabulary)


def _payload(agreed: Offer, probe: Probe, reply: Reply, head: Callable[[], Head]) -> list[str]:
    found = [(spec, reply[spec.name]) for spec in agreed.outputs]
    if agreed.head:
        found.append((by_head(agreed.head.words), head()(reply.hidden)))
    for spec, tensor in found:
        tolerance = probe.tolerance if "float" in spec.dtype else float("inf")
        wrong = fingerprint.differ(fingerprint.of(spec, tensor), probe.outputs[spec.name], tolerance)
        if wrong:
            raise ParityError(
                f"parity check, payload {spec.name}: the reply is not what the model gives in its own process: {wrong}. If "
                "the teacher's answers differ from call to call (dropout, sampling), set parity=false."
            )
    return [spec.name for spec, _ in found]


def _vocabulary(agreed: Offer, student: Student) -> list[str]:
    passed = []
    if student.tokenizer is not None and agreed.tokenizer is None:
        passed.append("(no tokenizer: the teacher has no tokenizer files, nothing was compared)")
    elif student.tokenizer is not None and agreed.tokenizer is not None:
        table = fingerprint.of_tokenizer(student.tokenizer)
        if table != agreed.tokenizer:
            raise ParityError(
                f"parity check, vocabulary: the tokenizers' tables differ (teacher: {agreed.tokenizer.entries} entries, SHA-256 "
                f"{agreed.tokenizer.digest[:12]}; student: {table.entries} entries, {table.digest[:12]}). A word of one is not "
                "the same word of the other; train with the teacher's tokenizer."
            )
        passed.append("tokenizer")
    words, theirs = agreed.words, student.vocab_size
    if theirs is None or words is None:
        return passed
    if theirs != words:
        entries = agreed.tokenizer.entries if agreed.tokenizer else 0
        remedy = f"Where the rest is padding, cut it from the student's logits: logits[..., :{words}]."
        if entries > min(theirs, words):
            remedy = f"The teacher's tokenizer has {entries} entries: these are words and no padding, so the models do not match."
        elif theirs < words:
            remedy = f"Where the rest is padding, cut it: payload.vocab={theirs}."
        raise ParityError(
            f"parity check, vocabulary: the teacher's distribution has {words} words, the student's {theirs}. {remedy}"
        )
    return [*passed, f"vocabulary of {words}"]


def _loss(agreed: Offer, loss: Loss, reply: Reply, head: Callable[[], Head]) -> str:
    """The chosen loss of the teacher and itself, where the reply tells the whole distribution or its top and its tail."""
    logits = _own_logits(agreed, reply, head)
    if logits is None:
        return "(no loss: this payload does not tell a distribution at temperature 1)"
    value = float(loss(logits, reply))
    if not abs(value) <= _ZERO:
        raise ParityError(
            f"parity check, loss: of the teacher and itself it is {value:.4g}, expected 0. A temperature on one side alone, rows "
            "shifted by one, or logits taken for log-probabilities do this."
        )
    return f"loss of teacher and teacher {value:.1e}"


def _own_logits(agreed: Offer, reply: Reply, head: Callable[[], Head]) -> torch.Tensor | None:
    """Logits (batch, seq, vocab) float32 of a student that is the teacher, as far as the reply tells."""
    if "logits" in reply:
        return reply.logits.float()
    if "hidden" in reply:
        return head()(reply.hidden).float()
    if "topk_logprobs" not in reply or agreed.words is None or agreed.temperatures != (1.0,):
        return None
    k = reply["topk_logprobs"].shape[-1]
    each = reply["tail_logmass"] - float(np.log(max(1, agreed.words - k)))
    whole = each.expand(*each.shape[:-1], agreed.words).contiguous()
    return whole.scatter(-1, reply["topk_ids"].long(), reply["topk_logprobs"])
