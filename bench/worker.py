"""A process that times steps on request: one JSON line in, one out.

Allocation behaviour belongs to a process (glibc reads its settings at start), so contenders with
kept and with fresh allocations live in processes of their own; only one of them works at a time.
"""

from __future__ import annotations

import json
import sys
import time

import torch

from bench.contenders import make_step, saved_bytes
from bench.shapes import BLOCKS


def main() -> None:
    """Serve requests until standard input ends."""
    torch.set_num_threads(2)
    steps = {}
    for line in sys.stdin:
        request = json.loads(line)
        key = (request["contender"], request["mode"], request["block"], request["dtype"])
        shape, dtype = BLOCKS[request["block"]], getattr(torch, request["dtype"])
        if request["what"] == "saved":
            answer = saved_bytes(request["contender"], shape, dtype)
        elif request["what"] == "drop":
            steps.clear()
            answer = 0
        else:
            if key not in steps:
                steps[key] = make_step(request["contender"], request["mode"], shape, dtype)
                steps[key]()
                steps[key]()
            start = time.perf_counter()
            steps[key]()
            answer = (time.perf_counter() - start) * 1e3
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
