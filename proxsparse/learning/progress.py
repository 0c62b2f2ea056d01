"""What a learning run shows while it runs: a bar, and one readable line per log."""

from tqdm.auto import tqdm
from transformers import PrinterCallback, ProgressCallback, Trainer

SHOWN = (
    # (key in the log, label, format)
    ("loss", "loss", "{:.3f}"),
    ("lm_loss", "LM", "{:.3f}"),
    ("kl", "KL", "{:.3f}"),
    ("layer_error", "layers", "{:.3f}"),
    ("lambda2_loss", "lambda2", "{:.3g}"),
    ("eval_loss", "eval loss", "{:.3f}"),
    ("regularizer", "R", "{:.3g}"),
    ("share_24", "2:4 blocks", "{:.1%}"),
    ("mask_churn", "mask churn", "{:.2%}"),
    ("prox_share", "prox", "{:.1%} of the time"),
    ("train_runtime", "seconds", "{:.0f}"),
)


class RunProgress(ProgressCallback):
    """The Trainer's bar, with the numbers that matter here instead of a dictionary."""

    def on_train_begin(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            # None: no bar where the output is not a terminal.
            self.training_bar = tqdm(total=state.max_steps, initial=state.global_step, dynamic_ncols=True, disable=None)
        self.current_step = state.global_step

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not state.is_world_process_zero or self.training_bar is None:
            return
        parts = [f"{label} {form.format(logs[key])}" for key, label, form in SHOWN if key in logs]
        self.training_bar.write(f"step {state.global_step}/{state.max_steps}  " + "  ".join(parts))


def show_progress(trainer: Trainer) -> None:
    """Show a trainer's run this way and no other."""
    trainer.remove_callback(ProgressCallback)
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(RunProgress())
