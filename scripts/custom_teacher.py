"""A teacher of one's own: hidden states and a value for each token. Copy it and return what your loss needs.

shmbridge-launch --teacher scripts.custom_teacher:build teacher.args='{path: MODEL}' ... -- train.py ...
"""

import torch
from transformers import AutoModel


def build(settings):
    """Called once, in the teacher's process; `settings.teacher.args` is free-form. Returns forward(batch)."""
    device = "cuda:0" if settings.teacher.gpus else "cpu"
    body = AutoModel.from_pretrained(settings.teacher.args["path"]).to(device).eval()
    head = torch.nn.Linear(body.config.hidden_size, 1).to(device, body.dtype)  # load weights of your own here

    def forward(batch):
        """batch.input_ids, batch.attention_mask (or None): (rows, seq) on the teacher's device, ranks combined."""
        hidden = body(input_ids=batch.input_ids, attention_mask=batch.attention_mask).last_hidden_state
        return {"hidden": hidden, "value": head(hidden).squeeze(-1)}

    forward.vocab_size = body.config.vocab_size  # a larger token ID is then refused in the rank that sends it
    return forward
