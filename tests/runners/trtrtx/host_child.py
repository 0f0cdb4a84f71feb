"""`pipeline.runners.trtrtx.child` with this machine's memory in place of a card's."""

from __future__ import annotations

import sys

from tensorrt_rtx import HostDevice

from pipeline.runners.trtrtx.child import main

if __name__ == "__main__":
    main(sys.argv[1:], HostDevice)
