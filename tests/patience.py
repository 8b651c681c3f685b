"""How long tests wait for programs."""

import os

SLOWER = float(
    os.environ.get("SPOT_SLOWER", 1)
)  # how many times slower than usual they are: under a sanitizer (make check)
