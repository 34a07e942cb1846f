"""Train the embedded model: `python -m seedling.training STAGE --run FOLDER --minutes M`.

Stages in order: tokenizer, vae, reader, student, export, evaluate. Every stage goes on where it
stopped; `--minutes` is the stage's whole wall-clock budget, earlier runs included.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch

STAGES = ("tokenizer", "vae", "reader", "student", "export", "evaluate")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m seedling.training", description=__doc__)
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument(
        "--run", type=Path, default=Path("runs/tiny"), help="folder of checkpoints and logs"
    )
    parser.add_argument(
        "--minutes", type=float, default=60.0, help="the stage's budget of wall-clock time"
    )
    parser.add_argument("--assets", type=Path, default=Path("assets"), help="where export writes")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument(
        "--shares",
        type=float,
        nargs="+",
        metavar="SHARE",
        help="TEXT EDIT COMPOSE SETS, of the student's rows (the last may be left out); start with "
        "text-to-image, the cheapest, to learn to draw",
    )
    parser.add_argument(
        "--out", type=Path, default=Path("runs/scores"), help="where evaluate writes"
    )
    parser.add_argument("--count", type=int, default=500, help="held-out prompts of each kind")
    options = parser.parse_args()
    if options.shares and (len(options.shares) not in (3, 4) or sum(options.shares) <= 0):
        parser.error("--shares wants three or four numbers: TEXT EDIT COMPOSE SETS")
    torch.set_num_threads(options.threads)
    if options.stage == "tokenizer":
        from .data import draw
        from .prompts import train_tokenizer

        rng = np.random.default_rng(0)
        texts = [draw(rng, (0.45, 0.25, 0.15, 0.15)).prompt for _ in range(20000)]
        train_tokenizer(texts, options.run / "tokenizer.json")
    elif options.stage == "vae":
        from .autoencoder import train as train_vae
        from .export import NAME

        exported = options.assets / "vae" / f"{NAME}.safetensors"
        train_vae(options.run, options.minutes, exported)
    elif options.stage == "reader":
        from .transformer import read

        read(options.run, options.minutes)
    elif options.stage == "student":
        from .transformer import SHARES
        from .transformer import train as train_student

        train_student(options.run, options.minutes, options.assets, tuple(options.shares or SHARES))
    elif options.stage == "evaluate":
        from .evaluate import evaluate, from_assets

        results = evaluate(from_assets(options.assets), options.out, options.count)
        print(json.dumps(results, indent=1))
    else:
        from .export import export

        for path in export(options.run, options.assets):
            print(path, f"{path.stat().st_size / 2**20:.1f} MiB")


if __name__ == "__main__":
    main()
