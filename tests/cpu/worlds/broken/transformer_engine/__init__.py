"""Stands for a Transformer Engine that was built for another torch. Every world has it on its path (see cases.py): nothing but te.py may import it,
and only where a run on a GPU is to use it."""

raise RuntimeError("libtransformer_engine.so: undefined symbol")
