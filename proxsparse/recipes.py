"""The published recipes: what each model was learned with, and the pruned models that the authors released.

Every number is written here only; the scripts, ``learn --recipe NAME`` and the download of released models read it.

Source: Liu et al., ProxSparse, ICML 2025, https://arxiv.org/abs/2502.00258, and the scripts of its release.
"""

from dataclasses import dataclass
from typing import Any

from proxsparse.errors import UsageError

REPOSITORY = "aladinggit/proxsparse_models"  # on the Hub, with a folder per released model


@dataclass(frozen=True)
class Recipe:
    """What a model was learned with.

    Attributes:
        model: Hub id that transformers can load.
        lambda_value: lambda1, unit 1 / |weight|, or relative.
        learning_rate: peak learning rate of AdamW.
        ctx_len: tokens per calibration sample.
        lambda2_value, epsilon: settings of the frozen-weight regulariser; None where the recipe does without it.
        dataset, samples: the calibration text.
        relative: lambda and the rate are multiples of each matrix's root mean square, and lambda rises at first.
        released: folder in the repository of released models, or None.
    """

    model: str
    lambda_value: float
    learning_rate: float
    ctx_len: int = 4096
    lambda2_value: float | None = None
    epsilon: float | None = None
    dataset: str = "c4"
    samples: int = 400
    relative: bool = False
    released: str | None = None

    def settings(self) -> dict[str, Any]:
        """Name of the setting -> value, as ``learn`` takes them: one sample at a time, seed 42."""
        found: dict[str, Any] = {
            "model": self.model,
            "dataset": self.dataset,
            "method": "paper",
            "lambda_value": self.lambda_value,
            "learning_rate": self.learning_rate,
            "ctx_len": self.ctx_len,
            "samples": self.samples,
            "batch_size": 1,
            "seed": 42,
        }
        if self.lambda2_value is not None:
            found |= {"project_lambda2": 1, "lambda2_value": self.lambda2_value, "epsilon": self.epsilon}
        return found | ({"relative": True, "lambda_ramp": 0.5} if self.relative else {})


RECIPES = {
    "llama2-7b-prox": Recipe(
        "meta-llama/Llama-2-7b-hf", 0.25, 1e-4, released="Llama-2-7b-hf-en_sft_final_400_len4096_batch1_lambda0.25"
    ),
    "llama2-13b-prox": Recipe("meta-llama/Llama-2-13b-hf", 0.5, 1e-4),
    "llama2-13b-full": Recipe(
        "meta-llama/Llama-2-13b-hf", 0.5, 1e-4, lambda2_value=0.25, epsilon=0.5,
        released="Llama-2-13b-hf-en_sft_final_reg0.5_400_len4096_batch1_lambdaone0.5_lambdatwo0.25",
    ),
    "llama3.1-8b-prox": Recipe(
        "meta-llama/Llama-3.1-8B", 0.85, 5e-5,
        released="Meta-Llama-3.1-8B-en_sft_final_400_lr5e-05_len4096_batch1_lambda0.85",
    ),
    "llama3.1-8b-full": Recipe("meta-llama/Llama-3.1-8B", 0.85, 5e-5, lambda2_value=1.0, epsilon=0.1),
    "mistral-v0.1-7b-prox": Recipe(
        "mistralai/Mistral-7B-v0.1", 20.0, 5e-5,
        released="Mistral-7B-v0.1-en_sft_final_400_lr5e-05_len4096_batch1_lambda20.0",
    ),
    "mistral-v0.3-7b-prox": Recipe(
        "mistralai/Mistral-7B-v0.3", 25.0, 5e-5,
        released="Mistral-7B-v0.3-en_sft_final_400_lr5e-05_len4096_batch1_lambda25.0",
    ),
    "openllama-v2-7b-prox": Recipe(
        "openlm-research/open_llama_7b_v2", 1.0, 1e-4, ctx_len=2048,
        released="open_llama_7b_v2-en_sft_final_400_lr0.0001_len2048_batch1_lambda1.0",
    ),
    "qwen2.5-14b-prox": Recipe(
        "Qwen/Qwen2.5-14B", 0.2, 1e-4, released="Qwen2.5-14B-en_sft_final_400_lr0.0001_len4096_batch1_lambda0.2"
    ),
    # Not the authors': their method on the model and the text that script/setup.sh installs.
    "smollm2-135m-prox": Recipe("smollm2-135m", 0.02, 5e-3, ctx_len=512, dataset="wiki", samples=100, relative=True),
}  # fmt: skip

# short name -> (folder in the repository, context length it was learned with)
RELEASED = {
    name.rpartition("-")[0]: (recipe.released, recipe.ctx_len) for name, recipe in RECIPES.items() if recipe.released
}


def find_recipe(name: str) -> Recipe:
    """The recipe of this name.

    Raises:
        UsageError: there is none; names those that are there.
    """
    if name not in RECIPES:
        raise UsageError(f"`recipe` must be one of {', '.join(RECIPES)}; got {name!r}.", "recipe")
    return RECIPES[name]
