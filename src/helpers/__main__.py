"""`python -m helpers`: errors that a user can act on end it with their message instead of a traceback."""

import sys

from helpers.book import BookError
from helpers.cli import main

if __name__ == "__main__":  # a chapter's process imports this module again
    try:
        main(prog_name="python -m helpers")
    except (BookError, ValueError, OSError) as error:
        sys.exit(f"Error: {error}")
