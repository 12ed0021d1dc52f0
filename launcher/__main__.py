"""`python -m launcher`, in a checkout, is shmbridge-launch."""

import sys

from shmbridge.launch import main

sys.exit(main())
