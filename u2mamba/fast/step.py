"""The training step of engine/step.py, faster: one CUDA graph, weights in bf16, weight gradients on a second stream.

U²-Net launches some 5,000 kernels a step, and the CPU cannot launch them as fast as the GPU runs them; a graph replays
them all. On a CPU the step runs unmodified.
"""

import contextlib
import copy
import warnings
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from model.u2net import as_list
from u2mamba.engine import step
from u2mamba.fast.conv2d import wait_for_weight_grads
from u2mamba.fast.install import FusedOps
from u2mamba.fast.launch import compile_only
from u2mamba.runtime.environment import out_of_memory

EAGER_STEPS = 3  # before the capture: kernels are compiled, convolution algorithms selected, optimizer state created


class TrainStep(step.TrainStep):
    """As engine.step.TrainStep. Call `install(net)` first, and use a PyTorch optimizer with fused=True."""

    def __init__(self, net: nn.Module, optimizer: torch.optim.Optimizer, *args, **options):
        super().__init__(net, optimizer, *args, **options)
        self.ops = next((m.ops for m in net.modules() if isinstance(getattr(m, "ops", None), FusedOps)), None)
        self.copies: dict[nn.Parameter, Tensor] = {}  # weight -> its copy in bf16
        self.graph = self.images = self.masks = self.shape = None
        self.rates: list[Tensor] = []  # the captured learning rate of each group
        self.eager_steps, self.captures = 0, self.device.type == "cuda"
        if self.captures:
            # one stream for all: the allocator keeps a separate memory pool for each stream that ran a step
            self.capture_stream = torch.cuda.Stream(self.device)
            torch.autograd.graph.set_warn_on_accumulate_grad_stream_mismatch(False)  # the streams are joined explicitly
            for group in optimizer.param_groups:
                group["capturable"] = True

    def _set_up(self) -> None:
        super()._set_up()
        self.graph, self.eager_steps = None, 0
        fused = [m.weight for m in self._modules if isinstance(m, nn.Linear)]  # Mamba's projections
        fused += [m.weight for m in self._modules if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)]
        weights = fused if self.ops else []  # what the fused operations use in bf16
        self.copies = {w: w.detach().to(torch.bfloat16).requires_grad_(w.requires_grad) for w in weights}

    def _run(self, images: Tensor, masks: Tensor) -> None:
        if self.device.type != "cuda":
            super()._run(images, masks)
            return
        if self.shape is None or images.shape[2:] != self.shape[2:]:
            self._compile_kernels(images)
        if self.graph and images.shape == self.images.shape:
            for group, captured in zip(self.optimizer.param_groups, self.rates, strict=True):
                captured.fill_(group["lr"])  # set by the schedule, a user or a scheduler
            self.images.copy_(images)
            self.masks.copy_(masks)
            self.graph.replay()
        elif self.captures and self.eager_steps >= EAGER_STEPS and images.shape == self.shape:  # twice: no last batch
            self._capture(images, masks)
        else:  # the first steps, the first of another size, and the last, smaller batch of an epoch
            self._eager_step(images, masks)
        self.shape = images.shape

    def _compile_kernels(self, images: Tensor) -> None:
        """Compiles the kernels of a step in parallel, in a forward and backward pass of a copy of the network. The loss
        is the sum of the outputs: the real loss must not see uninitialized memory."""
        net = copy.deepcopy(self.net)
        with compile_only():
            with self.env.autocast():
                outputs = net(images.chunk(self.grad_accum_steps)[0], logits=True)
            total = sum(d.float().sum() for d in as_list(outputs))
            if total.requires_grad:
                with torch.autograd.set_multithreading_enabled(False):
                    total.backward()

    def _eager_step(self, images: Tensor, masks: Tensor) -> None:
        """On a side stream, as PyTorch requires before a capture: gradients must not belong to the default stream.

        The last step before the capture detects calls that wait for the GPU, which a graph cannot contain.
        """
        last = self.captures and self.eager_steps == EAGER_STEPS - 1
        stream, places = self.capture_stream, []
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream), _synchronizations(places) if last else contextlib.nullcontext():
            self._step(images, masks)
        torch.cuda.current_stream(self.device).wait_stream(stream)
        self.eager_steps += 1
        if places:
            self._give_up(f"{places[0]} waits for the GPU (.item(), a condition on a tensor, a copy to the CPU)")

    def _give_up(self, reason: str) -> None:
        self.captures, self.graph = False, None
        print(f"warning: no CUDA graph, so steps are slower: {reason}", flush=True)

    def _capture(self, images: Tensor, masks: Tensor) -> None:
        self.graph = None  # a graph of another batch shape
        self.images, self.masks = images.clone(), masks.clone()  # clone keeps the memory format
        groups = self.optimizer.param_groups
        rates = [group["lr"] for group in groups]
        self.rates = [torch.tensor(float(rate), device=self.device) for rate in rates]
        torch.cuda.empty_cache()  # the graph has its own memory pool: that of the eager steps would stay reserved
        graph = torch.cuda.CUDAGraph()
        for group, rate in zip(groups, self.rates, strict=True):
            group["lr"] = rate
        try:
            # thread_local: NCCL's own thread may query an earlier all-reduce meanwhile; the outer context restores
            # this stream also after an error
            here = torch.cuda.stream(torch.cuda.current_stream(self.device))
            with here, torch.cuda.graph(graph, capture_error_mode="thread_local"):
                self._step(self.images, self.masks)
        except RuntimeError as error:
            if out_of_memory(error):
                raise
            self._give_up(f"{error}".splitlines()[0])
        finally:
            for group, rate in zip(groups, rates, strict=True):
                group["lr"] = rate
        if self.captures:
            self.graph = graph
            self.graph.replay()  # capturing executes nothing
        else:
            self._eager_step(images, masks)

    def _step(self, images: Tensor, masks: Tensor) -> None:
        self.first_part = True
        if self.copies:  # in a few kernels, where autocast launches one per weight
            with torch.no_grad():
                torch._foreach_copy_([*self.copies.values()], [*self.copies])
        super()._step(images, masks)

    def _backward(self, images: Tensor, masks: Tensor, share: float) -> Tensor:
        """Runs in this thread: cuDNN caches its selected algorithms per thread."""
        if self.ops:
            self.ops.bf16_weights = self.copies
            self.ops.uses.clear()
        try:
            with torch.autograd.set_multithreading_enabled(False):
                values = super()._backward(images, masks, share)
        finally:
            if self.ops:
                self.ops.bf16_weights = {}
        wait_for_weight_grads(self.device)
        self._fetch_gradients()
        return values

    @torch.no_grad()
    def _fetch_gradients(self) -> None:
        """Moves the gradients of the copies to the weights."""
        first, self.first_part = self.first_part, False
        if first and not self.averager.views:  # the first step: weights that are also used as they are, say in a loss
            for weight in [weight for weight in self.copies if weight.grad is not None]:
                if (copied := self.copies.pop(weight).grad) is not None:
                    weight.grad.add_(copied)
        used = [(weight, copied) for weight, copied in self.copies.items() if copied.grad is not None]
        for weight, _ in used:
            if weight.grad is None:  # written in place where the optimizer reads it
                views = self.averager.views  # without a weight that the first step did not use
                weight.grad = views[weight] if weight in views else torch.empty_like(weight)
                if not first:
                    weight.grad.zero_()
        if used:
            copy_or_add = torch._foreach_copy_ if first else torch._foreach_add_
            copy_or_add([weight.grad for weight, _ in used], [copied.grad for _, copied in used])
        for _, copied in used:
            copied.grad = None


@contextlib.contextmanager
def _synchronizations(places: list[str]) -> Iterator[None]:
    """Adds "file:line" of each call inside that makes the CPU wait for the GPU."""
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode(before)
    places += [f"{w.filename}:{w.lineno}" for w in caught if "called a synchronizing CUDA operation" in str(w.message)]
