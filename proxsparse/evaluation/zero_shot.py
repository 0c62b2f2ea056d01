"""Zero-shot tasks through EleutherAI's evaluation harness (``pip install 'lm_eval>=0.4.9'``)."""

import functools
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from proxsparse.errors import RunError, UsageError
from proxsparse.model.restoring import evaluation_mode

# The seven tasks of the paper, by the harness's names: ARC-e, ARC-c, SIQA, HellaSwag, OBQA, PIQA, TruthfulQA.
PAPER_TASKS = ("arc_easy", "arc_challenge", "social_iqa", "hellaswag", "openbookqa", "piqa", "truthfulqa_mc2")


def zero_shot(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: list[str],
    *,
    batch_size: int = 1,
    limit: int | None = None,
) -> dict[str, dict[str, float]]:
    """Accuracy on zero-shot tasks.

    Args:
        tasks: names of the harness's tasks, or paths of YAML files that describe one each.
        batch_size: requests computed together.
        limit: examples per task; None for all.

    Returns:
        task -> metric -> value, as the harness names them, without its bookkeeping ('acc', 'acc_stderr', ...).

    Raises:
        UsageError: the harness is not installed, or does not know a task.
        RunError: a task's data can't be loaded.
    """
    try:
        import lm_eval
        from lm_eval.models.huggingface import HFLM
    except ImportError as error:
        raise UsageError("Zero-shot tasks need the evaluation harness: pip install 'lm_eval>=0.4.9'.") from error
    manager = _known_tasks()
    chosen = [_described(task, manager.all_tasks) for task in tasks]
    try:
        with torch.no_grad(), evaluation_mode(model):
            wrapped = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
            found: Any = lm_eval.simple_evaluate(
                wrapped, tasks=chosen, num_fewshot=0, limit=limit, bootstrap_iters=0, task_manager=manager
            )
    except torch.OutOfMemoryError:
        raise
    except (OSError, ConnectionError, ValueError, RuntimeError) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise RunError(f"The data of {', '.join(tasks)} can't be loaded: {first}") from error
    rows = {task: _metrics(values) for task, values in found["results"].items()}
    return {task: metrics for task, metrics in rows.items() if metrics}


@functools.cache
def _known_tasks() -> Any:
    """The harness's index of its tasks. To read it takes many seconds."""
    from lm_eval.tasks import TaskManager

    return TaskManager()


def accuracy(metrics: dict[str, float]) -> float:
    """The number that papers print of a task: its plain accuracy."""
    return next(metrics[name] for name in ("acc", *metrics) if name in metrics and "stderr" not in name)


def _described(task: str, known: list[str]) -> str | dict:
    """A task the harness knows, or the description in a local file, read as plain YAML: a '!function' tag is refused.

    The harness renders a task's templates, so that a file of someone else's still deserves a look.
    """
    if not task.endswith((".yaml", ".yml")):
        if task not in known:
            raise UsageError(f"The harness knows no task {task!r}; give one of its names, or a .yaml file.", "tasks")
        return task
    import yaml

    path = Path(task)
    if not path.is_file():
        raise UsageError(f"There is no file {task}.", "tasks")
    try:
        described = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"{task} is not a plain YAML file: {str(error).splitlines()[0]}.", "tasks") from error
    if not isinstance(described, dict) or "task" not in described:
        raise UsageError(f"{task} describes no task; it needs at least the keys task and dataset_path.", "tasks")
    return described


def _metrics(values: dict[str, Any]) -> dict[str, float]:
    numbers = {k: v for k, v in values.items() if "," in k and isinstance(v, (int, float))}
    return {k.removesuffix(",none"): float(v) for k, v in numbers.items()}
