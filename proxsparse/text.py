"""Texts: named and local texts, cut into calibration samples and evaluation windows.

    wikitext2          wikitext-2-raw-v1 from the Hub: train split to calibrate, test split to evaluate
    c4                 allenai/c4 en: first training shard to calibrate; 256 random validation windows to evaluate
    c4_new             as c4, evaluated on the first 1,100 validation documents joined by spaces
    wiki, news         the embedded texts (see ``proxsparse/model/embedded.py``): every eighth document is held out
    path               a .txt, .jsonl, .json (also zipped), .parquet or .arrow file, or a folder of them
                       (see ``proxsparse/model/documents.py``): every eighth document is held out

To calibrate there are two more:

    self               text that the dense model writes itself (see ``proxsparse/model/generating.py``)
    wiki:2,self:1      two parts of the one and one part of the other

Windows are tensors (n, ctx_len) of token ids, always full: nothing is padded.
"""

import os
import random
import re
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain, islice, zip_longest
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from proxsparse.errors import RunError, UsageError, check_switches, doing
from proxsparse.model import embedded
from proxsparse.model.documents import SPLITS, read_local, shuffled, split_of, text_stamp
from proxsparse.model.generating import sample_tokens
from proxsparse.model.hub_errors import offline
from proxsparse.model.source import name_of
from proxsparse.model.windows import check_tokenizer, check_whole

C4 = ("allenai/c4", "en/c4-train.00000-of-01024.json.gz", "en/c4-validation.00000-of-00008.json.gz")
WIKITEXT2 = ("Salesforce/wikitext", "wikitext-2-raw-v1")
EMBEDDED: dict[str, Callable[[], Sequence[str]]] = {"wiki": embedded.wikipedia, "news": embedded.news}
NAMED = ("wikitext2", "c4", "c4_new", *EMBEDDED)
SELF = "self"
C4_WINDOWS, C4_NEW_DOCUMENTS = 256, 1100
DOCUMENTS_AT_ONCE, CHARACTERS_AT_ONCE = 64, 1 << 18  # tokenised together: a tokenizer takes 100 bytes per character


def load_documents(name: str | os.PathLike, split: str = "all") -> Sequence[str]:
    """Documents of a text.

    Args:
        name: name or path, see the module docstring.
        split: 'calibration' and 'heldout' never share a document; 'all' is everything there is
            (of a Hub text: its evaluation split).

    Raises:
        UsageError: no such text or file, or nothing readable in it.
        RunError: the Hub can't be reached.
    """
    if split not in SPLITS:
        raise UsageError(f"split must be one of {', '.join(SPLITS)}; got {split!r}.")
    with doing(f"reading the text {name}"):
        return _load(name_of(name, "dataset"), split)


def _load(name: str, split: str) -> Sequence[str]:
    if name in EMBEDDED:
        return split_of(EMBEDDED[name](), split)
    if name == "wikitext2":
        return _from_hub(*WIKITEXT2, split="train" if split == "calibration" else "test")
    if name in ("c4", "c4_new"):
        return _from_hub(C4[0], data_files=C4[1 if split == "calibration" else 2], split="train")
    path = Path(name)
    if not name.strip() or not os.path.exists(path):
        mixture = " A mixture gives each text a share, as wiki:2,news:1." if "," in name else ""
        raise UsageError(
            f"`dataset` must be one of {', '.join(NAMED)}, or an existing file or folder; got {name!r}.{mixture}",
            "dataset",
        )
    return split_of(read_local(path, in_pieces=split != "all"), split)


def parts_of(name: str) -> dict[str, int]:
    """Texts of a mixture and their shares: 'wiki:2,self:1' -> {'wiki': 2, 'self': 1}; another name is one text."""
    parts = [re.fullmatch(r"(.+):([1-9]\d*)", part, re.ASCII) for part in name.split(",")]
    found = {part[1]: int(part[2]) for part in parts if part}
    return {name: 1} if len(found) < len(parts) or os.path.exists(name) else found


def stamp(dataset: str) -> str | None:
    """What tells that a text of files, or a mixture with such texts, may have changed: another stamp than before.

    Returns:
        None where no part is a file or a folder.
    """
    paths = [Path(name) for name in parts_of(dataset) if name not in (*NAMED, SELF) and os.path.exists(name)]
    return " ".join(text_stamp(path) for path in paths) or None


