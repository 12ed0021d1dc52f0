"""`python -m launcher` is shmbridge-launch."""

import sys

from launcher.cli import main

sys.exit(main())
