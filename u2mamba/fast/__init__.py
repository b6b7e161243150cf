"""All that exists only for speed on a GPU: kernels, the captured training step. Without this folder everything works.

`install(net)` replaces the operations of model/layers.py in a network; `TrainStep` is engine/step.py's with one CUDA
graph, bf16 weights and a second stream.
"""

from u2mamba.fast.install import install
from u2mamba.fast.step import TrainStep

__all__ = ["TrainStep", "install"]
