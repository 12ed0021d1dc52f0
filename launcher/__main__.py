"""`python -m launcher`, in a checkout, is shmbridge-launch."""

import sys

from launcher.cli import main

sys.exit(main())
