"""``make bench``: the speed benchmarks, one after the other. Those of accuracy are in docs/RESULTS.md."""

import runpy

for name in ("training_overhead", "shard_streaming"):
    print(f"\n== python -m benchmarks.{name}\n", flush=True)
    runpy.run_module(f"benchmarks.{name}", run_name="__main__")
