"""Texts: local files of every kind, splits that never overlap, full windows, the papers' protocols."""

import gzip
import json
import random

import pandas
import pytest
import torch
from conftest import TEXT, tiny_llama

from proxsparse import text
from proxsparse.errors import RunError, UsageError
from proxsparse.model import embedded
from proxsparse.text import calibration_windows, check_ctx_len, evaluation_windows, load_documents

DOCUMENTS = [f"Document {i}: {TEXT}" for i in range(16)]


def write(folder, kind):
    path = folder / f"text.{kind}"
    lines = "".join(json.dumps({"text": d}) + "\n" for d in DOCUMENTS)
    if kind == "jsonl":
        path.write_text(lines)
    elif kind == "json.gz":
        path.write_bytes(gzip.compress(lines.encode()))
    elif kind == "parquet":
        pandas.DataFrame({"text": DOCUMENTS, "other": 1}).to_parquet(path)
    else:
        path.write_text(DOCUMENTS[0])
    return path


@pytest.mark.parametrize("kind", ["jsonl", "json.gz", "parquet"])
def test_tables_give_one_document_a_row(tmp_path, kind):
    assert list(load_documents(str(write(tmp_path, kind)))) == DOCUMENTS


def test_a_text_file_is_one_document_and_a_folder_is_all_its_files(tmp_path):
    assert list(load_documents(str(write(tmp_path, "txt")))) == [DOCUMENTS[0]]
    write(tmp_path, "jsonl")
    (tmp_path / "ignored.bin").write_bytes(b"\0")
    assert len(load_documents(str(tmp_path))) == 17


@pytest.mark.parametrize("count", [1, 3, 16, 50])
def test_calibration_and_held_out_text_never_overlap(tmp_path, count):
    for i in range(count):
        (tmp_path / f"{i:03}.txt").write_text("".join(chr(0x4E00 + 100 * i + k) for k in range(80)))
    calibration = set("".join(load_documents(str(tmp_path), "calibration")))
    heldout = set("".join(load_documents(str(tmp_path), "heldout")))
    everything = set("".join(load_documents(str(tmp_path))))
    assert calibration
    assert heldout
    assert not calibration & heldout
    assert calibration | heldout == everything


def test_calibration_windows_are_full_seeded_and_from_many_documents(corpus, tokenizer):
    windows = calibration_windows(corpus, tokenizer, 64, 12, seed=1)
    assert windows.shape == (12, 64)
    assert torch.equal(windows, calibration_windows(corpus, tokenizer, 64, 12, seed=1))
    assert not torch.equal(windows, calibration_windows(corpus, tokenizer, 64, 12, seed=2))
    starts = [tokenizer.decode(w).count("Document") for w in windows]
    assert sum(starts) >= 10  # the first span of every document comes before the second of any


def test_every_calibration_token_is_text(corpus, tokenizer):
    everything = "".join(load_documents(corpus, "calibration"))
    for window in calibration_windows(corpus, tokenizer, 32, 8, seed=0):
        halves = tokenizer.decode(window)
        assert any(halves[: k or None] in everything and halves[k:] in everything for k in range(len(halves)))


def test_too_little_text_says_how_much_there_is(corpus, tokenizer):
    with pytest.raises(
        UsageError, match=r"has [\d,]+ tokens, enough for \d+ samples of `ctx_len=64`, but `samples` is 999"
    ):
        calibration_windows(corpus, tokenizer, 64, 999, seed=0)
    with pytest.raises(UsageError, match=r"too few for one window of `ctx_len=100000`"):
        evaluation_windows(corpus, tokenizer, 100000)


def test_evaluation_windows_follow_the_wikitext_protocol(monkeypatch, tokenizer):
    monkeypatch.setattr(text, "_from_hub", lambda *args, split, **kwargs: [split, "", "some text " * 20])
    windows = evaluation_windows("wikitext2", tokenizer, 16)
    ids = tokenizer("\n\n".join(["test", "", "some text " * 20])).input_ids
    assert windows.flatten().tolist() == ids[: len(ids) // 16 * 16]


def test_c4_windows_are_those_of_random_seed_zero(monkeypatch, tokenizer):
    documents = [f"{i} " * (10 + i) for i in range(200)]
    monkeypatch.setattr(text, "_from_hub", lambda *args, **kwargs: documents)
    windows = evaluation_windows("c4", tokenizer, 64)
    assert windows.shape == (256, 64)
    rng = random.Random(0)
    while True:
        ids = tokenizer(documents[rng.randint(0, 199)]).input_ids
        if len(ids) >= 64:
            break
    start = rng.randint(0, len(ids) - 64)
    assert windows[0].tolist() == ids[start : start + 64]


def test_c4_new_is_the_first_documents_joined_by_spaces(monkeypatch, tokenizer):
    documents = [f"document {i}" for i in range(3000)]
    monkeypatch.setattr(text, "_from_hub", lambda *args, **kwargs: documents)
    ids = tokenizer(" ".join(documents[:1100])).input_ids
    assert evaluation_windows("c4_new", tokenizer, 16).flatten().tolist() == ids[: min(256 * 16, len(ids) // 16 * 16)]


def test_a_limit_takes_windows_from_the_whole_text(corpus, tokenizer):
    whole = evaluation_windows(corpus, tokenizer, 32)
    part = evaluation_windows(corpus, tokenizer, 32, limit=4)
    assert part.shape == (4, 32)
    assert torch.equal(part, whole[:: len(whole) // 4][:4])


def test_an_unknown_corpus_lists_the_known_ones():
    with pytest.raises(UsageError, match="must be one of wikitext2, c4, c4_new, wiki, news, or an existing file"):
        load_documents("wikitext3")


def test_an_unreachable_hub_names_the_way_out(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(RunError, match="can't be loaded from the Hub .* embedded texts: wiki or news"):
        load_documents("wikitext2")


def test_a_context_beyond_the_positions_is_refused():
    with pytest.raises(UsageError, match="`ctx_len` must be between 8 and 128, the positions this model has; got 129"):
        check_ctx_len(129, tiny_llama().config)
    check_ctx_len(128, tiny_llama().config)


def test_a_missing_data_package_says_how_to_get_it():
    with pytest.raises(RunError, match="data package no_such_package is not installed here: run script/setup.sh"):
        embedded.package_file("no_such_package", "x")


def test_the_embedded_texts_are_prose():
    pytest.importorskip("mwparserfromhell")
    articles, news = embedded.wikipedia(), embedded.news()
    assert len(articles) > 90
    assert len(news) == 300
    for article in articles:
        assert "{{" not in article
        assert "[[" not in article
        assert "<ref" not in article
