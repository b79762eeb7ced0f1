"""Strict mypy over every Python file of the repository.

`mypy .` would see a fraction of them and look green: the folders export/ and runtimes/ are imported as nsm.export and
nsm.runtimes, which only the installed package knows. So the package is checked where the strict editable install links
it, and the number of files that mypy saw is compared with the number that there are.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("nsm", "export", "quantization", "runtimes")


def main() -> int:
    """Exit code: 0 if mypy saw every file and found nothing."""
    (linked,) = (ROOT / "build").glob("__editable__.*")
    rooms = sum(len(list((ROOT / room).rglob("*.py"))) for room in ROOMS)
    tests, examples = (sorted(map(str, (ROOT / name).rglob("*.py"))) for name in ("tests", "examples"))
    codes = [
        _mypy(["-p", "nsm"], linked, rooms),
        _mypy(["--explicit-package-bases", *tests], linked, len(tests), ROOT),
        _mypy(["--explicit-package-bases", *examples], linked, len(examples), ROOT / "examples"),
    ]
    return max(codes)


def _mypy(arguments: list[str], linked: Path, wanted: int, base: Path | None = None) -> int:
    """Run in the linked package, so that `nsm` is found there whole; `base` is where the scripts' own modules lie."""
    command = [sys.executable, "-m", "mypy", "--config-file", str(ROOT / "pyproject.toml"), *arguments]
    environment = {**os.environ, "MYPYPATH": os.pathsep.join(str(path) for path in (linked, base) if path)}
    result = subprocess.run(command, cwd=linked, env=environment, capture_output=True, text=True, check=False)
    sys.stdout.write(result.stdout + result.stderr)
    seen = re.search(r"no issues found in (\d+) source files?", result.stdout)
    if result.returncode == 0 and (seen is None or int(seen[1]) != wanted):
        print(f"mypy checked {seen and seen[1]} files, but there are {wanted}: is one missing from pyproject.toml?")
        return 1
    return result.returncode


if __name__ == "__main__":
    sys.exit(main())
