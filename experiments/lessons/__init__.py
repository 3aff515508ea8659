"""Small experiments that each show one thing, in at most two minutes on two cores: see docs/lessons.md."""
