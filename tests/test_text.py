"""Texts: local files of every kind, splits that never overlap, full windows, the papers' protocols."""

import bz2
import gzip
import json
import lzma
import random

import pandas
import pyarrow
import pyarrow.parquet
import pytest
import torch
from conftest import TEXT, byte_tokenizer, tiny_llama
from datasets import Dataset, DatasetDict
from tokenizers import processors

from proxsparse import text
from proxsparse.errors import RunError, UsageError, task_of
from proxsparse.model import documents, embedded, rows
from proxsparse.model.generating import sample_tokens
from proxsparse.model.windows import check_ctx_len
from proxsparse.text import (
    adds_bos,
    calibration_windows,
    evaluation_windows,
    load_documents,
    own_windows,
    parts_of,
)

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


def lines_of(*rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


@pytest.mark.parametrize("ending", ["jsonl", "JSONL", "json", "Json.GZ", "jsonl.gz"])
def test_json_gives_the_strings_in_text_whatever_other_fields_hold(tmp_path, ending):
    rows = [
        {"text": "a b", "x": 1},
        {"x": "s"},
        {"text": None, "x": [2]},
        {"text": "c\r\n \u2028 d", "x": {}, "new": 1},
    ]
    content = ("\ufeff" + lines_of(*rows).replace("\n", "\r\n\r\n")).encode()
    path = tmp_path / f"train[1].{ending}"
    path.write_bytes(gzip.compress(content, mtime=0) if ending.lower().endswith("gz") else content)
    assert list(load_documents(str(path))) == ["a b", "c\r\n \u2028 d"]


@pytest.mark.parametrize("layout", ["[%s]", "[\n%s\n]\n"])
def test_an_array_of_json_is_its_rows(tmp_path, layout):
    (tmp_path / "a.json").write_text(layout % ",\n".join(json.dumps({"text": d}, indent=1) for d in "abc"))
    assert list(load_documents(str(tmp_path))) == ["a", "b", "c"]


def test_a_half_character_in_json_becomes_a_replacement_mark(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a \\ud800 b"}\n')
    assert list(load_documents(str(tmp_path / "a.jsonl"))) == ["a \ufffd b"]


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("list.jsonl", lines_of({"text": "a"}, {"text": ["b"]}), "'text' of .* is a list in row 2; give a string"),
        ("dict.json", lines_of({"text": {"0": "a"}}), "'text' of .* is an object in row 1"),
        ("number.jsonl", lines_of({"text": 5}), "'text' of .* is a number in row 1"),
        ("rows.jsonl", lines_of({"text": "a"}, 5), "row 2 is a number"),
        ("cut.jsonl", lines_of({"text": "a"}) + '{"text', "is not a readable json file .line 2"),
        ("wide.jsonl", b"\xff\xfe{\x00", "is not UTF-8 text"),
        ("none.parquet", b"", "is not a readable parquet file"),
        ("none.arrow", b"", "is not a readable arrow file"),
        ("cut.txt.gz", gzip.compress(b"text" * 99, mtime=0)[:-9], "is not a readable gz file"),
        ("wide.txt", "text".encode("utf-16"), "is not UTF-8 text"),
        ("none.jsonl", b"", "There is no text in"),
    ],
)
def test_text_that_is_no_text_is_said_in_one_sentence(tmp_path, name, content, sentence):
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UsageError, match=sentence) as caught:
        load_documents(str(tmp_path / name))
    assert "\n" not in str(caught.value)
    assert task_of(caught.value) == f"reading the text {tmp_path / name}"


@pytest.mark.parametrize(("values", "held"), [([1, 2], "int64"), ([["a"]], "list"), ([{"a": "b"}], "struct")])
def test_a_column_of_other_things_is_said_in_one_sentence(tmp_path, values, held):
    pandas.DataFrame({"text": values}).to_parquet(tmp_path / "a.parquet")
    with pytest.raises(UsageError, match=f"'text' of .* holds values of type {held}.*; give strings"):
        load_documents(str(tmp_path / "a.parquet"))


