"""The download of released models, against a stand-in of the Hub's client."""

from types import SimpleNamespace

import pytest
from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError

from proxsparse.commands import download
from proxsparse.commands.download import main
from proxsparse.model.hub_errors import UNREACHABLE
from proxsparse.recipes import RELEASED

NO_RESPONSE = SimpleNamespace(headers={}, request=None)


@pytest.fixture
def hub(monkeypatch):
    """A Hub that holds every released folder; records what was asked for."""
    asked = []

    def snapshot_download(repository, *, revision, allow_patterns, local_dir):
        asked.append((repository, revision, allow_patterns))
        for pattern in allow_patterns:
            (local_dir / pattern).parent.mkdir(parents=True, exist_ok=True)
            (local_dir / pattern).with_name("config.json").write_text("{}")

    monkeypatch.setattr(download, "snapshot_download", snapshot_download)
    return asked


def test_the_list_names_all_seven_and_needs_no_network(capsys, tmp_path):
    assert main(["--list", "--to", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in RELEASED)
    assert len(RELEASED) == 7


def test_only_what_was_asked_for_is_fetched(hub, tmp_path, capsys):
    assert main(["--only", "llama2-7b", "--to", str(tmp_path)]) == 0
    folder = RELEASED["llama2-7b"][0]
    assert hub == [("aladinggit/proxsparse_models", None, [f"{folder}/*"])]
    assert str(tmp_path / folder) in capsys.readouterr().out
    assert main(["--list", "--only", "llama2-7b", "--to", str(tmp_path)]) == 0
    assert "yes" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (LocalEntryNotFoundError("offline"), "Nothing can be downloaded from the Hub: HF_HUB_OFFLINE is set"),
        (ConnectionError("no route"), "Nothing can be downloaded from the Hub"),
        (UNREACHABLE[0]("no answer"), "Nothing can be downloaded from the Hub"),
        (RepositoryNotFoundError("404", response=NO_RESPONSE), "log in with 'hf auth login'"),
    ],
)
def test_a_hub_that_refuses_is_one_sentence(error, sentence, hub, tmp_path, capsys, monkeypatch):
    def refuse(*args, **kwargs):
        raise error

    monkeypatch.setattr(download, "snapshot_download", refuse)
    assert main(["--only", "llama2-7b", "--to", str(tmp_path)]) == 1
    assert sentence in capsys.readouterr().err


def test_a_folder_that_is_not_there_is_named(hub, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(download, "snapshot_download", lambda *args, **kwargs: None)
    assert main(["--only", "qwen2.5-14b", "--to", str(tmp_path)]) == 1
    assert "has no folder Qwen2.5-14B" in capsys.readouterr().err


def test_wrong_arguments(tmp_path, capsys):
    assert main(["--only", "gpt5"]) == 2
    assert "--only takes llama2-7b, llama2-13b" in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    assert main(["--to", str(tmp_path / "file")]) == 2
    assert "--to must be a folder" in capsys.readouterr().err
