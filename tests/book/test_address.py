"""The repository's address: written everywhere at once, and no link to it before there is one."""

import re
import shutil

import nbformat
import pytest
from conftest import RECORD, ROOT, command

from helpers.address import is_set, repository
from helpers.book import Book, same_code
from helpers.site import build, stage

FILES = ("_config.yml", "README.md", "CITATION.cff")


@pytest.fixture
def checkout(tmp_path):
    """A copy of the files that name the address, and their texts."""
    for name in FILES:
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "notebooks", tmp_path / "notebooks")
    shutil.copytree(ROOT / "book/executed", tmp_path / "book/executed")
    return tmp_path


def texts(folder):
    return {path: path.read_text() for path in folder.rglob("*") if path.is_file()}


def fresh(folder):
    """For each chapter, whether its committed copy has the code of its notebook."""
    book = Book(folder, folder / "_build")
    return [same_code(book.source(name), nbformat.read(book.committed(name)[0], 4)) for name in book.chapters()
            if book.committed(name)[0].exists()]


@pytest.mark.parametrize("url", ["https://github.com/me/repo", "https://github.com/me/my.repo-2.git"])
def test_it_is_written_to_all_files_and_can_be_changed_again(checkout, url):
    before = fresh(checkout)
    for new in (url, "https://github.com/us/other"):
        old = "/".join(repository(checkout))
        done = command("address", new, cwd=checkout)
        assert done.returncode == 0, done.stderr
        slug = new.removeprefix("https://github.com/").removesuffix(".git")
        assert is_set(checkout) and "/".join(repository(checkout)) == slug
        after = texts(checkout)
        assert not [path for path, text in after.items() if re.search(rf"github[^ ]*/{re.escape(old)}\b", text)]
        named = {path.relative_to(checkout).parts[0] for path, text in after.items() if slug in text}
        assert named == {*FILES, "notebooks", "book"}
        assert f"<https://colab.research.google.com/github/{slug}/blob/main/" in after[checkout / "README.md"]
        assert fresh(checkout) == before, "only an address has changed"


@pytest.mark.parametrize("url", ["", "me/repo", "http://github.com/me/repo", "https://github.com/me",
                                 "https://gitlab.com/me/repo", "https://github.com/me/repo/tree/main",
                                 "https://github.com/OWNER/repo", "https://github.com/me/re po"])
def test_another_form_is_refused_and_nothing_is_written(checkout, url):
    before = texts(checkout)
    done = command("address", url, cwd=checkout)
    assert done.returncode == 1 and done.stderr == f"Error: URL: got {url!r}, expected https://github.com/<owner>/<name>\n"
    assert texts(checkout) == before


def test_a_site_without_an_address_has_no_button_that_leads_nowhere(tiny):
    book = tiny(RECORD)
    shutil.copy(ROOT / "book/index.md.jinja", book.root / "book")
    config, pages = book.root / "_config.yml", []
    for owner in ("OWNER", "me"):
        config.write_text(re.sub(r"github\.com/[\w-]+/", f"github.com/{owner}/", config.read_text()))
        stage(book)
        rocket = "Press the rocket" in (book.output / "stage/book/index.md").read_text()
        (book.output / "stage/book/index.md").write_text("# Index\n")
        build(book)
        pages.append((rocket, (book.output / "html/notebooks/02_tiny.html").read_text()))
    (said, without), (says, page) = pages
    name = repository(book.root)[1]
    assert not said and not re.search(r'href="[^"]*(github|colab)', without)
    colab = f"https://colab.research.google.com/github/me/{name}/blob/main/notebooks/02_tiny.ipynb"
    assert says and f'href="{colab}"' in page
    assert f'href="https://github.com/me/{name}"' in page and f"github.com/me/{name}/issues/new" in page
