"""`python -m launcher`, in a checkout, is shmbridge-launch."""

import sys

from launcher.cli.main import main

sys.exit(main())
