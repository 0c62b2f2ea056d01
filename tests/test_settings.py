"""Settings of a run: presets, and one sentence for each that can't work here."""

import importlib.util

import pytest
from test_trainer import config, trainer

from proxsparse.errors import UsageError
from proxsparse.learning.checks import require_packages
from proxsparse.learning.config import METHODS, ProxSparseConfig


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "magic"}, "`method` must be one of paper, masked; got 'magic'"),
        ({"score": "hessian"}, "`score` must be one of activation, weight; got 'hessian'"),
        ({"lambda_value": -1.0}, "`lambda_value` must be a finite number of at least 0, or auto; got -1.0"),
        ({"distill": 1.5}, "`distill` must be between 0 and 1; got 1.5"),
        ({"epsilon": 0.0}, "`epsilon` must be a finite number > 0; got 0.0"),
        ({"learning_rate": -1e-3}, "`learning_rate` must be a finite number > 0"),
        ({"rounding": "up"}, "`rounding` must be one of stochastic, nearest; got 'up'"),
        ({"lambda2_value": 1.0}, "`lambda2_value` has no effect without `project_lambda2=1`"),
        ({"project_lambda2": 1}, "Use `method=paper`, or leave lambda2 out"),
        ({"project_lambda2": 2}, "`project_lambda2` must be one of 0, 1; got 2"),
        ({"keep_base": "disk"}, "`keep_base` must be one of device, cpu, checkpoint; got 'disk'"),
        ({"keep_base": "checkpoint"}, "`keep_base=checkpoint` reads the original weights from safetensors files, and "),
        (
            {"optim_in_backward": True, "gradient_accumulation_steps": 2},
            "`gradient_accumulation_steps` must be 1; got 2",
        ),
        ({"optim_in_backward": True, "fp16": True}, "use `bf16=True` instead of `fp16=True`"),
        ({"optim_in_backward": True, "max_grad_norm": 0.5}, "`max_grad_norm` must be 0; got 0.5"),
        (
            {"optim_in_backward": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
            "leave use_reentrant out",
        ),
        ({"method": "paper", "distill": 1.0}, "`distill` needs the dense model.*give `train_only_pruned=True` too"),
        ({"gradient_accumulation_steps": 0}, "`gradient_accumulation_steps` must be at least 1; got 0"),
        ({"per_device_train_batch_size": 0}, "`per_device_train_batch_size` must be at least 1; got 0"),
        ({"max_steps": 0}, "`max_steps` must be at least 1, or -1 for all samples; got 0"),
        ({"assistant_only_loss": True}, "`assistant_only_loss=True` is for conversations or texts of several lengths"),
        ({"packing": True}, "`packing=True` is for conversations or texts of several lengths"),
        ({"fsdp": "full_shard"}, "`fsdp` shards a model over several processes, and this is one"),
        ({"deepspeed": "zero.json"}, "Learning under DeepSpeed is not supported"),
        ({"activation_offloading": True}, "and this run is on the CPU: leave it out"),
        ({"label_smoothing_factor": 0.1}, "change the language-model loss, and distillation takes its place"),
        ({"save_strategy": "best"}, "saves when the evaluation is better than before, and there is none"),
        ({"eval_strategy": "steps"}, "`eval_strategy=steps` needs samples to evaluate on: give `eval_samples`"),
        ({"norm_samples": 0}, "`norm_samples` must be at least 1; got 0"),
        ({"norm_samples": "2"}, "`norm_samples` must be at least 1; got '2'"),
        ({"norm_samples": None}, "`norm_samples` must be at least 1; got None"),
        ({"norm_samples": 1.5}, "`norm_samples` must be a whole number, at least 1; got 1.5"),
        ({"layer_rate": "2"}, "`layer_rate` must be a finite number of at least 0; got '2'"),
        ({"layer_rate": float("nan")}, "`layer_rate` must be a finite number of at least 0; got nan"),
        ({"layer_steps": -1}, "`layer_steps` must be at least 0; got -1"),
        ({"learning_rate": float("nan")}, "`learning_rate` must be a finite number > 0; got nan"),
        ({"warmup_steps": float("nan")}, "`warmup_steps` must be a finite number of at least 0; got nan"),
        ({"weight_decay": float("nan")}, "`weight_decay` must be a finite number of at least 0; got nan"),
        ({"max_grad_norm": -1.0}, "`max_grad_norm` must be a finite number of at least 0; got -1.0"),
        ({"adam_beta1": 1.5}, "`adam_beta1` must be at least 0 and less than 1; got 1.5"),
        ({"seed": -1}, "`seed` must be between 0 and 4294967295; got -1"),
        ({"data_seed": 2**32}, "`data_seed` must be between 0 and 4294967295"),
        ({"logging_steps": -1}, "`logging_steps` must be a finite number > 0; got -1"),
        ({"save_steps": 0}, "`save_steps` must be a finite number > 0; got 0"),
        ({"eval_steps": 0}, "`eval_steps` must be a finite number > 0; got 0"),
        ({"save_total_limit": -1}, "`save_total_limit` must be at least 1; got -1"),
        ({"eval_accumulation_steps": 0}, "`eval_accumulation_steps` must be at least 1; got 0"),
        ({"dataloader_num_workers": -1}, "`dataloader_num_workers` must be at least 0; got -1"),
        ({"metric_for_best_model": "accuracy"}, "`metric_for_best_model` must be one of loss, entropy, mean_"),
        ({"dataset_text_field": "body"}, "`dataset_text_field` must be text; got 'body'"),
        ({"eos_token": "<nope>"}, "`eos_token` is for conversations or texts of several lengths"),
        ({"model_init_kwargs": {"dtype": "float16"}}, "`model_init_kwargs` is for a model that TRL loads"),
        ({"optim_args": "scale_parameter=False"}, "`optim_args` does not reach this optimizer: give `learning_rate`"),
        ({"optim_target_modules": "all-linear"}, "`optim_target_modules` is for GaLore and APOLLO"),
        ({"report_to": "nonsense"}, "`report_to` must be none, all, or some of .*wandb.*; got 'nonsense'"),
        (
            {"lr_scheduler_type": "cosine_with_min_lr"},
            "does not go with `lr_scheduler_kwargs`, which are not given: One",
        ),
        ({"lr_scheduler_kwargs": {"x": 1}}, "`lr_scheduler_type=linear` does not go with .* which are {'x': 1}: "),
        ({"lr_scheduler_kwargs": "notjson"}, "`lr_scheduler_kwargs` takes JSON, as .*; got 'notjson'"),
        ({"accelerator_config": "/none.json"}, "No such file .*'/none.json'"),
        ({"load_best_model_at_end": True, "save_strategy": "steps"}, "requires the save and eval strategy to match"),
        ({"include": "("}, "`include` must be a regular expression, got '\\('"),
        ({"exclude": "layers"}, "No weight of LlamaForCausalLM is left to prune"),
    ],
)
def test_bad_settings_are_named(tmp_path, tokenizer, changes, message):
    with pytest.raises(UsageError, match=message):
        trainer(tmp_path, tokenizer, **changes)


