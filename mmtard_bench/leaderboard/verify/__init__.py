"""Check an entry without trusting it, in levels: see ``mmtard_bench.verify.levels``."""
