"""Checks the licences of the packages of a lock; `make licences` runs it."""

from __future__ import annotations

import re
import sys
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement

# What a company may pass on in an image without asking anybody: permissive, MPL-2.0, whose terms end at its files, and
# LGPL-3.0, whose terms end at a library that can be exchanged, as pi-heif's libheif can.
ALLOWED = frozenset(
    {"0BSD", "Apache-2.0", "BSD-2-Clause", "BSD-3-Clause", "BSL-1.0", "CC0-1.0", "ISC", "MIT", "MIT-0", "MIT-CMU"}
    | {"BSD License", "LGPL-3.0-only", "MPL-2.0", "PSF-2.0", "ZPL-2.1", "Zlib"}
)
# What packages without a licence expression say instead, in a classifier or in words.
SAME = {
    "Apache Software License": "Apache-2.0",
    "Boost Software License": "BSL-1.0",
    "3-Clause BSD License": "BSD-3-Clause",
    "GNU Lesser General Public License v3 (LGPLv3)": "LGPL-3.0-only",
    "MIT License": "MIT",
    "Mozilla Public License 2.0 (MPL 2.0)": "MPL-2.0",
    "Zope Public License": "ZPL-2.1",
}
# insightface's metadata says nothing; its project says MIT of the code (the models are another matter: see the README).
SAID_ELSEWHERE = {"insightface": "MIT"}


def pinned(lock: str) -> list[str]:
    """The names of the packages that a lock has for the running Python on this platform."""
    requirements = [Requirement(found) for found in re.findall(r"^(\w[^\\\n]*)", lock, re.MULTILINE)]
    return [one.name for one in requirements if one.marker is None or one.marker.evaluate()]


def licence(package: Distribution) -> str:
    """What a package says of itself: an SPDX expression where there is one; empty when it says nothing."""
    says = package.metadata
    classifiers = [one for one in says.get_all("Classifier", []) if one.startswith("License :: ")]
    for said in (says.get_all("License-Expression", []), classifiers, says.get_all("License", [])):
        if any(said):
            names = [one.rpartition(" :: ")[2].strip() for one in said]
            return " AND ".join(SAME.get(one, one) for one in names)
    return SAID_ELSEWHERE.get(package.name, "")


def is_allowed(expression: str) -> bool:
    """Whether every licence of an SPDX expression is allowed, those of which one may choose among them."""
    named = {one for one in re.split(r"\s+(?:AND|OR)\s+|[()]", expression) if one}
    return bool(named) and named <= ALLOWED


def main(lock: Path) -> int:
    """List each package's licence; returns 1 if one is not allowed, not known or not installed."""
    objections = 0
    for name in pinned(lock.read_text("utf-8")):
        try:
            package = distribution(name)
        except PackageNotFoundError:
            version, said, verdict = "", "", "  <- not installed here"
        else:
            version, said = package.version, licence(package)
            verdict = "" if is_allowed(said) else "  <- not among the allowed"
        objections += bool(verdict)
        sys.stdout.write(f"{name:26} {version:14} {said}{verdict}\n")
    return int(objections > 0)


if __name__ == "__main__":
    raise SystemExit(main(Path(sys.argv[1])))
