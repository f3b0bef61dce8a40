"""Steps on a GPU: operators of Triton kernels opened to their launches, which Inductor compiles.

An operator left in the graph would be a call into Python, which a package has not. Unverified on
GPU: launches are traced and held against their sources where there is none.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import fx

from ...codegen.spec import KernelSpec
from ..lower import Traced
from .inductor import any_size, check_sizes


def launched(traced: Traced, specs: Iterable[KernelSpec]) -> Traced:
    """The step with what the operators of these kernels do in their place.

    Raises:
        ImportError: triton is not installed.
        RuntimeError: a launch was traced for some sizes alone.
    """
    from torch.fx.experimental.proxy_tensor import make_fx

    from ...codegen import triton

    table = {operator: triton.launcher(spec) for spec, operator in triton.load(specs).items()}
    with any_size(), torch.no_grad():
        made = make_fx(traced.graph, table, tracing_mode="symbolic")(*traced.inputs)
    opened = Traced(fx.GraphModule({}, made.graph), traced.inputs, traced.weights, traced.mode)
    check_sizes(opened)
    return opened
