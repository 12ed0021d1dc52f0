"""The trainers that people use. Each optional dependency is used in its own module, and never imported by it."""
