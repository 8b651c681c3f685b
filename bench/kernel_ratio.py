"""Times of two runs of decode_kernels --json side by side: how fast one build's kernels are, in parts of another's.

    python3 bench/kernel_ratio.py HOPPER.json PORTABLE.json [--least 0.6]

Status 1 where a stage is below --least.
"""

import argparse
import json
import math
import pathlib
import sys


def rows(path: pathlib.Path) -> dict[tuple[str, int, int, str], float]:
    return {
        (row["shape"], row["length"], row["batch"], row["stage"]): row["us"]
        for row in json.loads(path.read_text())["rows"]
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("reference", type=pathlib.Path)
    parser.add_argument("other", type=pathlib.Path)
    parser.add_argument("--least", type=float, default=0.6)
    options = parser.parse_args()
    reference, other = rows(options.reference), rows(options.other)
    ratios = {key: reference[key] / other[key] for key in reference if key in other}
    if not ratios:
        sys.exit("error: the two runs have no stage in common")
    print(f"{'shape':12} {'L':>7} {'B':>3}  {'stage':44} {'us':>9} {'us':>9} {'speed':>6}")
    for (shape, length, batch, stage), ratio in ratios.items():
        key = (shape, length, batch, stage)
        print(
            f"{shape:12} {length:7} {batch:3}  {stage:44} {reference[key]:9.2f} {other[key]:9.2f} {ratio:5.2f}x"
            + (" below" if ratio < options.least else "")
        )
    mean = math.exp(sum(math.log(ratio) for ratio in ratios.values()) / len(ratios))
    below = sum(ratio < options.least for ratio in ratios.values())
    print(
        f"{len(ratios)} stages: speed {mean:.2f}x on average (geometric), least {min(ratios.values()):.2f}x; "
        f"{below} below {options.least}x"
    )
    sys.exit(1 if below else 0)


if __name__ == "__main__":
    main()
