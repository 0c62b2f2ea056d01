"""The folder of a learning run: one class that knows its files, whose run it is, and what was learned there.

    run.json                  settings, versions, commit
    checkpoint-N/             the learned weights after step N, and what the Trainer needs to go on
    input_norms.safetensors   the norms that blocks are compared with
    mask.safetensors          the mask: the result of learning
    history.json              the Trainer's log
    blocks.json               zeros in the blocks of the learned weights
    NAME.json                 results: dense, pruned, zero_shot, or the name of a baseline
    NAME/                     the mask of a baseline
    pruned/                   the pruned checkpoint
    recovered/                the same, with its kept weights updated
    run.png, kinds.png, report.html

script/doc.md explains them to users.
"""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors.torch import load_file
from torch import Tensor

from proxsparse.errors import RunError, UsageError
from proxsparse.mask import MASK_FILE, Mask, extract_mask, load_mask, save_mask
from proxsparse.model.channels import ORDER_FILE, load_order, order_of
from proxsparse.model.inputs import NORMS_FILE
from proxsparse.model.loading import load_model
from proxsparse.model.prunable import find_prunable, sparsity_by_kind
from proxsparse.operator.pattern import TWO_OF_FOUR, Pattern
from proxsparse.record import git_commit, read_json, read_record, versions
from proxsparse.resume import RUN_FILE, claim, last_complete_checkpoint

if TYPE_CHECKING:  # the Trainer takes seconds to import, and most commands only look at a run's files
    from proxsparse.learning.config import ProxSparseConfig

HISTORY_FILE, BLOCKS_FILE = "history.json", "blocks.json"
ZEROS_FILE = "zeros.json"  # with the mask, in checkpoints of sharded runs
TEXT_FILES = "text_files"  # in the settings: the stamp of the text's files, see ``proxsparse.text.stamp``
WINDOWS = "windows given in Python"  # instead of the name of a text
# Names of results; PRUNED and RECOVERED are also folders of checkpoints.
DENSE, PRUNED, RECOVERED, ZERO_SHOT = "dense", "pruned", "recovered", "zero_shot"

# Settings of TRL's and transformers' configurations that decide the mask; our own all do, but for these.
DECISIVE = (
    "learning_rate", "max_steps", "gradient_accumulation_steps", "adam_beta1", "adam_beta2", "adam_epsilon",
    "warmup_steps", "max_grad_norm", "label_smoothing_factor", "lr_scheduler_kwargs", "loss_type",
    "load_best_model_at_end", "data_seed", "neftune_noise_alpha", "train_sampling_strategy", "dataloader_drop_last",
)  # fmt: skip
# A run that ran out of memory goes on with others of these.
UNDECIDED = ("keep_base", "offload_learned", "logging_steps", "save_total_limit", "per_device_eval_batch_size")
# Of runs made before these were settings.
EARLIER = {"pattern": "2:4", "permute": "none", "layer_rate": 0.0, "layer_steps": 100, "layer_span": 1}
PROVENANCE = ("method", "lambda_value", "score", "dataset", "samples", "ctx_len", "seed")  # kept in a mask file


@dataclass
class Learned:
    """What a checkpoint has learned: the mask it leads to, and zeros in its blocks.

    Attributes:
        zeros: layer kind -> share of blocks of m weights with 0, 1, ... m zeros.
        compared: what blocks were compared by: 'activation' or 'weight'.
    """

    mask: Mask
    zeros: dict[str, list[float]]
    compared: str


