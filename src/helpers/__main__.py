"""`python -m helpers`."""

from helpers.cli import main

if __name__ == "__main__":  # a chapter's process imports this module again
    main(prog_name="python -m helpers")
