"""The rendered site, read as a browser reads it: complete, without a remote request, the same on a plane."""

import json
import re
from html import escape
from html.parser import HTMLParser
from urllib.parse import unquote, urlsplit

import pandas as pd
import pytest
import yaml
from conftest import ROOT

from helpers import board
from helpers.address import is_set
from helpers.execution import status
from helpers.records import Record
from helpers.verdicts import claims

LOADED = {"link": ["href"], "img": ["src", "srcset"], "script": ["src"], "iframe": ["src"], "source": ["src", "srcset"],
          "video": ["src", "poster"], "audio": ["src"], "embed": ["src"], "object": ["data"], "use": ["href"]}
NOT_FETCHED = {"canonical", "next", "prev", "search", "index", "author", "copyright", "license"}
CSS_REQUEST = re.compile(r"""(?:@import\s+|url\(\s*)["']?((?:https?:)?//[^"')\s]+)""")


class Page(HTMLParser):
    """What a page asks a browser to load, where it links to, its anchors, images and inline styles."""

    def __init__(self, text):
        super().__init__()
        self.loads, self.links, self.ids, self.images, self.css = [], [], set(), [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        self.ids |= {values.get("id"), values.get("name")} - {None}
        self.css.append(values.get("style") or "")
        self.images += [values] if tag == "img" else []
        self.links += [values["href"]] if tag == "a" and "href" in values else []
        if not (tag == "link" and set((values.get("rel") or "").split()) & NOT_FETCHED):
            self.loads += [values[name] for name in LOADED.get(tag, []) if values.get(name)]

    def handle_data(self, data):
        self.css += [data] if self.lasttag == "style" else []


@pytest.fixture(scope="module")
def folder(site):
    return site.output / "html"


@pytest.fixture(scope="module")
def pages(folder):
    found = {path: Page(path.read_text()) for path in folder.rglob("*.html") if "_static" not in path.parts}
    assert len(found) > 8
    return found


def remote(address):
    """Whether a browser would leave the site for this address."""
    return bool(re.match(r"(?:https?:)?//", address))


def requests(page, text):
    """Remote addresses that a page or style sheet makes a browser load."""
    return [address for address in page.loads if remote(address)] + CSS_REQUEST.findall(text)


@pytest.mark.parametrize("html", [
    '<script src="https://cdn.example/x.js"></script>', '<link rel="stylesheet" href="//fonts.example/a.css">',
    '<img src="https://example.org/i.png">', '<style>@import "https://example.org/a.css"</style>',
    '<p style="background: url(https://example.org/b.png)">',
])
def test_the_check_for_remote_requests_sees_them(html):
    page = Page(html)
    assert requests(page, "\n".join(page.css))


def test_pages_make_no_remote_request(pages):
    found = {path.name: requests(page, "\n".join(page.css)) for path, page in pages.items()}
    assert not any(found.values()), found


def test_style_sheets_make_no_remote_request(folder):
    found = {path.name: CSS_REQUEST.findall(path.read_text()) for path in folder.rglob("*.css")}
    assert found and not any(found.values()), found


def test_scripts_of_the_pages_load_nothing_from_elsewhere(pages, folder):
    """No address in a script that a page loads names a script, style sheet, font or data of another host.

    MathJax names one, an XPath library that it fetches only in a browser without XPath; no such browser is left.
    """
    addresses = ((path, address) for path, page in pages.items() for address in page.loads)
    loaded = {(path.parent / urlsplit(address).path).resolve() for path, address in addresses}
    scripts = [path for path in loaded if path.suffix == ".js"]
    asks = re.compile(r"""["'`]((?:https?:)?//[^"'`\s]+\.(?:m?js|css|woff2?|json)(?:[?#][^"'`]*)?)["'`]""")
    found = {path.name: [address for address in asks.findall(path.read_text()) if "wicked-good-xpath" not in address]
             for path in scripts}
    assert scripts and not any(found.values()), found


def test_links_and_files_within_the_site_exist(pages):
    for path, page in pages.items():
        for address in page.links + page.loads:
            parts = urlsplit(address)
            if parts.scheme or remote(address):
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            assert target.exists(), f"{path.name}: {address}"
            if parts.fragment and target in pages:
                assert unquote(parts.fragment) in pages[target].ids, f"{path.name}: {address}"


def test_the_site_and_its_pages_are_light(pages, folder):
    """30 MB in all; 3 MB a page with its pictures, beside what all pages share."""
    assert sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) < 30e6
    for path, page in pages.items():
        files = (image["src"] for image in page.images if not image["src"].startswith("data:"))
        pictures = {path.parent / unquote(file) for file in files}
        assert sum(file.stat().st_size for file in {path, *pictures}) < 3e6, path.name


def test_every_page_of_the_contents_is_there(folder):
    toc = yaml.safe_load((ROOT / "_toc.yml").read_text())
    for file in [toc["root"], *(chapter["file"] for part in toc["parts"] for chapter in part["chapters"])]:
        assert (folder / f"{file}.html").exists(), file
    assert "_static/book.css" in (folder / "book/index.html").read_text()
    assert "url=book/index.html" in (folder / "index.html").read_text().replace('"', "").replace("'", "")


