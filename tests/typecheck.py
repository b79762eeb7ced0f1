"""Strict mypy over every Python file of the repository.

`mypy .` would see a fraction of them and look green: the folders export/ and runtimes/ are imported as nsm.export and
nsm.runtimes, which only the installed package knows. So the package is checked where the strict editable install links
it, and the number of files that mypy saw is compared with the number that there are.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("nsm", "export", "runtimes")


def main() -> int:
    """Exit code: 0 if mypy saw every file and found nothing."""
    (linked,) = (ROOT / "build").glob("__editable__.*")
    wanted = sum(len(list((ROOT / room).rglob("*.py"))) for room in ROOMS)
    others = sorted(str(path) for folder in ("tests", "examples") for path in (ROOT / folder).rglob("*.py"))
    package = _mypy(["-p", "nsm"], linked, wanted)
    scripts = _mypy(["--explicit-package-bases", *others], linked, len(others))
    return package or scripts


def _mypy(arguments: list[str], folder: Path, wanted: int) -> int:
    command = [sys.executable, "-m", "mypy", "--config-file", str(ROOT / "pyproject.toml"), *arguments]
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    sys.stdout.write(result.stdout + result.stderr)
    seen = re.search(r"no issues found in (\d+) source files?", result.stdout)
    if result.returncode == 0 and (seen is None or int(seen[1]) != wanted):
        print(f"mypy checked {seen and seen[1]} files, but there are {wanted}: is one missing from pyproject.toml?")
        return 1
    return result.returncode


if __name__ == "__main__":
    sys.exit(main())
