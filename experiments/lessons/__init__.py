"""Small experiments that each show one thing, in at most a few minutes on two cores: see docs/lessons.md."""