def test_every_picture_has_a_text(pages):
    for path, page in pages.items():
        for image in page.images:
            assert (image.get("alt") or "").strip(), f"{path.name}: {image.get('src', '')[:80]}"


def test_mathematics_is_served_from_here(pages, folder):
    users = [path for path in pages if 'class="math' in path.read_text()]
    assert users
    for path in users:
        assert any("_static/mathjax/tex-chtml.js" in address for address in pages[path].loads), path
    assert list((folder / "_static/mathjax").rglob("*.woff"))
    spoken = {path.stem for path in folder.glob("_static/mathjax/sre/mathmaps/*")}  # for MathJax's own menu
    assert spoken == {"base", "en"}


def test_search_finds_the_primer(folder):
    assert "book/primer" in (folder / "searchindex.js").read_text()


def test_pages_name_no_place_of_this_machine(pages, site):
    for path in pages:
        text = path.read_text()
        for place in (f"{ROOT}/", f"{site.output}/", "/tmp/ipykernel"):
            assert place not in text, f"{path.name}: {place}"


def test_chapters_have_card_downloads_and_a_way_to_colab(site, folder, pages):
    repository = yaml.safe_load((ROOT / "_config.yml").read_text())["repository"]
    name = repository["url"].removeprefix("https://github.com/")
    colab = f"https://colab.research.google.com/github/{name}/blob/{repository['branch']}/notebooks"
    assert any(map(site.shown, site.chapters()))
    assert not [link for page in pages.values() for link in page.links if "/OWNER/" in link]
    for chapter in filter(site.shown, site.chapters()):
        path = folder / f"notebooks/{chapter}.html"
        text, links = path.read_text(), pages[path].links
        known = yaml.safe_load((ROOT / "book/errata.yml").read_text(encoding="utf-8")).get(chapter, {})
        record = Record.load(site.committed(chapter)[1]).judged_again(known.get("withdrawn", []))
        assert f"Profile shown: {record.profile}." in text and "chapter-card" in text
        assert record.created[:10] in text and record.provenance.device in text
        assert (f"{colab}/{chapter}.ipynb" in links) == is_set(ROOT)
        for suffix in ("ipynb", "json", "csv"):
            assert any(link.endswith(f"{chapter}.{suffix}") for link in links)
        assert Record.load(next(folder.glob(f"_downloads/*/{chapter}.json"))) == record
        found = pd.read_csv(next(folder.glob(f"_downloads/*/{chapter}.csv")))
        assert set(found["Claim"]) == {claim.id for claim in record.claims}


def test_the_first_page_begins_with_an_adversarial_example(folder):
    """The picture under the title of a chapter, before the first heading of a part, with a text of its own."""
    first = (folder / "book/index.html").read_text().split('<section id="the-results-at-a-glance">')[0]
    assert re.search(r'<img alt="[^"]+" src="\.\./_images/03_blur_preprocessing-[^"]+\.png"', first)
    assert "a change that nobody would notice" in first.replace("\n", " ")


def test_code_on_the_board_is_not_cut_off_on_the_page():
    assert all(len(line) <= 78 for line in (ROOT / "book/my_defence.py").read_text().splitlines())


def test_the_ledger_shows_every_claim(folder):
    text = (folder / "book/ledger.html").read_text()
    assert all(f"<code>{name}</code>" in text for name in claims())
    rows = json.loads(next(folder.glob("_downloads/*/ledger.json")).read_text())
    assert {row["Claim"] for row in rows} == set(claims())


def test_the_board_shows_its_rows_or_that_there_are_none(site, folder):
    text = (folder / "book/board.html").read_text()
    rows = json.loads(next(folder.glob("_downloads/*/board.json")).read_text())
    frame = pd.read_csv(next(folder.glob("_downloads/*/board.csv")))
    assert rows == board.kept(ROOT) and len(frame) == len(rows) and list(frame.columns) == list(board.COLUMNS)
    assert ("There is no record yet" in text) == (not rows) and "Doubter" in text
    assert text.count("<tr><td") == max(1, len(rows)) and list(folder.glob("_downloads/*/my_defence.py"))


def test_the_status_page_says_what_is_shown_and_that_nothing_was_executed(site, folder):
    text = (folder / "book/status.html").read_text()
    assert not status(site) and "No chapter was executed on this machine." in text
    for chapter in filter(site.shown, site.chapters()):
        executed, record = site.committed(chapter)
        fresh = escape(" ".join(site.changed(executed, record)) or "yes", quote=False)
        assert re.search(rf"{chapter}\.html.*?<p>paper</p>.*?<p>{Record.load(record).created[:10]} .*?<p>{fresh}</p>",
                         text.replace("’", "'"), re.DOTALL), chapter


def test_a_page_that_is_not_fresh_says_so(site, folder):
    for chapter in filter(site.shown, site.chapters()):
        text = (folder / f"notebooks/{chapter}.html").read_text().replace("’", "'")
        for sentence in ("The notebook's code has changed since this run.", "computed with earlier helpers."):
            assert (sentence in text) == (sentence in " ".join(site.changed(*site.committed(chapter)))), chapter
