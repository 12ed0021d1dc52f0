"""A teacher of one's own: hidden states and a value for each token. Copy it and return what your loss needs.

shmbridge-launch --teacher scripts.custom_teacher:build teacher.args='{path: MODEL}' ... -- train.py ...
"""

import torch
from transformers import AutoModel


def build(settings):
    """Called once in the teacher's process; `settings.teacher.args` is free-form. Returns forward(batch)."""
    body = AutoModel.from_pretrained(settings.teacher.args["path"])
    head = torch.nn.Linear(body.config.hidden_size, 1)  # load your own weights here
    device = "cuda:0" if settings.teacher.gpus else "cpu"
    model = torch.nn.ModuleDict({"body": body, "head": head}).to(device, torch.float32).eval()

    def forward(batch):
        """batch.input_ids, batch.attention_mask (or None): (rows, seq) on the teacher's device, ranks combined."""
        hidden = model["body"](input_ids=batch.input_ids, attention_mask=batch.attention_mask).last_hidden_state
        return {"hidden": hidden, "value": model["head"](hidden).squeeze(-1)}

    forward.vocab_size = body.config.vocab_size  # a larger token ID is then refused in the rank that sends it
    return forward
