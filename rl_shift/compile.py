"""How updates are executed: eagerly, as one compiled graph, or as a captured CUDA graph.

The only file that mentions `torch.compile` and CUDA graphs. A compiled unit is called under
`no_grad` with (tensor dict, batch); `learn` and `polyak` work on the dict, and changed values are
copied back in place, so addresses never change and nothing outside notices. Our design.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
import torch.utils._pytree as pytree
from torch import Tensor
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files

from rl_shift.agent import Agent, Batch, Metrics

Mode = Literal["off", "on", "graphs"]
log = logging.getLogger(__name__)


class MergeEqualNodes(CustomGraphPass):
    """Merge equal nodes of an inference graph, so that losses share their forward passes.

    The compiler does this only for training graphs; a unit that contains its own gradients is an
    inference graph for it. Random, mutating and copying nodes are left alone.
    """

    def __call__(self, graph: torch.fx.Graph) -> None:
        """Rewrite `graph` in place."""
        seen: dict[Any, torch.fx.Node] = {}
        for node in list(graph.nodes):
            target = node.target
            if node.op != "call_function" or not isinstance(target, torch._ops.OpOverload):
                continue
            if (
                torch.Tag.nondeterministic_seeded in target.tags
                or target._schema.is_mutable
                or target is torch.ops.aten.copy_.default
                or ("inductor" in target.namespace and "seed" in str(target))
            ):
                continue
            leaves, spec = pytree.tree_flatten((node.args, node.kwargs))
            try:
                first = seen.setdefault(
                    (target, tuple((type(x), x) for x in leaves), str(spec)), node
                )
            except TypeError:  # an unhashable argument: leave the node
                continue
            if first is not node:
                node.replace_all_uses_with(first)
                graph.erase_node(node)

    def uuid(self) -> Any:
        """Identifies the pass to the compiler's cache."""
        return get_hash_for_files((__file__,))


def _guards_on_the_batch(guards: Sequence[Any]) -> list[bool]:
    """Keep the guards on the batch alone: they cost a tenth of an update.

    Everything else that a unit reads is fixed by its variant, or lies in tensors that never move.
    """
    return ["batch" in g.name and "tensors" not in g.name for g in guards]


class CompiledUnit:
    """One agent's `update` (or `step`) as compiled graphs, one per variant.

    Variants are keyed by what besides tensors decides how the update runs: the stage, the head in
    focus, and each contained agent's `updates` modulo its `delay`.
    """

    def __init__(
        self,
        agent: Agent,
        method: str,
        capture: bool = False,
        options: dict[str, Any] | None = None,
    ) -> None:
        self.agent, self.method, self.capture = agent, method, capture
        self.options = {
            "post_grad_custom_pre_pass": MergeEqualNodes(),
            "guard_filter_fn": _guards_on_the_batch,
            **(options or {}),
        }
        self.variants: dict[Any, Callable[[dict[str, Tensor], Batch], Metrics]] = {}
        self.tensors: dict[str, Tensor] = {}
        self.structure = -1

    def _compile(self) -> Callable[[dict[str, Tensor], Batch], Metrics]:
        agent, method = self.agent, getattr(type(self.agent), self.method)
        inner = [a for _, a in agent.prefixed()]

        def unit(tensors: dict[str, Tensor], batch: Batch) -> Metrics:
            live = dict(tensors)
            for a in inner:
                a.live = live
            metrics: Metrics = method(agent, batch)
            for a in inner:
                a.live = None
            for key, value in live.items():
                if value is not tensors[key]:
                    tensors[key].copy_(value)
            return metrics

        flags: dict[str, Any] = {"isolate_recompiles": True}  # else the fifth agent would fail
        compiled = torch.compile(unit, fullgraph=True, dynamic=False, options=self.options, **flags)
        return Captured(compiled) if self.capture else compiled

    def _look_again(self) -> None:
        """Forget what was compiled if tensors were added, dropped or replaced since."""
        found = self.agent.tensors()
        places = [
            {k: (v.data_ptr(), v.shape, v.dtype) for k, v in tensors.items()}
            for tensors in (self.tensors, found)
        ]
        if places[0] != places[1]:
            self.tensors, self.variants = found, {}

    def __call__(self, batch: Batch) -> Metrics:
        """Run one update on a batch with the shapes of the first one."""
        agents = [a for _, a in self.agent.prefixed()]
        structure = sum(a.structure for a in agents)
        if structure != self.structure:
            self._look_again()
            self.structure = structure
        phases = tuple(a.updates % a.delay for a in agents)
        key = (self.agent.variant(), phases)
        if key not in self.variants:
            self.variants[key] = self._compile()
        true = [a.updates for a in agents]
        for (prefix, a), phase in zip(self.agent.prefixed(), phases, strict=True):
            a.updates, a.prefix = phase, prefix  # the tracer must not see a growing counter
        try:
            with torch.no_grad():
                return self.variants[key](self.tensors, batch)
        finally:
            for a, updates in zip(agents, true, strict=True):
                a.live, a.updates = None, updates


