"""What each payload costs: `python scripts/payloads.py [words] [width]` prints bytes per position of a teacher.

The defaults are those of Llama-3.1-8B: 128,256 words and hidden states of 4,096 numbers in bfloat16.
"""

from __future__ import annotations

import sys

from shmbridge import config
from shmbridge.output_spec import HeadSpec, payload_outputs
from shmbridge.shm import layout

ROWS = (
    ("payload.logits={dtype: float32}", "everything, as it is"),
    ("payload.logits={}", "everything, in bfloat16; small vocabularies, short rows"),
    ("payload.hidden={}", "everything, exact: the rank applies the teacher's head in chunks"),
    ("payload.topk={k: 64}", "KL on 64 words and the rest's exact mass as one more"),
    ("payload.topk={k: 256, temperatures: [1, 2]}", "the same at two temperatures"),
    ("payload.logprobs={}", "the log-probability of each next token"),
    ("payload.logprobs={entropy: true, candidates: 16}", "on-policy: 16 words per position that the student chose"),
)


def main(words: int = 128_256, width: int = 4096) -> None:
    print(f"{words:,} words, hidden states of {width:,} numbers\n")
    print(f"{'setting, as it is typed':<52}{'bytes per position':>18}   what it is for")
    for setting, purpose in ROWS:
        payload = config.load(overrides=[setting]).payload
        nbytes = sum(spec.item_bytes for spec in payload_outputs(payload, words, width, "bfloat16"))
        typed = f"'{setting}'" if " " in setting else setting
        print(f"{typed:<52}{nbytes:>18,}   {purpose}")
    head = layout.head_bytes(HeadSpec("bfloat16", words, width))
    print(f"\npayload.hidden shares the output head once per session: {head / 2**20:,.0f} MiB")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
