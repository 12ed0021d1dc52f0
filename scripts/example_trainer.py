"""Distil a teacher into a student with HuggingFace's Trainer. Copy it and change what is yours.

    shmbridge-launch --config eight-gpus --teacher TEACHER -- scripts/example_trainer.py STUDENT TEXT --output_dir OUT
    shmbridge-launch --config cpu --teacher TEACHER -- scripts/example_trainer.py STUDENT TEXT --output_dir OUT --use_cpu

STUDENT: a model with its tokenizer and the teacher's vocabulary. TEXT: a file with one document a line. All settings of
TrainingArguments and DistillationConfig are flags, such as --gradient_accumulation_steps 4 --ce_weight 0.1. After a stop the same
command goes on from the last checkpoint in OUT.
"""

import sys
from pathlib import Path

from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    HfArgumentParser,
    TrainingArguments,
)
from transformers.trainer_utils import get_last_checkpoint

from shmbridge.integrations.transformers import DistillationConfig, DistillationTrainer

LENGTH = 512
student_path, text = sys.argv[1], Path(sys.argv[2])
parser = HfArgumentParser((TrainingArguments, DistillationConfig))
parser.set_defaults(ddp_find_unused_parameters=False)  # every weight gets a gradient: no search, no warning
args, distillation = parser.parse_args_into_dataclasses(sys.argv[3:])
tokenizer = AutoTokenizer.from_pretrained(student_path)
tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
dataset = [tokenizer(line, truncation=True, max_length=LENGTH) for line in text.read_text().splitlines()]
trainer = DistillationTrainer(
    model=AutoModelForCausalLM.from_pretrained(student_path),
    args=args,
    train_dataset=dataset,
    data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),  # labels are -100 at padding
    processing_class=tokenizer,
    distillation=distillation,
)
found = get_last_checkpoint(args.output_dir) if Path(args.output_dir).is_dir() else None
trainer.train(resume_from_checkpoint=found)
trainer.save_model()
