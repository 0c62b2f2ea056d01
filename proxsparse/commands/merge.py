"""Merge a LoRA adapter into a pruned model, so that the model stays pruned.

    python -m proxsparse merge --model runs/mine/pruned \\
        --adapter my-adapter --to tuned
    python -m proxsparse merge --model meta-llama/Llama-3.1-8B \\
        --mask runs/mine --adapter my-adapter --to tuned

The adapter is one that peft saved. The command adds mask * (B A) * scale to every weight matrix that the mask prunes.
An adapter that was trained with proxsparse.masked_lora loses nothing by that. Any other adapter loses what it learned
at the pruned weights. Without --mask, the zeros of the model are the mask.
"""

import argparse
import dataclasses
from pathlib import Path

from proxsparse.commands.cli import Parser, command, print_json
from proxsparse.commands.groups import add_mask_argument, add_model_arguments, load, read_mask, tokenizer_to_save
from proxsparse.deploy.dense import save_pruned
from proxsparse.deploy.lora import adapter_folder, merge_lora
from proxsparse.mask import mask_of_pruned
from proxsparse.record import refuse_folder, refuse_trained


def arguments() -> Parser:
    parser = Parser(description=__doc__)
    add_model_arguments(parser)
    add_mask_argument(parser)
    parser.add_argument("--adapter", required=True, metavar="FOLDER", help="folder or Hub id of the adapter")
    parser.add_argument("--to", required=True, metavar="FOLDER", help="new folder to write the merged checkpoint into")
    return parser


@command(arguments)
def main(args: argparse.Namespace) -> None:
    given, to = read_mask(args), Path(args.to)
    refuse_folder(to, args.model, args.mask, args.adapter)
    refuse_trained(to, {"weights_updated": f"the adapter {args.adapter}"})
    folder = adapter_folder(args.adapter)  # before the model is loaded, so that a wrong name costs no wait
    tokenizer = tokenizer_to_save(args)
    model = load(args, mask=given)
    mask = mask_of_pruned(model) if given is None else given
    merged = merge_lora(model, folder, mask)
    info = mask.info | {"adapter": args.adapter, "weights_updated": f"the adapter {args.adapter}"}
    mask = dataclasses.replace(mask, base_model=mask.base_model or args.model, info=info)
    save_pruned(merged, mask, to, tokenizer=tokenizer)
    print(f"{args.adapter} merged into {args.model}; the checkpoint in {to} is {mask.pattern}")
    print_json({"model": args.model, "adapter": args.adapter, "mask": args.mask, "to": str(to)})
