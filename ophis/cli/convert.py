"""Write a saved model in another layout.

From any of these, and to any:

  ophis         this library's, which can express every model
  transformers  a pure Mamba, Mamba-2 or Falcon-Mamba: transformers, vLLM, llama.cpp and mlx-lm read it
  official      that of the state-spaces/* models, for mamba_ssm
  gguf          one file, for llama.cpp

What the target cannot express is refused. The tokenizer goes along; the state-spaces/* models come without theirs,
which is --tokenizer EleutherAI/gpt-neox-20b.
"""

from __future__ import annotations

import argparse

from ophis.cli.errors import user_errors

LAYOUTS = ("ophis", "transformers", "official", "gguf")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="SOURCE", help="a folder, a .gguf file, or a name on the Hugging Face hub")
    parser.add_argument("target", metavar="TARGET", help="the folder to make, or the .gguf file")
    parser.add_argument("--to", required=True, choices=LAYOUTS, help="the layout to write")
    parser.add_argument(
        "--type", metavar="TYPE", help="of a GGUF file's matrices: f32, exact; f16; q8_0 (default: f32)"
    )
    parser.add_argument("--max-shard-size", metavar="SIZE", help="of a file of weights (default: 5GB)")
    parser.add_argument("--tokenizer", metavar="FOLDER", help="take that tokenizer along; a name on the hub will do")
    parser.add_argument("--overwrite", action="store_true", help="replace a target that exists")


def run(arguments: argparse.Namespace) -> int:
    from tqdm import tqdm

    from ophis.models import convert

    bars = []

    def progress(total: int):
        bars.append(tqdm(total=total, unit="B", unit_scale=True, disable=None, leave=False))  # a terminal's only
        return bars[0].update

    try:
        with user_errors():
            target = convert(
                arguments.source,
                arguments.target,
                arguments.to,
                file_type=arguments.type,
                max_shard_size=arguments.max_shard_size,
                tokenizer=arguments.tokenizer,
                overwrite=arguments.overwrite,
                progress=progress,
            )
    finally:
        for bar in bars:
            bar.close()
    size = sum(path.stat().st_size for path in ([target] if target.is_file() else target.iterdir()))
    print(f"{target}: {size / 1e6:,.1f} MB")
    return 0
