"""One-shot baselines, with the flags of Wanda's users.

    python baseline/main.py --model smollm2-135m --prune_method wanda --dataset wiki --ctx_len 512 --save runs/wanda
    python baseline/main.py --model smollm2-135m --prune_method sparsegpt --mask_only --dataset wiki --save runs/sgpt
    python baseline/main.py --model meta-llama/Llama-2-7b-hf --prune_method magnitude --sparsity_type 4:8 --save mag

Writes mask.safetensors to --save wherever the weights keep their values, and the pruned checkpoint to --save_model.
"""

from collections.abc import Sequence
from pathlib import Path

from proxsparse.baselines import METHODS, Pattern
from proxsparse.baselines.layerwise import prune_layerwise
from proxsparse.commands.common import TEXT_HELP, Parser, add_model_arguments, load, positive_int, print_json
from proxsparse.errors import UsageError, command
from proxsparse.export import save_pruned
from proxsparse.mask import save_mask
from proxsparse.text import calibration_windows, check_ctx_len


@command
def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser(prog="baseline/main.py", description=__doc__)
    add_model_arguments(parser)
    parser.add_argument("--prune_method", required=True, choices=METHODS, help="the baseline")
    parser.add_argument("--sparsity_type", default="2:4", help="N:M or unstructured; default: %(default)s")
    parser.add_argument("--sparsity_ratio", type=float, default=0.5, help="share removed, for unstructured")
    parser.add_argument("--mask_only", action="store_true", help="keep the original weights under the method's mask")
    parser.add_argument("--dataset", default="c4", help=f"calibration text: {TEXT_HELP}; default: %(default)s")
    parser.add_argument("--nsamples", type=positive_int, default=128, help="calibration samples; default: %(default)s")
    parser.add_argument("--ctx_len", type=positive_int, default=2048, help="tokens a sample; default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="of the choice of samples; default: %(default)s")
    parser.add_argument("--save", default=None, metavar="FOLDER", help="write mask.safetensors here")
    parser.add_argument("--save_model", default=None, metavar="FOLDER", help="write the pruned checkpoint here")
    args = parser.parse_args(argv)
    method, pattern = METHODS[args.prune_method](), Pattern.parse(args.sparsity_type, args.sparsity_ratio)
    changes_weights = method.updates_weights and not args.mask_only
    if not (args.save or args.save_model):
        raise UsageError("Give --save FOLDER for the mask, --save_model FOLDER for the pruned checkpoint, or both.")
    if changes_weights and not args.save_model:
        raise UsageError(
            f"{args.prune_method} changes weights, so a mask alone is not its result: give --save_model or --mask_only."
        )
    model, tokenizer = load(args)
    windows = model.dummy_inputs["input_ids"]
    if args.prune_method != "magnitude":
        check_ctx_len(args.ctx_len, model.config)
        windows = calibration_windows(args.dataset, tokenizer, args.ctx_len, args.nsamples, args.seed)
    mask = prune_layerwise(
        model, windows, method, pattern, update=not args.mask_only, progress=f"{args.prune_method} {pattern}"
    )
    mask.base_model = args.model
    mask.info = {
        "method": args.prune_method,
        "weights_updated": changes_weights,
        "dataset": args.dataset,
        "samples": args.nsamples,
        "ctx_len": args.ctx_len,
        "seed": args.seed,
    }
    if args.save_model:
        save_pruned(model, tokenizer, args.save_model)
    if args.save:
        save_mask(mask, Path(args.save) / "mask.safetensors")
    print_json({"method": args.prune_method, "pattern": str(pattern), "kept": mask.density(), "save": args.save})