def calibration_windows(
    name: str | os.PathLike,
    tokenizer: PreTrainedTokenizerBase,
    ctx_len: int,
    samples: int,
    seed: int,
    model: PreTrainedModel | None = None,
) -> Tensor:
    """Calibration samples of a text, of the model's own text, or of a mixture.

    Args:
        name: name or path of the text, see the module docstring. Its held-out part is not read.
        tokenizer: tokenizer of the model.
        ctx_len: tokens per sample.
        samples: number of samples; a mixture shares them out by its parts.
        seed: seed of the shuffling, and of what the model writes.
        model: the dense model; only ``self`` needs it.

    Returns:
        (samples, ctx_len) int64.

    Raises:
        UsageError: a text has too few windows, or ``self`` is asked for without a model.
    """
    check_tokenizer(tokenizer)
    for argument, value, least in (("ctx_len", ctx_len, 1), ("samples", samples, 1), ("seed", seed, 0)):
        check_whole(argument, value, least)
    parts = parts_of(name_of(name, "dataset"))
    if len(parts) == 1:
        return _windows_of(next(iter(parts)), tokenizer, ctx_len, samples, seed, model)
    found, total, done = [], 0, 0
    for text, share in parts.items():
        total += share
        until = round(samples * total / sum(parts.values()))
        if until > done:
            found.append(_windows_of(text, tokenizer, ctx_len, until - done, seed, model))
        done = until
    return torch.cat(found)[torch.randperm(samples, generator=torch.Generator().manual_seed(seed))]


def _windows_of(
    name: str, tokenizer: PreTrainedTokenizerBase, ctx_len: int, samples: int, seed: int, model: PreTrainedModel | None
) -> Tensor:
    if name != SELF:
        return _packed_windows(name, tokenizer, ctx_len, samples, seed)
    if model is None:
        raise UsageError("`dataset=self` is text that the model writes itself: give the model too.", "dataset")
    with doing("sampling text from the model"):
        return own_windows(model, tokenizer, ctx_len, samples, seed)


def own_windows(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, ctx_len: int, samples: int, seed: int
) -> Tensor:
    """Windows that the model writes itself, after the token that begins a document (BOS, else EOS, else any token).

    This token stays in the window only where the tokenizer puts BOS first by itself (see ``adds_bos``).

    Returns:
        (samples, ctx_len) int64.
    """
    begins = [token for token in (tokenizer.bos_token_id, tokenizer.eos_token_id) if token is not None]
    if begins:
        first = torch.full((samples, 1), begins[0])
    else:
        generator = torch.Generator().manual_seed(seed)
        first = torch.randint(model.config.get_text_config().vocab_size, (samples, 1), generator=generator)
    return sample_tokens(model, first, ctx_len + (not adds_bos(tokenizer)), seed)[:, -ctx_len:]


def _packed_windows(name: str, tokenizer: PreTrainedTokenizerBase, ctx_len: int, samples: int, seed: int) -> Tensor:
    """Packed calibration samples, shuffled by the seed, from as many different documents as possible.

    Documents are cut into spans of at most ctx_len tokens; the first span of every document comes before the
    second of any. Spans are joined and cut into full windows. Only the documents that are needed are tokenised, and a
    long text is many documents (see ``read_local``), so the cost depends on the samples and not on the text.
    """
    documents = load_documents(name, "calibration")
    need = samples * ctx_len
    spans: list[list[array]] = []
    first_spans = 0
    for ids in _tokenize_each(tokenizer, shuffled(documents, random.Random(seed), samples)):
        spans.append([ids[i : i + ctx_len] for i in range(0, len(ids), ctx_len)])
        first_spans += min(len(ids), ctx_len)
        if first_spans >= need:
            break
    found = sum(len(span) for document in spans for span in document)
    if found < need:
        raise UsageError(
            f"The calibration text {name} has {found:,} tokens, enough for {found // ctx_len} samples of "
            f"`ctx_len={ctx_len}`, but `samples` is {samples}. Lower one of them or give more text."
        )
    stream = chain.from_iterable(span for turn in zip_longest(*spans, fillvalue=()) for span in turn)
    windows = torch.tensor(list(islice(stream, need))).view(samples, ctx_len)
    return windows[torch.randperm(samples, generator=torch.Generator().manual_seed(seed))]


