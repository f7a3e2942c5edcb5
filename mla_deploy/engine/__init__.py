"""ONNX bundle to TensorRT engines: profiles, lint, a build worker in a process of its own, audit.

Nothing is imported here, so that the worker starts small; `mla_deploy.build` is in `pipeline.py`.
"""
