"""The trainers that people use.

transformers   distillation in HuggingFace's Trainer, and in trainers that derive from it
accelerate     reading ahead of a loop over a loader that accelerate prepared
"""