@pytest.mark.parametrize("kind", ["TXT", "Parquet", "txt.gz"])
def test_brackets_in_names_and_endings_in_either_case_are_read(tmp_path, kind):
    folder = tmp_path / "dir[2]"
    folder.mkdir()
    path = folder / f"train[1].{kind}"
    if kind == "Parquet":
        pandas.DataFrame({"text": DOCUMENTS[:1]}).to_parquet(path)
    else:
        path.write_bytes(gzip.compress(DOCUMENTS[0].encode()) if kind.endswith("gz") else DOCUMENTS[0].encode())
    assert list(load_documents(str(folder))) == list(load_documents(str(path))) == DOCUMENTS[:1]


def test_hidden_names_and_loops_in_a_folder_are_skipped(tmp_path):
    write(tmp_path, "txt")
    (tmp_path / ".git").mkdir()
    for name in ("._00.txt", ".hidden.jsonl", ".git/a.txt"):
        (tmp_path / name).write_bytes(b"\0\xff")
    (tmp_path / "loop.txt").symlink_to(tmp_path / "loop.txt")
    (tmp_path / "loop").symlink_to(tmp_path)
    assert list(load_documents(str(tmp_path))) == DOCUMENTS[:1]


def test_a_folder_of_save_to_disk_gives_its_rows(tmp_path):
    rows = Dataset.from_dict({"text": DOCUMENTS, "other": [1] * 16})
    DatasetDict({"train": rows}).save_to_disk(str(tmp_path / "saved"))
    (tmp_path / "saved" / "train" / "cache-12.arrow").write_bytes(b"another table")
    assert list(load_documents(str(tmp_path / "saved"))) == DOCUMENTS


def test_json_without_text_is_passed_over_next_to_files_that_have_text(tmp_path, caplog):
    (tmp_path / "dataset_infos.json").write_text(json.dumps({"default": {"features": {"text": {}}}}, indent=2))
    with pytest.raises(UsageError, match="dataset_infos.json needs a column 'text', and has default"):
        load_documents(str(tmp_path))
    write(tmp_path, "jsonl")
    assert list(load_documents(str(tmp_path))) == DOCUMENTS
    assert not caplog.records
    (tmp_path / "labels.json").write_text("[1, 2]")
    assert list(load_documents(str(tmp_path))) == DOCUMENTS
    assert "passed over: " in caplog.text


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


def long_text(count=30000, between=" "):
    """Words that never repeat, 1.9 MB: each tells where it stands."""
    return "".join(f"{i:05}\u00e9{'x' * 56}{between if i % 7 else chr(10) * 2}" for i in range(count))


