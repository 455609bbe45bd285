"""Runs the benches of this folder, each in a process of its own, and prints their tables.

python scripts/bench/run.py [NAME ...]      all of them, or those named (samplers, networks, ...)
"""

import subprocess
import sys
from pathlib import Path

FOLDER = Path(__file__).parent
BENCHES = sorted(file.stem for file in FOLDER.glob("*.py") if file != Path(__file__))


def main() -> int:
    names = sys.argv[1:] or BENCHES
    unknown = [name for name in names if name not in BENCHES]
    if unknown:
        print(f"no bench named {', '.join(unknown)}; there are {', '.join(BENCHES)}", file=sys.stderr)
        return 2
    codes = []
    for name in names:
        print(f"== {name}", flush=True)
        codes.append(subprocess.run([sys.executable, FOLDER / f"{name}.py"], check=False).returncode)
        print(flush=True)
    return max(codes)


if __name__ == "__main__":
    sys.exit(main())
