"""`python -m helpers`: errors that a user can act on end it with their message instead of a traceback."""

import os
import sys

from helpers.book import BookError
from helpers.cli import main

if __name__ == "__main__":  # a chapter's process imports this module again
    if sys.getfilesystemencoding() != "utf-8":  # as with LC_ALL=C: once more, and whatever it starts, in UTF-8
        os.execve(sys.executable, [sys.executable, "-m", "helpers", *sys.argv[1:]], os.environ | {"PYTHONUTF8": "1"})
    try:
        main(prog_name="python -m helpers")
    except (BookError, ValueError, OSError) as error:
        sys.exit(f"Error: {error}")
