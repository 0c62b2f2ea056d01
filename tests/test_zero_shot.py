"""Zero-shot tasks through the evaluation harness, on a local task file."""

import json

import pytest

from proxsparse.commands import zero_shot
from proxsparse.commands.prune import main as prune
from proxsparse.evaluation.zero_shot import accuracy

TASK = """
task: fox_or_dog
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list:
  - metric: acc
  - metric: acc_norm
"""


@pytest.fixture
def task(tmp_path):
    questions = [{"question": f"The {i}th fox", "choices": [" jumps", " sleeps"], "answer": i % 2} for i in range(8)]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, questions)))
    (tmp_path / "task.yaml").write_text(TASK.format(data=tmp_path / "data.jsonl"))
    return tmp_path / "task.yaml"


def test_a_local_task_gives_its_accuracy(task, checkpoint, tmp_path, capsys):
    pytest.importorskip("lm_eval", reason="the evaluation harness is an extra: pip install 'proxsparse[zero-shot]'")
    output = tmp_path / "result.json"
    assert zero_shot.main(["--model", checkpoint, "--tasks", str(task), "--output", str(output)]) == 0
    found = json.loads(output.read_text())["tasks"]["fox_or_dog"]
    assert 0 <= found["acc"] <= 1
    assert (found["acc"] * 8) % 1 == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["fox_or_dog"] == pytest.approx(found["acc"], abs=1e-4)


def test_a_baseline_measures_the_tasks_of_what_it_pruned(task, checkpoint, tmp_path, capsys):
    pytest.importorskip("lm_eval", reason="the evaluation harness is an extra: pip install 'proxsparse[zero-shot]'")
    flags = ["--model", checkpoint, "--prune_method", "magnitude", "--save", str(tmp_path / "mask")]
    assert prune([*flags, "--eval_zero_shot", str(task)]) == 0
    shown = capsys.readouterr().out
    assert "fox_or_dog" in shown
    assert zero_shot.main(["--model", checkpoint, "--mask", str(tmp_path / "mask"), "--tasks", str(task)]) == 0
    table = [line for line in shown.splitlines() if "fox_or_dog" in line]
    assert table[0] in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "text", "sentence"),
    [
        ("none.yaml", None, "there is no file"),
        ("bad.yaml", "task: !function os.system", "is not a plain YAML file"),
        ("list.yaml", "- 1", "describes no task"),
        ("no_such_task", None, "the harness knows no task"),
    ],
)
def test_a_wrong_task_is_one_sentence(name, text, sentence, checkpoint, tmp_path, capsys):
    pytest.importorskip("lm_eval", reason="the evaluation harness is an extra: pip install 'proxsparse[zero-shot]'")
    given = str(tmp_path / name) if name.endswith(".yaml") else name
    if text is not None:
        (tmp_path / name).write_text(text)
    assert zero_shot.main(["--model", checkpoint, "--tasks", given]) == 2
    assert sentence in capsys.readouterr().err


def test_a_task_on_the_hub_is_one_sentence_offline(checkpoint, capsys):
    pytest.importorskip("lm_eval", reason="the evaluation harness is an extra: pip install 'proxsparse[zero-shot]'")
    assert zero_shot.main(["--model", checkpoint, "--tasks", "piqa"]) == 1
    assert "The data of piqa can't be loaded" in capsys.readouterr().err


def test_papers_print_plain_accuracy():
    assert accuracy({"acc_norm": 0.4, "acc": 0.5, "acc_stderr": 0.1}) == 0.5
    assert accuracy({"acc_norm": 0.4}) == 0.4
