"""A user's own nn.Module: its latent attention found, so that it exports as a known class does.

factory.py  ->  graph.py (the traced module)  ->  attention.py (where it attends)
            ->  latent.py (what must be cached)  ->  raised.py (the same model with a cache)
"""
