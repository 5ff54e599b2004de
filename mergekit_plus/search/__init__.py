"""Option values of a merge found by measuring: `space` (what is searched), `objective` (what is minimised), `candidates` (the merged models), `run`."""
