"""``python -m bench.static``, the old spelling of ``python -m bench static``."""

import sys

from linear_vit.bench.__main__ import main

sys.exit(main(["static", *sys.argv[1:]]))