def evaluation_windows(
    name: str | os.PathLike,
    tokenizer: PreTrainedTokenizerBase,
    ctx_len: int,
    split: str = "all",
    limit: int | None = None,
    *,
    bos: bool = False,
) -> Tensor:
    """Evaluation windows, cut as in papers.

    Args:
        name: name or path of the text, see the module docstring.
        tokenizer: tokenizer of the model.
        ctx_len: tokens per window.
        split: 'all', 'heldout' or 'calibration', see ``load_documents``.
        limit: at most this many windows, every k-th of n from the first, with k = n // limit; None for all. The whole
            text is read and tokenised either way.
        bos: begin every window with the tokenizer's BOS token, followed by ctx_len - 1 tokens of text. Papers don't:
            with a tokenizer that puts BOS first (see ``adds_bos``) only their first window begins with it.

    Returns:
        (n, ctx_len) int64.

    Raises:
        UsageError: the text is too short for one window, ``limit`` is below 1, or ``bos`` is True and the tokenizer has
            no BOS token.
    """
    check_tokenizer(tokenizer)
    check_whole("ctx_len", ctx_len)
    if limit is not None:
        check_whole("limit", limit)
    check_switches(bos=bos)
    if bos and tokenizer.bos_token_id is None:
        raise UsageError("`bos=True` needs a tokenizer with a BOS token, and this one has none. Leave it out.", "bos")
    windows = _windows(name, tokenizer, ctx_len, split, bos)
    if bos:
        windows = pad(windows, (1, 0), value=tokenizer.bos_token_id)
    return windows if limit is None else windows[:: max(1, len(windows) // limit)][:limit]


def adds_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer puts its BOS token before a text by itself."""
    return tokenizer.bos_token_id is not None and tokenizer("a").input_ids[:1] == [tokenizer.bos_token_id]


def _windows(name: Any, tokenizer: PreTrainedTokenizerBase, ctx_len: int, split: str, bos: bool) -> Tensor:
    """All evaluation windows of a text, (n, ctx_len), or (n, ctx_len - 1) without special tokens where BOS follows."""
    documents = load_documents(name, split)
    options, size = ({"add_special_tokens": False}, ctx_len - 1) if bos else ({}, ctx_len)
    if name == "c4":
        return _random_c4_windows(documents, tokenizer, size, options)
    if name == "c4_new":
        # First 1,100 documents joined by spaces, at most 256 windows (GPTQ's "new" C4 protocol).
        ids = tokenizer(" ".join(documents[:C4_NEW_DOCUMENTS]), **options).input_ids[: C4_WINDOWS * size]
    else:
        # Joined by blank lines, tokenised once, cut without overlap, the remainder dropped.
        ids = tokenizer("\n\n".join(documents), **options).input_ids
    count = len(ids) // size
    if not count:
        raise UsageError(f"The text {name} has {len(ids):,} tokens, too few for one window of `ctx_len={ctx_len}`.")
    return torch.tensor(ids[: count * size]).view(count, size)


def _random_c4_windows(
    documents: Sequence[str], tokenizer: PreTrainedTokenizerBase, ctx_len: int, options: dict[str, bool]
) -> Tensor:
    """256 windows, each at a random place of a random document longer than it; random.seed(0) as in GPTQ and Wanda."""
    rng = random.Random(0)
    windows: list[list[int]] = []
    # A corpus without a document of this length would never fill 256 windows.
    for _ in range(200 * C4_WINDOWS):
        ids = tokenizer(documents[rng.randint(0, len(documents) - 1)], **options).input_ids
        if len(ids) < ctx_len:
            continue
        start = rng.randint(0, len(ids) - ctx_len)
        windows.append(ids[start : start + ctx_len])
        if len(windows) == C4_WINDOWS:
            return torch.tensor(windows)
    raise UsageError(f"The c4 validation text has too few documents of `ctx_len={ctx_len}` tokens; use c4_new.")


def _tokenize_each(tokenizer: PreTrainedTokenizerBase, documents: Iterable[list[str]]) -> Iterator[array]:
    """Token ids of the documents, some documents at a time; blank ones are left out."""
    for some in documents:
        batch: list[str] = []
        for place, document in enumerate(some, 1):
            batch += [document] if document.strip() else []
            enough = len(batch) == DOCUMENTS_AT_ONCE or sum(map(len, batch)) >= CHARACTERS_AT_ONCE
            if batch and (enough or place == len(some)):
                yield from (array("q", ids) for ids in tokenizer(batch).input_ids)
                batch = []


def _from_hub(repository: str, config: str | None = None, **kwargs) -> Sequence[str]:
    from datasets import load_dataset

    try:
        return load_dataset(repository, config, **kwargs)["text"]
    except (ConnectionError, OSError, ValueError) as error:
        why = "HF_HUB_OFFLINE is set" if offline() else type(error).__name__
        raise RunError(
            f"The dataset {repository} can't be loaded from the Hub ({why}). "
            f"Give a local file, or one of the embedded texts: {' or '.join(EMBEDDED)}."
        ) from error
