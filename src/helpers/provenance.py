"""Where a record's numbers come from: the source of the helpers, the commit, the device."""

import hashlib
import platform
import re
import shutil
import subprocess
import sys
import warnings
from collections.abc import Iterable
from pathlib import Path

from helpers import __version__, files
from helpers.tracing import NO_COMPUTE

_PACKAGE = Path(__file__).resolve().parent


def helpers_sha256(names: Iterable[str] | None = None) -> str:
    """Return one SHA-256 of the source of helpers that compute numbers, of what `sha256sum` prints; None: of all."""
    computing = (path for path in sorted(_PACKAGE.glob("*.py")) if path.stem not in NO_COMPUTE)
    sums = (f"{files.sha256(path)}  {path.name}\n" for path in computing if names is None or path.stem in names)
    return hashlib.sha256("".join(sums).encode()).hexdigest()


def loaded() -> list[str]:
    """Return the names of the modules of helpers that compute numbers and have been imported."""
    names = (name.removeprefix("helpers.") for name in sys.modules if name.startswith("helpers."))
    return sorted(name for name in names if name not in NO_COMPUTE and "." not in name)


def revision(root: Path | None = None) -> tuple[str, bool | None]:
    """Return the commit and whether the code differs from it; outside a checkout the version of the helpers, None.

    root : the checkout; None: the one that these helpers are in.
    """
    root, git = root or _PACKAGE.parents[1], shutil.which("git")
    # else installed, perhaps in the environment of another project, or a download unpacked within a repository
    if git and (root / "book/claims.yml").exists() and (root / ".git").exists():
        command = [git, "--no-optional-locks", "status", "--porcelain=v2", "--branch"]
        made_by = ["src", "notebooks", "book/claims.yml"]
        done = subprocess.run([*command, *made_by], cwd=root, capture_output=True, text=True)
        if found := done.stdout.splitlines():
            return found[0].split()[-1], any(not line.startswith("#") for line in found)
        warnings.warn(f"git does not tell the commit: {done.stderr.strip()}", stacklevel=2)
    return f"v{__version__}", None


def device() -> str:
    """Return the name of the GPU where TensorFlow, once it is imported, sees one, else of the processor."""
    tf = sys.modules.get("tensorflow")
    for gpu in tf.config.list_physical_devices("GPU") if tf else []:
        return tf.config.experimental.get_device_details(gpu).get("device_name", gpu.name)
    cpuinfo = Path("/proc/cpuinfo")
    model = re.search(r"model name\s*: (.+)", cpuinfo.read_text() if cpuinfo.exists() else "")
    return model[1] if model else platform.processor() or platform.machine()
