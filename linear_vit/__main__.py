"""``python -m linear_vit``: the tools of ``linear-vit``."""

import sys

from linear_vit.command import main

sys.exit(main())
