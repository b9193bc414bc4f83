"""What the book counts: the cores that it may use, and the bytes that it may commit."""

import nbformat
import pytest
from conftest import RECORD
from nbformat.v4 import new_output

from helpers.book import MAX_BYTES, BookError, execute, publish


def test_a_container_s_share_of_the_cores_counts(tiny, monkeypatch):
    monkeypatch.setenv("LOKY_MAX_CPU_COUNT", "1")  # as joblib finds it in a control group, too
    book = tiny("import os", "assert os.environ['TF_NUM_INTRAOP_THREADS'] == '1'", RECORD)
    execute(book, book.chapters())


def test_publish_counts_bytes_and_not_characters(tiny):
    book = tiny("1")
    notebook, (executed, _) = book.source("02_tiny"), book.run("02_tiny")
    notebook.cells[-1].outputs = [new_output("stream", text="ε" * (MAX_BYTES // 2))]
    executed.parent.mkdir(parents=True)
    nbformat.write(notebook, executed)
    with pytest.raises(BookError, match=r"02_tiny: the executed copy has 2,\d{3},\d{3} bytes, more than 2,000,000"):
        publish(book, "02_tiny")
