"""Speed, beside the limit or the peer measured in the same run: `make bench`. See docs/benchmarks.md.

A bench is a module `benchmarks/NAME.py`, named in `__main__.py`, with
- `FIGURES: tuple[Figure, ...]`, what it measures (`figures.py`), and
- `async def run(bench: Bench) -> list[Measured]`, which measures all of it. It raises BenchFailed when what
  was acknowledged is not there, or there twice; a figure that must not count is marked by `Measured.invalid`.
"""
