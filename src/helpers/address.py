"""The repository's address: `_config.yml` has it, and the set-up cells, the README and the citation repeat it."""

import re
from pathlib import Path

import yaml

from helpers.files import atomic

_PLACEHOLDER = "OWNER"  # in place of whoever hosts the repository
_REPEATED = ("README.md", "CITATION.cff", "notebooks/*.ipynb", "book/executed/*.ipynb",
             "_config.yml")  # last: where writing stops half-way, it can be done again


def repository(root: Path) -> tuple[str, str]:
    """Return owner and name of the repository, from the address in `_config.yml`."""
    url = yaml.safe_load((root / "_config.yml").read_text(encoding="utf-8"))["repository"]["url"]
    return tuple(url.removeprefix("https://github.com/").split("/"))


def is_set(root: Path) -> bool:
    """Whether the repository has an address, and not the placeholder: a link to that would lead nowhere."""
    return repository(root)[0] != _PLACEHOLDER


def move(root: Path, url: str) -> list[Path]:
    """Write `url`, https://github.com/<owner>/<name>, wherever the old address stands; return the files that changed.

    What the README shows as code because it led nowhere becomes a link.
    Raises ValueError for an address of another form, before anything is written.
    """
    new = re.fullmatch(r"https://github\.com/([A-Za-z\d][A-Za-z\d-]*)/([\w.-]+?)(?:\.git)?/?", url)
    if not new or new[1] == _PLACEHOLDER:
        raise ValueError(f"URL: got {url!r}, expected https://github.com/<owner>/<name>")
    old = re.compile(rf"(github(?:\.com)?/){re.escape('/'.join(repository(root)))}(?![\w-])")
    texts = {path: path.read_text(encoding="utf-8") for pattern in _REPEATED for path in sorted(root.glob(pattern))}
    moved = {path: old.sub(rf"\g<1>{new[1]}/{new[2]}", text) for path, text in texts.items()}
    readme = root / "README.md"
    moved[readme] = re.sub(r"`(https://colab\.[^`]+)`", r"<\1>", moved[readme])
    changed = [path for path in moved if moved[path] != texts[path]]
    for path in changed:
        with atomic(path) as partial:
            partial.write_text(moved[path], encoding="utf-8")
    return changed