@pytest.mark.parametrize("kind", ["txt", "txt.gz", "jsonl"])
@pytest.mark.parametrize("between", [" ", ""])
def test_a_long_text_is_many_documents_that_never_overlap(tmp_path, kind, between):
    whole = long_text(between=between)
    content = json.dumps({"text": whole}) if kind == "jsonl" else whole
    path = tmp_path / f"long.{kind}"
    path.write_bytes(gzip.compress(content.encode()) if kind.endswith("gz") else content.encode())
    calibration, heldout = load_documents(str(path), "calibration"), load_documents(str(path), "heldout")
    pieces = len(whole.encode()) // documents.PIECE
    assert (len(calibration), len(heldout)) == (pieces - pieces // 8, pieces // 8)
    turns = iter(calibration)
    found = [heldout[i // 8] if i % 8 == 7 else next(turns) for i in range(pieces)]
    assert "".join(found) == whole
    assert all(piece.endswith("\n\n") for piece in found[:-1])
    assert list(load_documents(str(path))) == [whole]


@pytest.mark.parametrize("letter", ["x", "\u4e2d"])
def test_a_long_text_without_spaces_is_cut_between_characters(tmp_path, letter):
    (tmp_path / "long.txt").write_text("\ufeff" + letter * 1_200_000, encoding="utf-8")
    parts = [load_documents(str(tmp_path), split) for split in ("calibration", "heldout")]
    assert "".join(d for part in parts for d in part) == letter * 1_200_000


def test_calibration_reads_only_the_pieces_it_needs(tmp_path, monkeypatch, tokenizer):
    (tmp_path / "long.txt").write_text(long_text(60000))
    read = []
    piece = documents._piece
    monkeypatch.setattr(documents, "_piece", lambda data, path, i: read.append(i) or piece(data, path, i))
    windows = calibration_windows(str(tmp_path), tokenizer, 128, 8, seed=0)
    assert len(set(read)) <= 12  # of 58
    starts = {tokenizer.decode(w)[:5] for w in windows}
    assert len(starts) == 8  # each from another piece
    assert torch.equal(windows, calibration_windows(str(tmp_path), tokenizer, 128, 8, seed=0))
    assert all(tokenizer.decode(w) in long_text(60000) for w in windows)


@pytest.mark.parametrize(("bad", "sentence"), [(b"\xff", "is not UTF-8 text .byte 100000."), (b"\0", "is a binary")])
def test_damage_in_a_long_text_is_found_where_it_is_read(tmp_path, bad, sentence):
    data = bytearray(b"word " * 300_000)
    data[100_000:100_001] = bad
    (tmp_path / "long.txt").write_bytes(data)
    pieces = load_documents(str(tmp_path), "calibration")
    with pytest.raises(UsageError, match=sentence):
        list(pieces)
    data[:1] = b"\0"
    (tmp_path / "long.txt").write_bytes(data)
    with pytest.raises(UsageError, match="is a binary"):
        load_documents(str(tmp_path), "calibration")


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


@pytest.mark.parametrize("limit", [0, -1])
def test_a_limit_below_one_is_refused(limit, corpus, tokenizer):
    with pytest.raises(UsageError, match="`limit` must be a whole number of at least 1"):
        evaluation_windows(corpus, tokenizer, 16, limit=limit)


def test_a_limit_takes_windows_from_the_whole_text(corpus, tokenizer):
    whole = evaluation_windows(corpus, tokenizer, 32)
    part = evaluation_windows(corpus, tokenizer, 32, limit=4)
    assert part.shape == (4, 32)
    assert torch.equal(part, whole[:: len(whole) // 4][:4])


def with_bos(first):
    """A tokenizer of bytes with a BOS token, put first by the tokenizer itself or not."""
    made = byte_tokenizer()
    made.add_special_tokens({"bos_token": "<bos>"})
    if first:
        template = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", made.bos_token_id)])
        made.backend_tokenizer.post_processor = template
    return made


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("name", ["local", "c4", "c4_new"])
def test_with_bos_every_window_is_bos_and_text(monkeypatch, tmp_path, name, first):
    (tmp_path / "a.txt").write_text(DOCUMENTS[0])
    monkeypatch.setattr(text, "_from_hub", lambda *args, **kwargs: DOCUMENTS)
    tokenizer = with_bos(first)
    windows = evaluation_windows(str(tmp_path) if name == "local" else name, tokenizer, 32, bos=True)
    assert windows.shape[1] == 32
    assert windows[:, 0].tolist() == [tokenizer.bos_token_id] * len(windows)
    assert (windows[:, 1:] != tokenizer.bos_token_id).all()
    if name == "c4":
        assert all(any(tokenizer.decode(w[1:]) in d for d in DOCUMENTS) for w in windows[:5])
    else:
        whole = DOCUMENTS[0] if name == "local" else " ".join(DOCUMENTS)
        assert tokenizer.decode(windows[:, 1:].flatten()) == whole[: len(whole) // 31 * 31]


def test_adds_bos_tells_what_the_tokenizer_does(tokenizer, tmp_path):
    assert adds_bos(with_bos(first=True))
    assert not adds_bos(with_bos(first=False))
    assert not adds_bos(tokenizer)
    (tmp_path / "a.txt").write_text(DOCUMENTS[0])
    with pytest.raises(UsageError, match="`bos=True` needs a tokenizer with a BOS token"):
        evaluation_windows(str(tmp_path), tokenizer, 32, bos=True)
    with pytest.raises(UsageError, match="too few for one window of `ctx_len=999`"):
        evaluation_windows(str(tmp_path), with_bos(first=True), 999, bos=True)


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


@pytest.mark.slow
def test_the_embedded_texts_are_prose():
    pytest.importorskip("mwparserfromhell")
    articles, news = embedded.wikipedia(), embedded.news()
    assert len(articles) > 90
    assert len(news) == 300
    for article in articles:
        assert "{{" not in article
        assert "[[" not in article
        assert "<ref" not in article


def one_after_another(model):
    """A model that is sure of the next token: the one after the last, and EOS (0) after 256."""
    with torch.no_grad():
        for layer in model.model.layers:
            for weight in (layer.self_attn.o_proj.weight, layer.mlp.down_proj.weight):
                weight.zero_()
        angles = torch.arange(257) * (2 * torch.pi / 257)
        model.model.embed_tokens.weight.zero_()
        model.model.embed_tokens.weight[:, 0] = angles.cos()
        model.model.embed_tokens.weight[:, 1] = angles.sin()
        model.lm_head.weight.zero_()
        step = angles - 2 * torch.pi / 257
        model.lm_head.weight[:, 0] = 1e6 * step.cos()
        model.lm_head.weight[:, 1] = 1e6 * step.sin()
    return model


def test_a_model_writes_what_it_finds_likely_beyond_end_tokens(tokenizer):
    model = one_after_another(tiny_llama(tie_word_embeddings=False, eos_token_id=5))
    settings = model.generation_config
    found = sample_tokens(model, torch.tensor([[3], [250]]), 12, seed=0)
    assert found.tolist() == [[(first + i) % 257 for i in range(12)] for first in (3, 250)]
    assert model.generation_config is settings


def test_own_windows_are_seeded_full_and_leave_the_generators_alone(tokenizer):
    model, state = tiny_llama().train(), torch.get_rng_state()
    first = own_windows(model, tokenizer, 16, 5, seed=1)
    assert first.shape == (5, 16)
    assert first.dtype == torch.int64
    assert len({tuple(row) for row in first.tolist()}) == 5
    assert torch.equal(first, own_windows(model, tokenizer, 16, 5, seed=1))
    assert not torch.equal(first, own_windows(model, tokenizer, 16, 5, seed=2))
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training


def test_a_mixture_shares_out_the_samples(corpus, tokenizer, tmp_path):
    (tmp_path / "b.txt").write_text("b" * 4000)
    (tmp_path / "c.txt").write_text("c" * 4000)
    mixed = calibration_windows(f"{tmp_path}/b.txt:2,{tmp_path}/c.txt:1,self:1", tokenizer, 16, 12, 0, tiny_llama())
    b, c = (tokenizer(letter).input_ids[-1] for letter in "bc")
    kinds = ["b" if (row == b).all() else "c" if (row == c).all() else "self" for row in mixed]
    assert sorted(kinds) == ["b"] * 6 + ["c"] * 3 + ["self"] * 3
    assert kinds != sorted(kinds)
    assert parts_of("wiki") == {"wiki": 1}
    assert parts_of("wiki:2,news:1") == {"wiki": 2, "news": 1}
    assert parts_of("a:b,c") == {"a:b,c": 1}
    with pytest.raises(UsageError, match="`dataset=self` is text that the model writes itself"):
        calibration_windows("self", tokenizer, 16, 12, 0)
    with pytest.raises(UsageError, match="got 'nothing'"):
        calibration_windows("nothing:1,self:1", tokenizer, 16, 12, 0, tiny_llama())


def test_folders_that_are_links_are_read_once_and_hidden_names_are_not(tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "a.ndjson").write_text('{"text": "linked"}\n')
    texts = tmp_path / "texts"
    (texts / ".hidden").mkdir(parents=True)
    (texts / ".hidden" / "b.txt").write_text("hidden")
    (texts / "link").symlink_to(elsewhere)
    (elsewhere / "back").symlink_to(texts)
    assert list(load_documents(str(texts))) == ["linked"]


def test_a_mixture_without_shares_is_told_what_one_looks_like():
    with pytest.raises(UsageError, match=r"got 'wiki:2,self'\. A mixture gives each text a share, as wiki:2,news:1\."):
        load_documents("wiki:2,self")


LONG_ROWS = [f"row {i} " + "".join(chr(97 + (i * k) % 26) for k in range(500)) for i in range(4000)]  # 2 MB


def write_long(folder, kind):
    lines = "".join(json.dumps({"text": row, "id": i}) + "\n" for i, row in enumerate(LONG_ROWS)).encode()
    path = folder / f"rows.{kind}"
    if kind == "parquet":
        table = pyarrow.table({"text": LONG_ROWS, "id": range(4000)})
        pyarrow.parquet.write_table(table, path, row_group_size=900, compression="none")
    elif kind == "arrow":
        Dataset.from_dict({"text": LONG_ROWS}).save_to_disk(str(folder / "saved"))
        path = next((folder / "saved").glob("*.arrow")).rename(path)
    elif kind == "zst":
        with pyarrow.CompressedOutputStream(str(path.with_suffix(".jsonl.zst")), "zstd") as file:
            file.write(lines)
        path = path.with_suffix(".jsonl.zst")
    else:
        zip_ = {"jsonl": bytes, "jsonl.gz": gzip.compress, "jsonl.bz2": bz2.compress, "jsonl.xz": lzma.compress}[kind]
        path.write_bytes(zip_(lines))
    return path


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "jsonl.bz2", "jsonl.xz", "zst", "parquet", "arrow"])
def test_of_a_long_table_the_rows_that_are_needed_are_read(tmp_path, monkeypatch, tokenizer, kind):
    path = write_long(tmp_path, kind)
    calibration, heldout = (load_documents(str(path), split) for split in ("calibration", "heldout"))
    assert list(heldout) == LONG_ROWS[7::8]
    assert [row for i, row in enumerate(LONG_ROWS) if i % 8 != 7] == list(calibration)
    read = []
    for place in (rows.JsonLines, rows.Table):
        monkeypatch.setattr(
            place, "take", lambda self, numbers, own=place.take: read.extend(numbers) or own(self, numbers)
        )
    windows = calibration_windows(str(path), tokenizer, 128, 8, seed=0)
    assert len(set(read)) <= 9  # the first says that there is text
    assert all(tokenizer.decode(window) in "".join(calibration) for window in windows)
    order = list(range(3500))
    random.Random(0).shuffle(order)
    assert {tokenizer.decode(window) for window in windows} == {calibration[i][:128] for i in order[:8]}


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        (b'{"text": ', "is not a readable json file .row 3"),
        (b'{"text": "\xff"}', "is not UTF-8 text .byte 44"),
        (b'{"text": 5}', "'text' of .* is a number in row 3"),
        (b"[1]", "row 3 is a list"),
    ],
)
def test_damage_in_long_json_lines_is_found_where_it_is_read(tmp_path, row, sentence):
    line = b'{"text": "abc"}\n'
    (tmp_path / "long.jsonl").write_bytes(line + b"\r\n" + line[:-1] + b"\n" + row + b"\n" + line * 70_000)
    documents = load_documents(str(tmp_path), "calibration")
    assert documents[1] == "abc"
    with pytest.raises(UsageError, match=sentence):
        documents[2]


def test_a_long_table_without_text_and_a_long_row_are_told_and_read(tmp_path, tokenizer):
    (tmp_path / "none.jsonl").write_text('{"body": "abc"}\n' * 70_000)
    with pytest.raises(UsageError, match="needs a column 'text', and has body"):
        load_documents(str(tmp_path / "none.jsonl"), "calibration")
    lines = [json.dumps({"text": letter * size}) for letter, size in (("a", 20), ("b", 2_000_000), ("c", 20))]
    (tmp_path / "long.jsonl").write_text("\n".join([*lines, *lines[:1] * 10]))
    found = load_documents(str(tmp_path / "long.jsonl"), "calibration")
    assert sorted({text[:1]: len(text) for text in found}.items()) == [("a", 20), ("b", 1 << 20), ("c", 20)]
    (tmp_path / "few.jsonl").write_text(lines[1])
    whole = load_documents(str(tmp_path / "few.jsonl"), "calibration")
    assert sum(map(len, whole)) > 1_700_000


def test_of_very_many_documents_only_those_that_are_needed_are_shuffled(monkeypatch):
    monkeypatch.setattr(documents, "MANY", 10)
    texts = [str(i) for i in range(1000)]
    first = next(documents.shuffled(texts, random.Random(0), 5))
    every = [text for some in documents.shuffled(texts, random.Random(0), 5) for text in some]
    assert every[:5] == first
    assert sorted(every, key=int) == texts
    assert every != texts


def test_a_mixture_whose_name_is_longer_than_a_files_may_be_is_read():
    names = [f"a_text_with_a_name_of_its_own_{number:02}.jsonl" for number in range(12)]
    assert list(parts_of(",".join(f"{name}:1" for name in names))) == names
