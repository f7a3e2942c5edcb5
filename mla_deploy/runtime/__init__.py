"""Running a bundle: one `Runner` protocol, ONNX Runtime or TensorRT behind it, greedy generation.

The PyTorch runner is `mla_deploy.runtime.torch_runner`; it is not named here because running a
bundle must not load torch.
"""

from mla_deploy.runtime.batching import Batcher
from mla_deploy.runtime.generation import generate
from mla_deploy.runtime.onnx_runner import OnnxRunner, RunnerMemory
from mla_deploy.runtime.opening import open_runner
from mla_deploy.runtime.protocol import Runner, Verifier
from mla_deploy.runtime.speculate import Gain, speculate

__all__ = [
    "Batcher",
    "Gain",
    "OnnxRunner",
    "Runner",
    "RunnerMemory",
    "Verifier",
    "generate",
    "open_runner",
    "speculate",
]