class Captured:
    """A compiled unit replayed as one CUDA graph; inputs are copied into fixed buffers."""

    def __init__(self, compiled: Callable[[dict[str, Tensor], Batch], Metrics]) -> None:
        self.compiled = compiled
        self.graph: torch.cuda.CUDAGraph | None = None
        self.batch: Batch = {}
        self.metrics: Metrics = {}
        self.calls = 0

    def __call__(self, tensors: dict[str, Tensor], batch: Batch) -> Metrics:
        """Warm up on a side stream three times, capture, and replay from then on."""
        self.calls += 1
        if self.calls <= 3:
            stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                metrics = self.compiled(tensors, batch)
            torch.cuda.current_stream().wait_stream(stream)
            return metrics
        if self.graph is None:
            self.batch = {k: v.clone() for k, v in batch.items()}
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):  # captured, not executed
                self.metrics = self.compiled(tensors, self.batch)
        for k, v in batch.items():
            self.batch[k].copy_(v)
        self.graph.replay()
        return {k: v.clone() for k, v in self.metrics.items()}


class Updater:
    """The front door for updates in every mode.

    Sets learning rates, runs the update and advances the counters. A mode that cannot run falls
    back to the next simpler one with one warning.

    Args:
        agent: the agent, on its device, stacked if it is to be.
        mode: "off", "on" or "graphs".
        options: extra compiler options.
    """

    def __init__(
        self, agent: Agent, mode: Mode = "off", options: dict[str, Any] | None = None
    ) -> None:
        self.agent, self.mode = agent, mode
        if mode == "graphs" and not torch.cuda.is_available():
            log.warning("compile=graphs is not available without a GPU: using compile=on")
            self.mode = "on"
        self.options = options
        self.units: dict[str, CompiledUnit] = {}
        self._run = self._choose()

    def _choose(self) -> Callable[[Batch], Metrics]:
        if self.mode == "off":
            return self.agent.update
        capture = self.mode == "graphs"
        stepping = [a for a in self.agent.contained() if type(a).step is not Agent.step]
        for agent in stepping:  # they loop inside `update` and call their compiled `step`
            unit = CompiledUnit(agent, "step", capture, self.options)
            agent.__dict__["step"] = unit  # shadows the method
            self.units[type(agent).__name__] = unit
        if stepping:
            return self.agent.update
        unit = self.units[""] = CompiledUnit(self.agent, "update", capture, self.options)
        return unit

    def __call__(self, batch: Batch) -> Metrics:
        """One update; a failed one is not counted."""
        self.agent.schedule()
        succeeded = False
        try:
            try:
                metrics = self._run(batch)
            except torch._dynamo.exc.TorchDynamoException as error:  # pyright: ignore
                if self.mode == "off":
                    raise
                # Raised while tracing, before any tensor was touched: the batch can be used again.
                reason = " ".join(str(error).strip().splitlines()[:2]).strip()
                log.warning("this update cannot be compiled (%s): using compile=off", reason)
                self.agent.sync_steps()
                for unit in self.units.values():
                    unit.agent.__dict__.pop("step", None)
                self.mode, self.units = "off", {}
                self._run = self.agent.update
                metrics = self._run(batch)
            succeeded = True
            return metrics
        finally:
            self.agent.advance(succeeded)