class Run:
    """The folder of a run, which need not exist yet.

    Args:
        folder: path of the folder.
    """

    def __init__(self, folder: Path | str):
        self.folder = Path(folder)

    @classmethod
    def finished(cls, folder: Path | str) -> "Run":
        """A run that has learned its mask.

        Raises:
            UsageError: no such folder, or no finished run in it.
        """
        run = cls(folder)
        if not run.folder.is_dir():
            raise UsageError(f"There is no folder {folder}.", "run")
        if not (run.mask_file.is_file() and run._record_file.is_file() and run.history_file.is_file()):
            raise UsageError(
                f"{folder} holds no finished run ({RUN_FILE}, {MASK_FILE} and {HISTORY_FILE} are written by learning).",
                "run",
            )
        return run

    # Files

    @property
    def mask_file(self) -> Path:
        return self.folder / MASK_FILE

    @property
    def history_file(self) -> Path:
        return self.folder / HISTORY_FILE

    @property
    def blocks_file(self) -> Path:
        return self.folder / BLOCKS_FILE

    @property
    def norms_file(self) -> Path:
        return self.folder / NORMS_FILE

    @property
    def pruned_folder(self) -> Path:
        return self.folder / PRUNED

    @property
    def recovered_folder(self) -> Path:
        return self.folder / RECOVERED

    @property
    def picture(self) -> Path:
        return self.folder / "run.png"

    @property
    def kinds_picture(self) -> Path:
        return self.folder / "kinds.png"

    @property
    def report_file(self) -> Path:
        return self.folder / "report.html"

    @property
    def _record_file(self) -> Path:
        return self.folder / RUN_FILE

    def result_file(self, name: str) -> Path:
        """Measured perplexities: of ``DENSE``, ``PRUNED``, or of a baseline."""
        return self.folder / f"{name}.json"

    def forget_result(self, name: str, written: Path | str) -> None:
        """Delete what was measured of a mask or of recovered weights, where the run's own are about to be replaced."""
        own = self.recovered_folder if name == RECOVERED else self.baseline_folder(name)
        if Path(written).resolve() == own.resolve():
            self.result_file(name).unlink(missing_ok=True)

    def baseline_folder(self, method: str) -> Path:
        """Folder with the mask of a baseline that saw the same samples."""
        return self.folder / method

    def baselines(self) -> list[str]:
        """Methods whose masks lie here, by name."""
        found = self.folder.glob(f"*/{MASK_FILE}")
        return sorted(p.parent.name for p in found if not p.parent.name.startswith(("checkpoint-", ".")))

    # Whose run it is

    @property
    def record(self) -> dict[str, Any]:
        """What run.json holds: settings, versions, commit; empty where there is none."""
        found = read_record(self._record_file) if self._record_file.is_file() else {}
        if not isinstance(found.get("settings", {}), dict):
            raise RunError(f"{self._record_file} is damaged: delete it, and learn again.")
        return found

    @property
    def settings(self) -> dict[str, Any]:
        return self.record.get("settings", {})

    @property
    def pattern(self) -> Pattern:
        return Pattern.parse(self.settings.get("pattern", str(TWO_OF_FOUR)))

    @property
    def is_finished(self) -> bool:
        return self.mask_file.is_file() and self.history_file.is_file()

    def refuse_another(self, settings: dict[str, Any]) -> None:
        """Refuse a folder that holds a run with other settings.

        Args:
            settings: the result of ``described``.

        Raises:
            UsageError: names the first setting that differs.
        """
        try:
            claim(self.folder, {"settings": settings}, filter(_decides, settings), write=False, earlier=EARLIER)
        except UsageError as error:
            made = f"{self.mask_file} was made by another command: " if self.is_finished else ""
            raise UsageError(f"{made}{error}") from error

    def claim(self, settings: dict[str, Any]) -> None:
        """Write down whose run this is; called when everything has been checked.

        Raises:
            UsageError: see ``refuse_another``.
        """
        record = {"settings": settings, "versions": versions(), "commit": git_commit()}
        claim(self.folder, record, filter(_decides, settings), earlier=EARLIER)

    def share_24(self) -> float | None:
        """Share of the learned blocks that were 2:4 at the last look; None before the first."""
        log = read_record(self.history_file, list) if self.history_file.is_file() else []
        return next((entry["share_24"] for entry in reversed(log) if "share_24" in entry), None)

    # What was learned

    def save(self, mask: Mask, output: Path | str | None = None) -> Path:
        """Write the mask and where it comes from. Learning and extraction both call this.

        Args:
            output: another file; None: the run's own.

        Returns:
            the file.
        """
        settings, output = self.settings, Path(output) if output else self.mask_file
        mask.base_model = settings.get("model", mask.base_model)
        mask.info = {name: settings[name] for name in PROVENANCE if name in settings} or mask.info
        save_mask(mask, output)
        return output

    def last_checkpoint(self) -> Path | None:
        """The complete checkpoint that the run's mask is of: the newest, or the best where that was asked for."""
        found = last_complete_checkpoint(self.folder)
        if found and self.settings.get("load_best_model_at_end") and self.is_finished:
            from transformers.trainer import TRAINER_STATE_NAME

            best = read_json(Path(found) / TRAINER_STATE_NAME).get("best_model_checkpoint")
            if best and (self.folder / Path(best).name).is_dir():
                return self.folder / Path(best).name
        return Path(found) if found else None

    def learned(self, checkpoint: Path, include: str | None = None, exclude: str | None = None) -> Learned:
        """What a checkpoint of this run has learned.

        Args:
            include: expression of ``find_prunable``; None: the run's own.
            exclude: the same.

        Raises:
            UsageError: the input norms that blocks were compared by, or the order of the channels, are missing; or the
                run was sharded and weights are to be left out.
        """
        settings = self.settings
        if (checkpoint / ZEROS_FILE).is_file():  # a sharded run has taken the mask from its shards itself
            if include or exclude:
                raise UsageError(
                    "`include` and `exclude`: the mask of a sharded run is extracted while it learns; give them there."
                )
            mask, zeros = load_mask(checkpoint / MASK_FILE), read_json(checkpoint / ZEROS_FILE)
            return Learned(mask, zeros, settings.get("score", "activation"))
        model = load_model(str(checkpoint), trust_remote_code=bool(settings.get("trust_remote_code")))
        order = load_order(self.folder / ORDER_FILE)
        if order_of(model) and order_of(model) != order:
            raise UsageError(
                f"The channels of {checkpoint} stand in an order that {self.folder / ORDER_FILE} should hold: copy "
                "that file from the folder of the run.",
                "checkpoint",
            )
        pattern = self.pattern
        names = (include or settings.get("include"), exclude or settings.get("exclude"))
        targets = find_prunable(model, *names, multiple=pattern.m)
        weights = {t.name: t.weight.detach() for t in targets}
        norms = self._norms()
        mask = extract_mask(weights, targets, norms, pattern)
        mask.order = order
        return Learned(mask, sparsity_by_kind(weights, targets, pattern.m), "weight" if norms is None else "activation")

    def _norms(self) -> dict[str, Tensor] | None:
        score = self.settings.get("score")
        if score != "weight" and self.norms_file.is_file():
            return load_file(self.norms_file)
        if score == "activation":
            raise UsageError(
                f"This run scored weights by their inputs, and {self.norms_file} is missing.", "checkpoint"
            )
        return None


