"""Write a packed file of random ternary weights in a shape that is not a preset: python benchmarks/shapes.py 110m FILE

For `bitnet bench -m FILE`. Presets need no file: `bitnet bench --preset NAME`.
"""

import argparse
from pathlib import Path

from bitnet.benchmarks.bench.random_model import write_random
from bitnet.config import preset

# Width and depth of GPT-2 small with LLaMA's block: the 110M model that published figures are compared with.
SHAPES = {"110m": preset("small").replace(vocab_size=32768, num_key_value_heads=12, qk_norm=False)}


def main() -> None:
    """Write the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("file", type=Path)
    options = parser.parse_args()
    write_random(SHAPES[options.shape], options.file)


if __name__ == "__main__":
    main()
