"""The rows of the promise table, each as a real run that is broken on purpose: see faults.py."""

from shmbridge.launch import load_launcher

load_launcher()
