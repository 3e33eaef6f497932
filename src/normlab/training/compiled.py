"""Forward pass, loss and gradients of a training step as one compiled function."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from ..errors import check
from .batches import call_each

_SWITCH = "trace_autograd_ops"  # of torch's compiler: gradients are part of the graph, rather than the end of it
# Checks of what the compiler's own code hands to itself, at each operator.
_OPTIONS: dict[str, Any] = {"size_asserts": False, "alignment_asserts": False}


class CompiledGradients:
    """Computes output, loss and gradients of a model, compiled by torch at the first batch of each shape.

    Raises:
        InputError: this torch cannot compile gradients.
    """

    def __init__(self) -> None:
        import torch._dynamo  # takes longer than all else here, and most learners do without

        able = hasattr(torch._dynamo.config, _SWITCH)
        check(able, "compile", True, f"False with torch {torch.__version__}, which cannot compile gradients")

        def gradients(model, loss_func, parameters, inputs, targets):  # as below
            output = model(inputs)
            loss = loss_func(output, targets)
            return call_each(output, "detach"), loss.detach(), torch.autograd.grad(loss, parameters, allow_unused=True)

        # The compiler keeps what it makes with a function's code, eight times at most: each learner has its own code.
        gradients.__code__ = gradients.__code__.replace()
        self._gradients = torch.compile(gradients, options=_OPTIONS)
        self._tracing = torch._dynamo.config.patch({_SWITCH: True})

    def __call__(
        self, model: nn.Module, loss_func: Callable[..., Tensor], inputs: Any, targets: Any
    ) -> tuple[Any, Tensor, list[tuple[nn.Parameter, Tensor | None]]]:
        """Output and loss, without a graph, and the gradient of each parameter that wants one, None if it has none.

        Args:
            model: any module that `torch.compile` takes.
            loss_func: from output and targets to a scalar.
            inputs: of the model.
            targets: of the loss.
        """
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        with self._tracing:
            output, loss, gradients = self._gradients(model, loss_func, parameters, inputs, targets)
        return output, loss, list(zip(parameters, gradients, strict=True))