def test_a_preset_gives_way_to_what_the_user_sets(tmp_path):
    assert config(tmp_path).lambda_value == METHODS["masked"]["lambda_value"]
    assert config(tmp_path, lambda_value=0.5, learning_rate=3e-3).lambda_value == 0.5
    assert config(tmp_path, learning_rate=3e-3).learning_rate == 3e-3
    assert config(tmp_path, masked_forward=False).masked_forward is False


@pytest.mark.parametrize(
    ("changes", "package"),
    [
        ({"report_to": "wandb"}, "wandb"),
        ({"report_to": ["trackio", "mlflow"]}, "trackio"),
        ({"report_to": "tensorboard"}, "tensorboard"),
        ({"optim": "adamw_bnb_8bit"}, "bitsandbytes"),
        ({"optim": "paged_adamw_32bit"}, "bitsandbytes"),
        ({"optim": "adamw_torch_4bit"}, "torchao"),
        ({"optim": "schedule_free_adamw"}, "schedulefree"),
        ({"use_liger_kernel": True}, "liger_kernel"),
    ],
)
def test_a_package_that_is_absent_is_named_before_anything_is_loaded(tmp_path, monkeypatch, changes, package):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    settings = config(tmp_path, **changes)  # a plan for another machine needs no package
    with pytest.raises(UsageError, match=f"needs the package {package}, which is not installed here"):
        require_packages(settings)


def test_a_package_that_is_there_is_not_missed(tmp_path, monkeypatch):
    present = {"bitsandbytes", "tensorboardX"}
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name if name in present else None)
    require_packages(config(tmp_path, optim="adamw_8bit", report_to="tensorboard"))
    require_packages(config(tmp_path, optim="adamw_torch", report_to="none"))


def test_the_best_checkpoint_is_the_one_of_the_least_loss_where_nothing_else_is_said(tmp_path):
    settings = config(tmp_path, save_strategy="best", eval_strategy="steps", eval_steps=2)
    assert settings.metric_for_best_model == "loss"
    assert settings.greater_is_better is False


def test_a_schedule_with_what_it_needs_is_taken(tmp_path):
    taken = config(tmp_path, lr_scheduler_type="cosine_with_min_lr", lr_scheduler_kwargs={"min_lr_rate": 0.1})
    assert taken.lr_scheduler_kwargs == {"min_lr_rate": 0.1}
    config(tmp_path, metric_for_best_model="eval_mean_token_accuracy", optim="sgd", optim_args="momentum=0.9")


@pytest.mark.parametrize(
    ("given", "relative", "rate", "lambda1", "ramp"),
    [
        ({}, True, 5e-3, 0.02, 0.5),
        ({"lambda_value": 0.5}, False, 1e-4, 0.5, 0.0),
        ({"learning_rate": 5e-5}, False, 5e-5, 0.25, 0.0),
        ({"lambda_value": 0.05, "relative": True}, True, 5e-3, 0.05, 0.5),
        ({"relative": False}, False, 1e-4, 0.25, 0.0),
    ],
)
def test_the_paper_method_is_relative_unless_lambda_or_the_rate_is_given(
    given, relative, rate, lambda1, ramp, tmp_path
):
    found = ProxSparseConfig(output_dir=str(tmp_path), method="paper", bf16=False, use_cpu=True, **given)
    assert (found.relative, found.learning_rate, found.lambda_value, found.lambda_ramp) == (
        relative,
        rate,
        lambda1,
        ramp,
    )