def locate(folder: Path | str) -> tuple[Path, Run]:
    """The checkpoint that a folder means, and its run: the folder is either a checkpoint or a run.

    Raises:
        UsageError: it is neither.
    """
    path = Path(folder)
    if not path.is_dir():
        raise UsageError(f"There is no folder {folder}.", "checkpoint")
    if (path / "config.json").is_file() or (path / ZEROS_FILE).is_file():
        return path, Run(path.parent if (path.parent / RUN_FILE).is_file() else path)
    run = Run(path)
    checkpoint = run.last_checkpoint()
    if checkpoint is None:
        raise UsageError(f"{folder} is neither a checkpoint nor a run with a complete checkpoint.", "checkpoint")
    return checkpoint, run


def described(data: dict[str, Any], config: "ProxSparseConfig") -> dict[str, Any]:
    """Settings of a run as run.json holds them: what it learns from, and every field of its configuration.

    Fields of layer-wise steps are left out where there are none.
    """
    without = () if config.layer_rate else ("layer_steps", "layer_span")
    fields = {f.name: getattr(config, f.name) for f in dataclasses.fields(config) if f.init and f.name not in without}
    return json.loads(json.dumps(data | fields, default=str))


def _decides(name: str) -> bool:
    """Whether a setting decides the mask: those of the data do, and our own but for a few."""
    from proxsparse.learning.config import ProxSparseConfig, TrainingConfig

    if name == TEXT_FILES:  # another stamp only makes one look at the text
        return False
    if name in {f.name for f in dataclasses.fields(ProxSparseConfig)}:
        own = TrainingConfig.__annotations__.keys() | ProxSparseConfig.__annotations__.keys()
        return name in DECISIVE or (name in own and name not in UNDECIDED)
    return True
