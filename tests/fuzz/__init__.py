"""Coverage-guided fuzzing of everything that takes bytes or text from outside.

`python -m tests.fuzz --for 10m` runs every target; `targets.py` says what they are. In every test run
`tests/unit/test_garbage.py` tries what was found before, and a little more.
"""
