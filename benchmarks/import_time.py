"""What `import innerloop` costs beyond torch's own import: CPU milliseconds, the median of fresh processes.

python benchmarks/import_time.py [PROCESSES]
"""

from __future__ import annotations

import statistics
import subprocess
import sys

PROGRAM = """
import time
import torch
start = time.process_time()
import innerloop
print(1000 * (time.process_time() - start))
"""


def main() -> None:
    processes = int(sys.argv[1]) if len(sys.argv) > 1 else 9
    costs = [
        float(subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True).stdout)
        for _ in range(processes)
    ]
    print(f"{statistics.median(costs):.1f} ms (median of {processes}, {min(costs):.1f} to {max(costs):.1f})")


if __name__ == "__main__":
    main()
