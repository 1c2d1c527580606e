"""Few-shot tables of class tokens beside baselines, over shots and seeds.

    python -m eval.fewshot --dataset bundled --backbone pocket --shots 1 2 4 8 16 --seeds 1 2 3 --output_dir results

The same as `fewshot-diti eval`. Under `accelerate launch -m eval.fewshot` the processes share the work.
"""

import sys

from fewshot_diti.cli import main

if __name__ == "__main__":
    sys.exit(main(["eval", *sys.argv[1:]]))
